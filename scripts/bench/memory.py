"""Counts of the memory that a rank of a 7B model takes: weights, cache and activations, one rank at a time.

    python scripts/bench/memory.py --quick                                    # a toy model, under a minute
    python scripts/bench/memory.py --output_json memory.json --chart memory.png

The engine runs a full batch through prefill and one decode step, as one rank of several over torch's fake process
group, and torch's profiler tells of every allocation. No weights are read: their values do not change what a rank
holds. Ranks whose shards have the same sizes are counted once. A GB is 1e9 bytes.

`memory_report.py` documents the JSON file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from llama import env
from llama.checkpoint.load import cut_model
from llama.checkpoint.table import n_unique_params, rank_params
from llama.cli import run
from llama.config import ModelArgs
from llama.device import set_threads
from llama.env import notice
from llama.errors import LlamaError
from llama.generation.engine import Engine, Request
from llama.generation.sampling import Sampling
from llama.generation.tasks import check_writable
from llama.kernels import products
from llama.kernels.products import enable
from llama.model import Transformer
from llama.parallel.groups import Ranks
from llama.parallel.partition import FFN_BLOCK, Partition
from llama.plan.advice import Planner
from llama.plan.inference import Workload
from llama.plan.memory import Memory
from llama.plan.needs import Proposal
from llama.quantization.scheme import Scheme
from llama.sizes import GB
from scripts.bench.counters import alone, empty_shard, held_bytes, peaks
from scripts.bench.memory_report import draw, table
from scripts.bench.report import Report, beginning, write_report
from scripts.bench.weights import DTYPE, model_args


@dataclass(frozen=True)
class MemoryCase:
    """A run whose ranks are counted.

    Args:
        world_size, batch_size: ranks, and sequences at a time.
        precision: "bf16", "int8" or "int4", of the weights.
        limit: bytes that a rank should stay within.
        ancestor: bytes that a rank of the original fork was said to take.
    """

    world_size: int
    batch_size: int
    precision: str
    limit: float | None = None
    ancestor: float | None = None

    def scheme(self, group_size: int) -> Scheme | None:
        """Return the scheme of the weights; None for bf16."""
        return None if self.precision == "bf16" else Scheme.create(self.precision, group_size)


CASES = (
    MemoryCase(4, 32, "bf16", 6.0 * GB, 7 * GB),
    MemoryCase(4, 32, "int4", 3.6 * GB, 7 * GB),
    MemoryCase(2, 8, "bf16", 8.3 * GB, 9 * GB),
)
QUICK = (MemoryCase(2, 4, "bf16"), MemoryCase(2, 4, "int4"), MemoryCase(3, 2, "bf16"))


@dataclass(frozen=True)
class Counted:
    """Bytes that one rank held; those of prefill and decode come on top of weights and cache."""

    rank: int
    weights: int
    cache: int
    prefill: int
    decode: int

    @property
    def total(self) -> int:
        """The most bytes at a time."""
        return self.weights + self.cache + max(self.prefill, self.decode)


def count(partition: Partition, rank: int, case: MemoryCase, tokens: int, scheme: Scheme | None) -> Counted:
    """Run one rank of `case` and count the bytes that it holds."""
    args, size = partition.args, case.batch_size
    with alone(rank, case.world_size) as ranks:
        model = empty_shard(partition, ranks, DTYPE, scheme)
        # A first token from the prefill and one from a decode step.
        requests = [Request(index, [1] * (tokens - 2), 2, Sampling(temperature=0)) for index in range(size)]
        events = Engine(model, args.vocab_size).run(requests, size)
        prefill, decode = peaks(lambda: consume(events, size), lambda: consume(events, size))
        cache = model.new_cache(size, tokens).nbytes
        return Counted(rank, held_bytes(model), cache, prefill - cache, decode - cache)


def consume(events: Iterator[Any], number: int) -> None:
    """Let a run go on until `number` events have come."""
    for _ in islice(events, number):
        pass


def distinct_ranks(partition: Partition) -> list[int]:
    """Return the first rank of each size of shard."""
    sizes: dict[tuple[int, ...], int] = {}
    for rank in range(partition.world_size):
        cuts = (partition.heads, partition.kv_heads, partition.ffn, partition.vocab)
        sizes.setdefault(tuple(len(cut[rank]) for cut in cuts), rank)
    return list(sizes.values())


def planned_bytes(args: ModelArgs, case: MemoryCase, tokens: int, scheme: Scheme | None) -> int:
    """Return the bytes that the plan expects on the fullest rank."""
    planner = Planner(args, "cpu", Memory(("a rank",), (0,), grows=True))
    plan = planner.plan(Proposal(case.world_size, Workload(case.batch_size, tokens), DTYPE, scheme=scheme))
    return max(rank.total() for rank in plan.ranks)


def count_case(args: ModelArgs, case: MemoryCase, tokens: int, group_size: int) -> Report:
    """Return an entry of the report's `cases`."""
    notice(f"counting {case.world_size} ranks, batch {case.batch_size}, {case.precision}")
    set_threads(max(1, set_threads() // case.world_size))  # as many as a rank of this machine has
    scheme = case.scheme(group_size)
    partition = cut_model(args, scheme, case.world_size)
    if products.worth_building(rank_params(partition, 0) * DTYPE.itemsize):
        enable()
    ranks = [count(partition, rank, case, tokens, scheme) for rank in distinct_ranks(partition)]
    return {
        "world_size": case.world_size,
        "batch_size": case.batch_size,
        "precision": case.precision,
        "limit_bytes": case.limit,
        "ancestor_bytes": case.ancestor,
        "planned_bytes": planned_bytes(args, case, tokens, scheme),
        "ranks": [dataclasses.asdict(rank) | {"total": rank.total} for rank in ranks],
    }


# -- unequal ranks ---------------------------------------------------------------------------------


def split_report(args: ModelArgs, tensor_split: str, batch_size: int, tokens: int) -> Report:
    """Compare the bytes of unequal ranks with their shares, to one unit of the partition, without allocating any."""
    partition = Partition.create(args, len(tensor_split.split(",")), tensor_split)
    n_ranks = partition.world_size
    models = [Transformer(args, partition, Ranks(rank, n_ranks), device="meta", dtype=DTYPE) for rank in range(n_ranks)]
    held = [sum(p.nbytes for p in model.parameters()) + model.new_cache(batch_size, tokens).nbytes for model in models]
    whole = (2 * args.n_layers + 1) * args.dim * DTYPE.itemsize  # the norms, which every rank has
    own = [nbytes - whole for nbytes in held]
    shares = [nbytes / sum(own) for nbytes in own]
    misfit = max(abs(share - wanted) for share, wanted in zip(shares, partition.weights, strict=True)) * sum(own)
    group = 2 * args.head_dim * ((args.group_size + 1) * args.dim + batch_size * tokens)
    block = 3 * FFN_BLOCK * args.dim
    return {
        "tensor_split": tensor_split,
        "batch_size": batch_size,
        "precision": "bf16",
        "ranks": held,
        "shares": shares,
        "wanted": list(partition.weights),
        "unit_bytes": max(group, block) * args.n_layers * DTYPE.itemsize,
        "misfit_bytes": round(misfit),
    }


def main(
    geometry: str | None = None,
    tokens: int | None = None,
    tensor_split: str = "3,1",
    group_size: int = 32,
    output_json: str | None = None,
    chart: str | None = None,
    quick: bool = False,
) -> None:
    """Count the memory that a rank takes while a model runs.

    Args:
        geometry: a published geometry, llama-2-7b by default, or tiny.
        tokens: of a sequence, prompt and completion together; 512, or 32 with --quick.
        tensor_split: weights of unequal ranks, with which their shares of the memory are compared.
        group_size: of int4.
        output_json: write everything counted to this file.
        chart: draw the counts into this PNG.
        quick: a toy model, to see that everything works.
    """
    if env.world_size() > 1:
        raise LlamaError("start this without torchrun: it counts one rank after another")
    tokens = (32 if quick else 512) if tokens is None else tokens
    if tokens < 3:
        raise LlamaError(f"tokens must be at least 3 (a prompt and two new ones), is {tokens}")
    for path in (output_json, chart):
        check_writable(path)
    geometry = geometry or ("tiny" if quick else "llama-2-7b")
    args, cases = model_args(geometry), QUICK if quick else CASES
    for case in cases:  # raises before anything is counted
        cut_model(args, case.scheme(group_size), case.world_size)
    split = split_report(args, tensor_split, cases[-1].batch_size, tokens)
    report = {
        **beginning(torch.device("cpu")),
        "model": {"name": geometry, "n_params": n_unique_params(args), "args": dataclasses.asdict(args)},
        "settings": {"tokens": tokens, "group_size": group_size},
        "cases": [count_case(args, case, tokens, group_size) for case in cases],
        "split": split,
    }
    write_report(report, table(report), output_json, chart, draw)


if __name__ == "__main__":
    run(main)
