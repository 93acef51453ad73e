"""Prefill and decode speed and memory of our engine beside its peers, on the same weights.

    python scripts/bench/inference.py --quick                             # a toy model, under a minute
    python scripts/bench/inference.py --precisions bf16,int8,int4 --scaling --output_json out.json --chart out.png
    python scripts/bench/inference.py --ckpt_dir ckpts/7B --dtype bf16 --world_size 2
    python scripts/bench/inference.py --device cuda --geometry llama-2-7b --precisions bf16,int8,int4 --peers hf_static

The engines run in processes of their own and stay loaded; their runs take turns, one at a time, so that whatever else
the machine does meets all of them. One run of each is not counted. What the JSON file holds stands in
`inference_report.py`.

Measured alike: prefill is the time from the prompts to the first new token of each; decode is the time of the
`new_tokens` after it. For transformers that is `generate` with one new token, and what `new_tokens` more add to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from comparison import Comparison, Job, gguf_files, take_turns, without_what_crashes
from engines import PEERS
from inference_report import build_report, draw, table
from limits import Limits, measure_limits
from peers import Running, Setup
from report import Report, give_out
from scaling import BATCH, check_scaling, lines, measure_scaling
from weights import Weights, model_args, prepared_weights

from llama import env
from llama.checkpoint.source import open_checkpoint
from llama.checkpoint.table import n_unique_params
from llama.cli import run
from llama.config import ModelArgs
from llama.device import DTYPES, choose_device, choose_dtype, set_threads
from llama.errors import LlamaError
from llama.generation.steps import choose_mode
from llama.generation.tasks import check_writable
from llama.plan.advice import NAMES


@dataclass(frozen=True)
class Workload:
    """What every peer is asked to do, and how often."""

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
    def settle(
        cls,
        quick: bool,
        prompt_tokens: int | None,
        new_tokens: int | None,
        repeats: int | None,
        batch_size: int,
        seed: int,
    ) -> Workload:
        """What was asked for, and the usual numbers for the rest."""
        usual = (32, 8, 3) if quick else (512, 32, 5)
        given = (prompt_tokens, new_tokens, repeats)
        n_prompt, n_new, n_repeats = (u if g is None else g for g, u in zip(given, usual, strict=True))
        return cls(n_prompt, n_new, batch_size, n_repeats, seed)

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Random token ids, the same for a seed."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(vocab_size, (self.batch_size, self.prompt_tokens), generator=generator).tolist()


def bench_device(device: str) -> torch.device:
    """The device of all peers: CUDA where there is a card, else the CPU.

    Raises:
        LlamaError: for a device that is not there, or one whose time and memory are not measured here.
    """
    chosen = choose_device(device)
    if device == "auto" and chosen.type == "mps":
        return torch.device("cpu")
    if chosen.type == "mps":
        raise LlamaError("device 'mps' is not measured: use --device cpu")
    return chosen


def announced(geometry: str, ckpt_dir: str | None) -> tuple[ModelArgs, torch.dtype]:
    """The model that is going to run and what it is stored in; random weights count as bf16."""
    if ckpt_dir is None:
        return model_args(geometry), torch.bfloat16
    checkpoint = open_checkpoint(ckpt_dir)
    return checkpoint.args, checkpoint.dtype


def main(
    geometry: str | None = None,
    ckpt_dir: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    batch_size: int = 1,
    repeats: int | None = None,
    world_size: int = 1,
    tensor_split: str | None = None,
    precisions: str | None = None,
    group_size: int = 32,
    peers: str | None = None,
    compile: str = "auto",
    scaling: bool = False,
    seed: int = 1,
    output_json: str | None = None,
    chart: str | None = None,
    keep_dir: str | None = None,
    quick: bool = False,
) -> None:
    """Measure our engine beside Hugging Face generate and llama.cpp on the same weights.

    Args:
        geometry: random weights of a published geometry, such as llama-3.2-1b (the default) or llama-2-7b, or tiny.
        ckpt_dir: a checkpoint in place of random weights, in any layout.
        dtype: auto, fp32, bf16 or fp16, for all that is not quantized.
        device: auto, cpu or cuda, for all.
        threads: CPU threads of each peer, shared by its ranks; by default all cores.
        prompt_tokens: length of each prompt; 512, or 32 with --quick.
        new_tokens: tokens decoded after the first; 32, or 8 with --quick.
        batch_size: prompts at a time.
        repeats: counted runs of each peer; 5, or 3 with --quick.
        world_size: ranks of ours; the peers always have one process.
        tensor_split: weights of our ranks, such as 3,1.
        precisions: of our weights, each measured: bf16, int8 and int4 (output layer too), such as bf16,int8,int4.
        group_size: columns that share a scale in int4.
        peers: hf, hf_static (a cache of fixed size, compiled on a card) and llamacpp (on the CPU; bf16, q8_0 and q4_0
            beside our bf16, int8 and int4); by default hf, and with --precisions on a CPU hf,llamacpp.
        compile: auto, on or off, of ours.
        scaling: measure too one rank beside as many as there are threads, and 8 prompts beside one.
        seed: of random weights and prompts.
        output_json: write everything measured to this file.
        chart: draw the speeds into this PNG.
        keep_dir: keep the weights that are written in this folder, or use those of an earlier run.
        quick: a toy model and small numbers, to see that everything works.
    """
    if env.world_size() > 1:
        raise LlamaError("start this without torchrun: --world_size says how many ranks ours runs on")
    if geometry is not None and ckpt_dir is not None:
        raise LlamaError("--geometry and --ckpt_dir are given together: choose one")
    if threads is not None and threads < 1:
        raise LlamaError(f"threads must be at least 1, is {threads}")
    choose_mode(compile)
    for path in (output_json, chart):
        check_writable(path)
    geometry = geometry or ("tiny" if quick else "llama-3.2-1b")
    work = Workload.settle(quick, prompt_tokens, new_tokens, repeats, batch_size, seed)
    where = bench_device(device)
    args, stored = announced(geometry, ckpt_dir)
    compute = NAMES[choose_dtype(dtype, where, stored, n_unique_params(args))]
    comparison = Comparison.settle(compute, precisions, peers, group_size, where.type)
    comparison.check(args, world_size, tensor_split)  # raises before anything is written
    compute, n_threads = comparison.dtype, set_threads(threads)
    if scaling:
        check_scaling(n_threads, world_size, args.n_heads)
    ours = Setup("", compute, str(where), n_threads, world_size, tensor_split, compile=compile)
    with contextlib.ExitStack() as stack:
        weights = stack.enter_context(prepared_weights(geometry, ckpt_dir, DTYPES[compute], keep_dir, seed))
        files = stack.enter_context(gguf_files(comparison, weights, keep_dir))
        report = compare(comparison, comparison.setups(ours, weights, files), work, weights, where, quick)
        if scaling:
            prompts = dataclasses.replace(work, batch_size=BATCH).prompts(args.vocab_size)
            alone = dataclasses.replace(ours, folder=weights.ours)
            report["scaling"] = measure_scaling(alone, prompts, work.new_tokens, work.repeats)
    scaled = ["", *lines(report["scaling"])] if scaling else []
    give_out(report, "\n".join([table(report), *scaled]), output_json, chart, draw)


def compare(
    comparison: Comparison,
    setups: Mapping[str, Setup],
    work: Workload,
    weights: Weights,
    where: torch.device,
    quick: bool,
) -> Report:
    """Start all engines, let them take turns, and report; what the machine can do is measured between the rounds."""
    dtype, prompts = DTYPES[comparison.dtype], work.prompts(weights.args.vocab_size)
    found = [measure_limits(where, dtype, quick)]
    with contextlib.ExitStack() as stack:
        setups = without_what_crashes(setups, prompts)
        running = [stack.enter_context(Running(name, setup, PEERS)) for name, setup in setups.items()]
        jobs = [Job(peer.name, peer, prompts) for peer in running]
        timings = take_turns(
            jobs, work.new_tokens, work.repeats, lambda: found.append(measure_limits(where, dtype, quick))
        )
        best = functools.reduce(Limits.better, found)
        return build_report(running, timings, comparison, work, weights, best, where)


if __name__ == "__main__":
    run(main)
