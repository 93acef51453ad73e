"""llama.cpp as a peer, on GGUF files that our exporter wrote: the same weights, quantized by llama.cpp.

The peer needs llama-cpp-python and gguf, which are imported only when it is used.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import multiprocessing
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from llama.checkpoint.source import open_checkpoint
from llama.env import notice
from llama.errors import LlamaError
from llama.export.gguf import export_gguf
from llama.tokenizer.base import TextStream, Tokenizer
from llama.tokenizer.vocabulary import Kind, Vocabulary
from scripts.bench.peers import Prompts, Setup, Timing

# Our precisions to GGUF's types, and llama.cpp's numbers for the types that it quantizes to.
TYPES = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
QUANTIZED = {"q4_0": 2, "q8_0": 7}
# Tokens of a batch, and the multiple to which a context is rounded up.
BATCH_TOKENS, CONTEXT_STEP = 2048, 256


def available() -> bool:
    """Return True where both packages are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("llama_cpp", "gguf"))


class LlamaCpp:
    """llama.cpp through its own C interface, greedy, in one process.

    Its kernels for the matrix units crash on more than one row of quantized weights in some virtual machines. There a
    model without these kernels prefills and a second model with them decodes on a copy of the cache; copying is not
    timed.
    """

    def load(self, setup: Setup) -> None:
        """Open a GGUF file on the CPU."""
        self.first = self.later = _Model(setup, amx=setup.amx == "always")
        if setup.amx == "decode":
            self.later = _Model(setup, amx=True)

    def run(self, prompts: Prompts, new_tokens: int) -> Timing:
        """Measure one run, as `Peer.run` says; making the context counts as prefill."""
        length = max(map(len, prompts)) + new_tokens + 1
        if self.later is not self.first:
            self.later.begin(len(prompts), length)
        started = time.perf_counter()
        self.first.begin(len(prompts), length)
        rows = [(slot, at, token) for slot, prompt in enumerate(prompts) for at, token in enumerate(prompt)]
        tokens = [[token] for token in self.first.step(rows, {len(prompt) - 1 for prompt in prompts})]
        prefill = time.perf_counter() - started
        if self.later is not self.first:
            self.first.copy_slots(self.later, len(prompts))
        started = time.perf_counter()
        for number in range(new_tokens):
            rows = [(slot, len(prompt) + number, tokens[slot][-1]) for slot, prompt in enumerate(prompts)]
            for slot, token in enumerate(self.later.step(rows, None)):
                tokens[slot].append(token)
        return Timing(prefill, time.perf_counter() - started, tokens)


