"""Prefill and decode speed and memory of our engine beside Hugging Face `generate`, on the same weights.

    python scripts/bench/inference.py --quick                             # a toy model, under a minute
    python scripts/bench/inference.py --geometry llama-3.2-1b --output_json out.json
    python scripts/bench/inference.py --ckpt_dir ckpts/7B --dtype bf16 --world_size 2

Both engines run in processes of their own and stay loaded; their runs take turns, so that whatever else the machine
does meets both. One run of each is not counted. What the JSON file holds stands in `report.py`.

Measured alike: prefill is the time from the prompts to the first new token of each; decode is the time of the
`new_tokens` after it. For transformers that is `generate` with one new token, and what `new_tokens` more add to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peers import PEERS, Running, Setup, Timing
from report import Report, equal_tokens, machine, now, peer_report, ratios, table, write_json
from weights import Weights, model_args, prepared_weights

from llama import env
from llama.checkpoint.hf_weights import checkpoint_rows
from llama.checkpoint.source import open_checkpoint
from llama.cli import run
from llama.config import ModelArgs
from llama.console import notice
from llama.device import choose_device, choose_dtype, set_threads
from llama.errors import LlamaError
from llama.generation.tasks import check_writable
from llama.geometries import geometry as published_geometry
from llama.parallel.partition import Partition

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


def measure(peers: list[Running], work: Workload, prompts: list[list[int]]) -> dict[str, list[Timing]]:
    """The timings of each peer, their runs taking turns; a first round is not counted."""
    timings: dict[str, list[Timing]] = {peer.name: [] for peer in peers}
    for round_number in range(work.repeats + 1):
        for peer in peers:
            timing = peer.run(prompts, work.new_tokens)
            if round_number:
                timings[peer.name].append(timing)
        notice(f"round {round_number} of {work.repeats}" if round_number else "warmed up")
    return timings


def build_report(
    peers: list[Running], timings: dict[str, list[Timing]], work: Workload, weights: Weights, device: torch.device
) -> Report:
    """What `report.py` documents, from what was measured; peers still run."""
    ours, n_tokens = peers[0].setup, work.batch_size
    measured = {
        peer.name: peer_report(peer, timings[peer.name], n_tokens * work.prompt_tokens, n_tokens * work.new_tokens)
        for peer in peers
    }
    tokens = {name: runs[-1].tokens for name, runs in timings.items()}
    agreeing = {name: equal_tokens(tokens["ours"], found) for name, found in tokens.items() if name != "ours"}
    settings = {key: getattr(ours, key) for key in ("dtype", "device", "threads", "world_size", "tensor_split")}
    return {
        "date": now(),
        "command": ["python", *sys.argv],
        "machine": machine(device),
        "model": {
            "name": weights.name,
            "n_params": weights.args.n_unique_params,
            "args": dataclasses.asdict(weights.args),
            "layout": weights.layout,
            "read_by": weights.read_by,
        },
        "settings": settings | dataclasses.asdict(work),
        "peers": measured,
        "ratio": ratios(measured),
        "same_tokens": all(count == work.new_tokens + 1 for count in agreeing.values()),
        "equal_tokens": agreeing,
    }


def setups(ours: Setup, weights: Weights) -> dict[str, Setup]:
    """How each peer is started: ours on its ranks, the others in one process on the same cores or card."""
    others = dataclasses.replace(ours, world_size=1, tensor_split=None)
    return {
        name: dataclasses.replace(ours if name == "ours" else others, folder=folder)
        for name, folder in weights.folders.items()
    }


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
    seed: int = 1,
    output_json: str | None = None,
    keep_dir: str | None = None,
    quick: bool = False,
) -> None:
    """Measure our engine beside Hugging Face generate on the same weights.

    Args:
        geometry: random weights of a published geometry, such as llama-3.2-1b (the default) or llama-2-7b, or tiny.
        ckpt_dir: a checkpoint in place of random weights, in any layout.
        dtype: auto, fp32, bf16 or fp16, for both.
        device: auto, cpu or cuda, for both.
        threads: CPU threads of each peer, shared by its ranks; by default all cores.
        prompt_tokens: length of each prompt; 512, or 32 with --quick.
        new_tokens: tokens decoded after the first; 32, or 8 with --quick.
        batch_size: prompts at a time.
        repeats: counted runs of each peer; 5, or 3 with --quick.
        world_size: ranks of ours; the peer always has one process.
        tensor_split: weights of our ranks, such as 3,1.
        seed: of random weights and prompts.
        output_json: write everything measured to this file.
        keep_dir: keep the weights that are written in this folder, or use those of an earlier run.
        quick: a toy model and small numbers, to see that everything works.
    """
    if env.world_size() > 1:
        raise LlamaError("start this without torchrun: --world_size says how many ranks ours runs on")
    if geometry is not None and ckpt_dir is not None:
        raise LlamaError("--geometry and --ckpt_dir are given together: choose one")
    if threads is not None and threads < 1:
        raise LlamaError(f"threads must be at least 1, is {threads}")
    check_writable(output_json)
    geometry = geometry or ("tiny" if quick else "llama-3.2-1b")
    work = Workload.settle(quick, prompt_tokens, new_tokens, repeats, batch_size, seed)
    where = bench_device(device)
    args, stored = announced(geometry, ckpt_dir)
    Partition.create(args, world_size, tensor_split)  # raises before anything is written
    compute = choose_dtype(dtype, where, stored, args.n_unique_params)
    ours = Setup("", NAMES[compute], str(where), set_threads(threads), world_size, tensor_split)
    with prepared_weights(geometry, ckpt_dir, compute, keep_dir, seed) as weights, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Running(name, setup)) for name, setup in setups(ours, weights).items()]
        timings = measure(peers, work, work.prompts(args.vocab_size))
        report = build_report(peers, timings, work, weights, where)
    print(table(report))
    if output_json is not None:
        write_json(output_json, report)


if __name__ == "__main__":
    run(main)
