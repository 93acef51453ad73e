"""Measurements of `inference.py`: engines in several precisions that take turns, and the scaling of ours."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llama.checkpoint.load import cut_model
from llama.config import ModelArgs
from llama.env import notice
from llama.errors import LlamaError
from llama.kernels.formats import KINDS
from llama.quantization.scheme import Scheme
from scripts.bench import llamacpp
from scripts.bench.engines import PEERS
from scripts.bench.peers import Prompts, Running, Setup, Timing
from scripts.bench.report import Report, spread
from scripts.bench.weights import Weights

PLAIN = ("fp32", "fp16", "bf16")
OTHERS = ("hf", "hf_static", "llamacpp")
# Tokens of a prompt with which llama.cpp's kernels are tried.
TRIED = 64
# Prompts at a time whose speed is measured beside that of one.
SCALING_BATCH = 8


@dataclass(frozen=True)
class InferenceCase:
    """The work of every engine in one run, and the number of runs."""

    prompt_tokens: int
    new_tokens: int
    batch_size: int
    repeats: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "batch_size", "repeats"):
            if getattr(self, name) < 1:
                raise LlamaError(f"{name} must be at least 1, is {getattr(self, name)}")

    @classmethod
    def from_flags(
        cls,
        quick: bool,
        prompt_tokens: int | None,
        new_tokens: int | None,
        repeats: int | None,
        batch_size: int,
        seed: int,
    ) -> InferenceCase:
        """Return the case that the flags ask for, with the usual number for every None."""
        usual = (32, 8, 3) if quick else (512, 32, 5)
        given = (prompt_tokens, new_tokens, repeats)
        n_prompt, n_new, n_repeats = (u if g is None else g for g, u in zip(given, usual, strict=True))
        return cls(n_prompt, n_new, batch_size, n_repeats, seed)

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Return prompts of random token ids, the same for a seed."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(vocab_size, (self.batch_size, self.prompt_tokens), generator=generator).tolist()


# -- engines ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Our engine in some precisions, and the peers beside it.

    Args:
        dtype: to compute in, by its short name.
        precisions: of our weights: dtypes, or int8 and int4.
        others: the peers, of `OTHERS`.
        named: whether precisions were asked for by name; then the names of ours carry them.
        group_size: of int4.
    """

    dtype: str
    precisions: tuple[str, ...]
    others: tuple[str, ...]
    named: bool
    group_size: int

    @classmethod
    def from_flags(
        cls, dtype: str, precisions: str | None, peers: str | None, group_size: int, device: str
    ) -> Comparison:
        """Return the comparison that the flags ask for, with the usual choice for every None.

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
        """Return the scheme of ours, the output layer quantized like the rest; None for a dtype."""
        return None if precision in PLAIN else Scheme.create(precision, self.group_size, output=precision)

    def ours(self, precision: str) -> str:
        """Return the name of ours in this precision."""
        return f"ours_{precision}" if self.named else "ours"

    def check(self, args: ModelArgs, world_size: int, tensor_split: str | None) -> None:
        """Raise a `LlamaError` where the model cannot be cut and quantized so."""
        for precision in self.precisions:
            cut_model(args, self.scheme(precision), world_size, tensor_split)

    def pairs(self) -> list[tuple[str, str, bool]]:
        """Return triples: ours, a peer beside it, and whether both hold the same numbers."""
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
        """Return each engine's setup: ours on its ranks, the others in one process on the same cores or card."""
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
    """Yield llama.cpp's files by type; they are deleted afterwards, unless `keep_dir` keeps them."""
    if "llamacpp" not in comparison.others:
        yield {}
        return
    types = [llamacpp.TYPES[precision] for precision in comparison.precisions]
    with contextlib.ExitStack() as stack:
        folder = keep_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="llama-bench-"))
        yield llamacpp.write_files(weights.ours, Path(folder), types, llamacpp.TYPES[comparison.dtype])


