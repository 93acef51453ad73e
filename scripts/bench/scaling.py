"""How ours scales: the same cores as several ranks, and more prompts at a time."""

from __future__ import annotations

import contextlib
import dataclasses

from comparison import Job, take_turns
from engines import PEERS
from inference_report import speeds
from peers import Prompts, Running, Setup
from report import Report

from llama.errors import LlamaError

BATCH = 8


def check_scaling(threads: int, world_size: int, n_heads: int) -> None:
    """Whether there is something to compare.

    Raises:
        LlamaError: where one rank has a single thread, or several were asked for.
    """
    if world_size > 1:
        raise LlamaError("--scaling chooses the ranks itself: leave --world_size out")
    if not 2 <= threads <= n_heads:
        raise LlamaError(f"--scaling compares one rank of N threads with N ranks: use --threads 2 to {n_heads}")


def measure_scaling(ours: Setup, prompts: Prompts, new_tokens: int, repeats: int) -> Report:
    """One rank with all threads, as many ranks with a thread each, and one rank with `BATCH` prompts, taking turns.

    The ranks exchange through memory, and once more through gloo.

    Args:
        ours: one rank with all threads.
        prompts: at least `BATCH`.
    """
    n_ranks = ours.threads
    cut = dataclasses.replace(ours, world_size=n_ranks)
    setups = {"one_rank": ours, "ranks": cut, "gloo_ranks": dataclasses.replace(cut, share_memory=False)}
    kinds = dict.fromkeys(setups, PEERS["ours"])
    with contextlib.ExitStack() as stack:
        running = {name: stack.enter_context(Running(name, setup, kinds)) for name, setup in setups.items()}
        jobs = [
            *(Job(name, peer, prompts[:1]) for name, peer in running.items()),
            Job("batch", running["one_rank"], prompts[:BATCH]),
        ]
        timings = take_turns(jobs, new_tokens, repeats)
    measured = {
        job.name: speeds(timings[job.name], sum(map(len, job.prompts)), len(job.prompts) * new_tokens) for job in jobs
    }

    def ratio(name: str) -> dict[str, float]:
        return {
            part: measured[name][part]["tokens_per_second"]["median"]
            / measured["one_rank"][part]["tokens_per_second"]["median"]
            for part in ("prefill", "decode")
        }

    return {
        "dtype": ours.dtype,
        "threads": ours.threads,
        "batch_size": BATCH,
        **measured,
        "ratio": {name: ratio(name) for name in ("ranks", "gloo_ranks", "batch")},
    }


def lines(scaling: Report) -> list[str]:
    """The same for people."""
    threads, ratio = scaling["threads"], scaling["ratio"]

    def line(label: str, name: str, target: float | None = None) -> str:
        speed = scaling[name]["decode"]["tokens_per_second"]["median"]
        over = f"{ratio[name]['decode']:.2f}×" if name in ratio else ""
        aim = "" if target is None else f" (target {target})"
        return f"  {label:44}{speed:>10.2f} tokens/s  {over}{aim}".rstrip()

    return [
        f"decode in {scaling['dtype']} on {threads} threads, as:",
        line("one rank", "one_rank"),
        line(f"{threads} ranks of a thread each", "ranks", 0.8),
        line(f"{threads} ranks of a thread each, over gloo alone", "gloo_ranks"),
        line(f"one rank, batch {scaling['batch_size']}", "batch", 3),
    ]
