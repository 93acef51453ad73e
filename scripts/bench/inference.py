"""Prefill and decode speed and memory of our engine beside its peers, on the same weights.

    python scripts/bench/inference.py --quick                             # a toy model, under a minute
    python scripts/bench/inference.py --precisions bf16,int8,int4 --scaling --output_json out.json --chart out.png
    python scripts/bench/inference.py --ckpt_dir ckpts/7B --dtype bf16 --world_size 2
    python scripts/bench/inference.py --device cuda --geometry llama-2-7b --precisions bf16,int8,int4 --peers hf_static

The engines run in processes of their own and stay loaded; their runs take turns, one at a time, so that whatever else
the machine does meets all of them. The first run of each is not counted. `inference_report.py` documents the JSON file.

All are measured alike: prefill is the time from the prompts to the first new token of each; decode is the time of the
`new_tokens` after it. For transformers that is `generate` with one new token, and what `new_tokens` more add to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping

import torch

from llama import env
from llama.checkpoint.source import open_checkpoint
from llama.checkpoint.table import n_unique_params
from llama.cli import run
from llama.config import ModelArgs
from llama.device import DTYPES, choose_dtype, set_threads
from llama.errors import LlamaError
from llama.generation.steps import choose_mode
from llama.generation.tasks import check_writable
from llama.plan.words import NAMES
from scripts.bench.comparison import (
    SCALING_BATCH,
    Comparison,
    InferenceCase,
    Job,
    check_scaling,
    gguf_files,
    measure_scaling,
    take_turns,
    without_what_crashes,
)
from scripts.bench.engines import PEERS
from scripts.bench.inference_report import build_report, draw, scaling_lines, table
from scripts.bench.limits import Limits, measure_limits
from scripts.bench.peers import Running, Setup, choose_bench_device
from scripts.bench.report import Report, write_report
from scripts.bench.weights import Weights, model_args, prepared_weights


def announced_model(geometry: str, ckpt_dir: str | None) -> tuple[ModelArgs, torch.dtype]:
    """Return the geometry of the model to run, and the dtype that it is stored in; random weights count as bf16."""
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
        world_size: ranks of our engine; the peers always have one process.
        tensor_split: weights of our ranks, such as 3,1.
        precisions: of our weights, each measured: bf16, int8 and int4 (output layer too), such as bf16,int8,int4.
        group_size: columns that share a scale in int4.
        peers: hf, hf_static (a cache of fixed size, compiled on a card) and llamacpp (on the CPU; bf16, q8_0 and q4_0
            beside our bf16, int8 and int4); by default hf, and with --precisions on a CPU hf,llamacpp.
        compile: auto, on or off, of our engine.
        scaling: measure also one rank beside as many as there are threads, and 8 prompts beside one.
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
    case = InferenceCase.from_flags(quick, prompt_tokens, new_tokens, repeats, batch_size, seed)
    where = choose_bench_device(device)
    args, stored = announced_model(geometry, ckpt_dir)
    compute = NAMES[choose_dtype(dtype, where, stored, n_unique_params(args))]
    comparison = Comparison.from_flags(compute, precisions, peers, group_size, where.type)
    comparison.check(args, world_size, tensor_split)  # raises before anything is written
    compute, n_threads = comparison.dtype, set_threads(threads)
    if scaling:
        check_scaling(n_threads, world_size, args.n_heads)
    ours = Setup("", compute, str(where), n_threads, world_size, tensor_split, compile=compile)
    with contextlib.ExitStack() as stack:
        weights = stack.enter_context(prepared_weights(geometry, ckpt_dir, DTYPES[compute], keep_dir, seed))
        files = stack.enter_context(gguf_files(comparison, weights, keep_dir))
        report = compare(comparison, comparison.setups(ours, weights, files), case, weights, where, quick)
        if scaling:
            prompts = dataclasses.replace(case, batch_size=SCALING_BATCH).prompts(args.vocab_size)
            alone = dataclasses.replace(ours, folder=weights.ours)
            report["scaling"] = measure_scaling(alone, prompts, case.new_tokens, case.repeats)
    scaled = ["", *scaling_lines(report["scaling"])] if scaling else []
    write_report(report, "\n".join([table(report), *scaled]), output_json, chart, draw)


def compare(
    comparison: Comparison,
    setups: Mapping[str, Setup],
    case: InferenceCase,
    weights: Weights,
    where: torch.device,
    quick: bool,
) -> Report:
    """Start all engines, let them take turns, and report; the machine's limits are measured between the rounds."""
    dtype, prompts = DTYPES[comparison.dtype], case.prompts(weights.args.vocab_size)
    found = [measure_limits(where, dtype, quick)]
    with contextlib.ExitStack() as stack:
        setups = without_what_crashes(setups, prompts)
        running = [stack.enter_context(Running(name, setup, PEERS)) for name, setup in setups.items()]
        jobs = [Job(peer.name, peer, prompts) for peer in running]
        timings = take_turns(
            jobs, case.new_tokens, case.repeats, lambda: found.append(measure_limits(where, dtype, quick))
        )
        best = functools.reduce(Limits.better, found)
        return build_report(running, timings, comparison, case, weights, best, where)


if __name__ == "__main__":
    run(main)