class _Model:
    """A model and a context of the shape that was last asked for."""

    def __init__(self, setup: Setup, amx: bool) -> None:
        self.library, self.threads = library(), setup.threads
        params = self.library.llama_model_default_params()
        params.n_gpu_layers = 0
        # Without these buffers the weights are not laid out for the matrix units.
        params.use_extra_bufts = amx
        self.model = self.library.llama_model_load_from_file(setup.folder.encode(), params)
        if not self.model:
            raise LlamaError(f"llama.cpp cannot read {setup.folder}")
        self.n_vocab = self.library.llama_vocab_n_tokens(self.library.llama_model_get_vocab(self.model))
        self.context: Any = None
        self.shape = (0, 0)

    def begin(self, n_slots: int, length: int) -> None:
        """Make an empty context of `n_slots` sequences of `length` tokens."""
        shape = (n_slots, -(-length // CONTEXT_STEP) * CONTEXT_STEP)
        if self.context is not None and shape == self.shape:
            self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
            return
        if self.context is not None:
            self.library.llama_free(self.context)
        params = self.library.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch = shape[0] * shape[1], n_slots, BATCH_TOKENS
        params.n_threads = params.n_threads_batch = self.threads
        self.context, self.shape = self.library.llama_init_from_model(self.model, params), shape
        if not self.context:
            raise LlamaError(f"llama.cpp has no room for {n_slots} sequences of {length} tokens")

    def step(self, rows: Sequence[tuple[int, int, int]], ends: set[int] | None) -> list[int]:
        """Run rows of (slot, position, token); return the best next token after each position in `ends` (None: all)."""
        chosen: list[int] = []
        for part in (rows[first : first + BATCH_TOKENS] for first in range(0, len(rows), BATCH_TOKENS)):
            wanted = [ends is None or at in ends for _, at, _ in part]
            batch = self.library.llama_batch_init(len(part), 0, 1)
            try:
                batch.n_tokens = len(part)
                for number, (slot, at, token) in enumerate(part):
                    batch.token[number], batch.pos[number], batch.logits[number] = token, at, wanted[number]
                    batch.n_seq_id[number], batch.seq_id[number][0] = 1, slot
                if self.library.llama_decode(self.context, batch):
                    raise LlamaError("llama.cpp could not decode a batch")
                chosen += [self._best(number) for number, ends_here in enumerate(wanted) if ends_here]
            finally:
                self.library.llama_batch_free(batch)
        return chosen

    def _best(self, number: int) -> int:
        import numpy as np

        logits = self.library.llama_get_logits_ith(self.context, number)
        return int(np.ctypeslib.as_array(logits, shape=(self.n_vocab,)).argmax())

    def copy_slots(self, other: _Model, n_slots: int) -> None:
        """Copy the keys and values of the first `n_slots` slots to `other`."""
        for slot in range(n_slots):
            size = self.library.llama_state_seq_get_size(self.context, slot)
            state = (ctypes.c_uint8 * size)()
            self.library.llama_state_seq_get_data(self.context, state, size, slot)
            if not self.library.llama_state_seq_set_data(other.context, state, size, slot):
                raise LlamaError("llama.cpp could not copy its cache")


@cache
def library() -> Any:
    """Return llama.cpp's C interface, silenced."""
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, None)
    _kept.append(silent)
    llama_cpp.llama_backend_init()
    return llama_cpp


_kept: list[Any] = []  # objects that C holds a pointer to


# -- files -----------------------------------------------------------------------------------------


class Numbered(Tokenizer):
    """A tokenizer of `n_words` ids without text, for files that must hold one although only ids are run."""

    kind, bos_id, eos_id, pad_id = "sentencepiece", 1, 2, -1
    stop_tokens: frozenset[int] = frozenset({2})
    special_tokens: dict[str, int] = {}  # noqa: RUF012  (an instance attribute of the base)

    def __init__(self, n_words: int) -> None:
        self.n_words = n_words

    def vocabulary(self) -> Vocabulary:
        """Return three control tokens, the bytes, and words named after their numbers."""
        names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        kinds = [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL, *[Kind.BYTE] * 256]
        names += [f"word{number}" for number in range(len(names), self.n_words)]
        kinds += [Kind.NORMAL] * (self.n_words - len(kinds))
        return Vocabulary("spm", names[: self.n_words], kinds[: self.n_words], [0.0] * self.n_words, unk_id=0)

    def text_stream(self) -> TextStream:
        """Raise: there is no text."""
        raise NotImplementedError

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError


def write_files(source: str, folder: Path, types: Sequence[str], between: str) -> dict[str, Path]:
    """Write one GGUF file of each type, for all matrices; return the paths by type. Files in `folder` already are kept.

    Args:
        source: a checkpoint's folder.
        folder: where they are written, as `model-TYPE.gguf`.
        types: of `TYPES`.
        between: the type from which llama.cpp quantizes.
    """
    files = {type_name: folder / f"model-{type_name}.gguf" for type_name in types}
    for type_name, file in files.items():
        if file.exists():
            continue
        if type_name not in QUANTIZED:
            _export(source, file, type_name)
            continue
        whole = folder / f"model-{between}.gguf"
        if not whole.exists():
            _export(source, whole, between)
        notice(f"quantizing to {type_name}")
        _quantize(whole, file, QUANTIZED[type_name])
    return files


def _export(source: str, file: Path, type_name: str) -> None:
    notice(f"writing a GGUF file, {type_name}")
    checkpoint = open_checkpoint(source)
    export_gguf(checkpoint, Numbered(checkpoint.args.vocab_size), file, type_name, chat="none")


def _quantize(source: Path, target: Path, number: int) -> None:
    """Quantize every matrix, the embedding and the output layer too, to the type with this `number`."""
    llama_cpp = library()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.pure, params.allow_requantize = number, True, True
    partial = target.with_suffix(".partial")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), params):
        partial.unlink(missing_ok=True)
        raise LlamaError(f"llama.cpp could not quantize {source}")
    partial.replace(target)


# -- kernels that work on this machine -------------------------------------------------------------


def amx_use(setup: Setup, prompts: Prompts) -> str:
    """Try llama.cpp's kernels for the matrix units, in a process of their own, which a crash ends.

    Returns:
        "always", "decode" where they work on one row at a time, or "never".
    """
    if _works(setup, prompts):
        return "always"
    one_row = len(prompts) == 1 and _works(setup, [prompts[0][:1]])
    return "decode" if one_row else "never"


def _works(setup: Setup, prompts: Prompts) -> bool:
    process = multiprocessing.get_context("spawn").Process(target=_try, args=(setup, prompts))
    process.start()
    process.join()
    return process.exitcode == 0


def _try(setup: Setup, prompts: Prompts) -> None:
    peer = LlamaCpp()
    peer.load(dataclasses.replace(setup, amx="always"))
    peer.run(prompts, 1)