def without_what_crashes(setups: Mapping[str, Setup], prompts: Prompts) -> dict[str, Setup]:
    """Return the setups, llama.cpp's with its kernels for the matrix units only where they do not crash."""
    safe = dict(setups)
    for name, setup in setups.items():
        if name.startswith("llamacpp"):
            use = llamacpp.amx_use(setup, [prompt[:TRIED] for prompt in prompts])
            safe[name] = dataclasses.replace(setup, amx=use)
    return safe


# -- turns -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A peer and its prompts, which take turns with other jobs."""

    name: str
    peer: Running
    prompts: Prompts


def take_turns(
    jobs: Sequence[Job], new_tokens: int, repeats: int, between: Callable[[], None] = lambda: None
) -> dict[str, list[Timing]]:
    """Return the timings of each job by its name; a first round is not counted. Call `between` after each round."""
    timings: dict[str, list[Timing]] = {job.name: [] for job in jobs}
    for number in range(repeats + 1):
        for job in jobs:
            timing = job.peer.run(job.prompts, new_tokens)
            if number:
                timings[job.name].append(timing)
        between()
        notice(f"round {number} of {repeats}" if number else "warmed up")
    return timings


def speeds(timings: Sequence[Timing], n_prompt: int, n_new: int) -> Report:
    """Return the speeds of some runs, each of which prefills `n_prompt` tokens and decodes `n_new`."""
    return {
        "prefill": _speed([timing.prefill_seconds for timing in timings], n_prompt),
        "decode": _speed([timing.decode_seconds for timing in timings], n_new),
    }


def _speed(seconds: Sequence[float], n_tokens: int) -> Report:
    # A difference of two times can come out at or below zero where both are tiny.
    rates = [n_tokens / max(one, 1e-9) for one in seconds]
    return {"tokens_per_second": spread(rates), "seconds": list(seconds)}


def median_speed(measured: Report, part: str) -> float:
    """Return the median tokens a second of "prefill" or "decode"."""
    return float(measured[part]["tokens_per_second"]["median"])


# -- scaling ---------------------------------------------------------------------------------------


def check_scaling(threads: int, world_size: int, n_heads: int) -> None:
    """Check that there is something to compare.

    Raises:
        LlamaError: where one rank has a single thread, or several ranks were asked for.
    """
    if world_size > 1:
        raise LlamaError("--scaling chooses the ranks itself: leave --world_size out")
    if not 2 <= threads <= n_heads:
        raise LlamaError(f"--scaling compares one rank of N threads with N ranks: use --threads 2 to {n_heads}")


def measure_scaling(ours: Setup, prompts: Prompts, new_tokens: int, repeats: int) -> Report:
    """Measure one rank with all threads, as many ranks with a thread each, and one rank with a batch, taking turns.

    The ranks exchange through memory, and once more through gloo.

    Args:
        ours: one rank with all threads.
        prompts: at least `SCALING_BATCH`.
    """
    n_ranks = ours.threads
    cut = dataclasses.replace(ours, world_size=n_ranks)
    setups = {"one_rank": ours, "ranks": cut, "gloo_ranks": dataclasses.replace(cut, share_memory=False)}
    kinds = dict.fromkeys(setups, PEERS["ours"])
    with contextlib.ExitStack() as stack:
        running = {name: stack.enter_context(Running(name, setup, kinds)) for name, setup in setups.items()}
        jobs = [
            *(Job(name, peer, prompts[:1]) for name, peer in running.items()),
            Job("batch", running["one_rank"], prompts[:SCALING_BATCH]),
        ]
        timings = take_turns(jobs, new_tokens, repeats)
    measured = {
        job.name: speeds(timings[job.name], sum(map(len, job.prompts)), len(job.prompts) * new_tokens) for job in jobs
    }

    def ratio(name: str) -> dict[str, float]:
        return {
            part: median_speed(measured[name], part) / median_speed(measured["one_rank"], part)
            for part in ("prefill", "decode")
        }

    return {
        "dtype": ours.dtype,
        "threads": ours.threads,
        "batch_size": SCALING_BATCH,
        **measured,
        "ratio": {name: ratio(name) for name in ("ranks", "gloo_ranks", "batch")},
    }
