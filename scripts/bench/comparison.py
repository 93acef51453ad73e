"""Which engines `inference.py` compares, in which precisions, and how they are started and timed."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import llamacpp
from peers import Prompts, Running, Setup, Timing
from weights import Weights

from llama.checkpoint.load import cut_model
from llama.config import ModelArgs
from llama.env import notice
from llama.errors import LlamaError
from llama.kernels.formats import KINDS
from llama.quantization.scheme import Scheme

PLAIN = ("fp32", "fp16", "bf16")
OTHERS = ("hf", "hf_static", "llamacpp")
# Tokens of a prompt with which llama.cpp's kernels are tried.
TRIED = 64


@dataclass(frozen=True)
class Comparison:
    """What is compared with what.

    Args:
        dtype: to compute in, by its short name.
        precisions: of our weights: dtypes, or int8 and int4.
        others: the peers, of `OTHERS`.
        named: whether precisions were asked for by name; then ours is called after its own.
        group_size: of int4.
    """

    dtype: str
    precisions: tuple[str, ...]
    others: tuple[str, ...]
    named: bool
    group_size: int

    @classmethod
    def settle(cls, dtype: str, precisions: str | None, peers: str | None, group_size: int, device: str) -> Comparison:
        """From what a person says; None for what is usual.

        Raises:
            LlamaError: for a word that is not known, or a peer that is not there.
        """
        words = _words("precisions", precisions, (*PLAIN, *KINDS)) or (dtype,)
        dtype = dtype if precisions is None else next((word for word in words if word in PLAIN), dtype)
        others = _words("peers", peers, OTHERS)
        if others is None:
            others = ("hf",) if precisions is None or device != "cpu" else ("hf", "llamacpp")
            if "llamacpp" in others and not llamacpp.available():
                notice("not compared with llama.cpp: pip install -e '.[gguf,llamacpp]'")
                others = ("hf",)
        if "llamacpp" in others and device != "cpu":
            raise LlamaError("llama.cpp runs on the CPU here: leave it out of --peers, or use --device cpu")
        if "llamacpp" in others and not llamacpp.available():
            raise LlamaError("the peer llamacpp needs llama-cpp-python and gguf: pip install -e '.[gguf,llamacpp]'")
        return cls(dtype, words, others, precisions is not None, group_size)

    def scheme(self, precision: str) -> Scheme | None:
        """How ours is quantized, its output layer as the rest; None for a dtype."""
        return None if precision in PLAIN else Scheme.create(precision, self.group_size, output=precision)

    def ours(self, precision: str) -> str:
        """The name of ours in this precision."""
        return f"ours_{precision}" if self.named else "ours"

    def check(self, args: ModelArgs, world_size: int, tensor_split: str | None) -> None:
        """Whether the model can be cut and quantized so; raises a `LlamaError` where it cannot."""
        for precision in self.precisions:
            cut_model(args, self.scheme(precision), world_size, tensor_split)

    def pairs(self) -> list[tuple[str, str, bool]]:
        """Ours, a peer that it is compared with, and whether both hold the same numbers."""
        found = []
        for precision in self.precisions:
            ours = self.ours(precision)
            for other in self.others:
                if other == "llamacpp":
                    found.append((ours, f"llamacpp_{llamacpp.TYPES[precision]}", precision in PLAIN))
                else:
                    found.append((ours, other, precision == self.dtype))
        return found

    def setups(self, ours: Setup, weights: Weights, files: Mapping[str, Path]) -> dict[str, Setup]:
        """How each engine is started: ours on its ranks, the others in one process on the same cores or card."""
        setups = {}
        for precision in self.precisions:
            dtype = precision if precision in PLAIN else self.dtype
            setups[self.ours(precision)] = dataclasses.replace(
                ours, folder=weights.ours, dtype=dtype, scheme=self.scheme(precision)
            )
        alone = dataclasses.replace(ours, folder=weights.hf, world_size=1, tensor_split=None)
        setups |= {name: alone for name in self.others if name != "llamacpp"}
        for precision in self.precisions if "llamacpp" in self.others else ():
            file = files[llamacpp.TYPES[precision]]
            setups[f"llamacpp_{llamacpp.TYPES[precision]}"] = dataclasses.replace(alone, folder=str(file))
        return setups


def _words(flag: str, text: str | None, known: Sequence[str]) -> tuple[str, ...] | None:
    if text is None:
        return None
    words = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    for word in words:
        if word not in known:
            raise LlamaError(f"--{flag} {word!r} is not one of {', '.join(known)}")
    return words


@contextlib.contextmanager
def gguf_files(comparison: Comparison, weights: Weights, keep_dir: str | None) -> Iterator[dict[str, Path]]:
    """The files that llama.cpp reads, by type; deleted in the end, unless they are kept."""
    if "llamacpp" not in comparison.others:
        yield {}
        return
    types = [llamacpp.TYPES[precision] for precision in comparison.precisions]
    with contextlib.ExitStack() as stack:
        folder = keep_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="llama-bench-"))
        yield llamacpp.write_files(weights.ours, Path(folder), types, llamacpp.TYPES[comparison.dtype])


def without_what_crashes(setups: Mapping[str, Setup], prompts: Prompts) -> dict[str, Setup]:
    """The setups, llama.cpp's with its kernels for the matrix units only where these do not crash."""
    settled = dict(setups)
    for name, setup in setups.items():
        if name.startswith("llamacpp"):
            use = llamacpp.amx_use(setup, [prompt[:TRIED] for prompt in prompts])
            settled[name] = dataclasses.replace(setup, amx=use)
    return settled


@dataclass(frozen=True)
class Job:
    """Something that takes turns with others: a peer and the prompts that it runs."""

    name: str
    peer: Running
    prompts: Prompts


def take_turns(
    jobs: Sequence[Job], new_tokens: int, repeats: int, between: Callable[[], None] = lambda: None
) -> dict[str, list[Timing]]:
    """The timings of each job by its name; a first round is not counted. `between` is called after each round."""
    timings: dict[str, list[Timing]] = {job.name: [] for job in jobs}
    for number in range(repeats + 1):
        for job in jobs:
            timing = job.peer.run(job.prompts, new_tokens)
            if number:
                timings[job.name].append(timing)
        between()
        notice(f"round {number} of {repeats}" if number else "warmed up")
    return timings
