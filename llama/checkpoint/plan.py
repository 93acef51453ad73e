"""Whether a model fits before anything is loaded: what each rank needs, what is there, and what would fit.

A `Plan` is made of `Item`s a rank, so that what training or quantization add or change is another item
or another size. Weights, cache and what is trained are exact; activations are those of
`llama.checkpoint.activations` and `llama.checkpoint.training`.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from llama.checkpoint.activations import Workload, activation_bytes
from llama.checkpoint.memory import Memory, Pool
from llama.checkpoint.training import Training, training_bytes
from llama.checkpoint.widening import Kernels
from llama.config import ModelArgs
from llama.errors import PartitionError
from llama.parallel.partition import Partition

GB = 1e9
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# What must be held whatever is run; activations depend on how full the run is.
LASTING = ("weights", "KV cache")
PASSING = ("activations", "temporaries")
SHORTEST = 16
# Memories that differ by less than this are alike: cards of one make are never equal to the byte.
ALIKE = 0.05


@dataclass(frozen=True)
class Item:
    """One thing that takes memory on a rank, in bytes."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class RankPlan:
    """All that one rank needs."""

    rank: int
    items: tuple[Item, ...]

    def total(self, names: Sequence[str] | None = None) -> int:
        """Bytes of the items of these names; None for all."""
        return sum(item.nbytes for item in self.items if names is None or item.name in names)


@dataclass(frozen=True)
class Setting:
    """What may be chosen for a run.

    Args:
        n_ranks: ranks of the model.
        work: prompts at a time and tokens of each, or what is trained on.
        dtype: of weights, cache and stream.
        tensor_split: weights of the ranks, as a person writes them; None for equal shards.
    """

    n_ranks: int
    work: Workload
    dtype: torch.dtype
    tensor_split: str | None = None


@dataclass(frozen=True)
class Plan:
    """What the ranks need beside what is there."""

    setting: Setting
    ranks: tuple[RankPlan, ...]
    pools: tuple[Pool, ...]

    def excess(self, pool: Pool, names: Sequence[str] | None = None) -> int:
        """Bytes that the ranks of a pool need beyond what it has; below zero where there is room."""
        return sum(self.ranks[rank].total(names) for rank in pool.ranks) - pool.nbytes

    def fits(self, names: Sequence[str] | None = None) -> bool:
        """Whether the items of these names (None: all) fit into every pool."""
        return all(self.excess(pool, names) <= 0 for pool in self.pools)

    def worst(self, names: Sequence[str] | None = None) -> Pool:
        """The pool that lacks most, or has least to spare."""
        return max(self.pools, key=lambda pool: self.excess(pool, names))


# A setting that fits, made from one that may not; None when there is none.
Settle = Callable[[Setting], Setting | None]


@dataclass(frozen=True)
class Planner:
    """Makes plans for one model on one kind of machine.

    Args:
        args: the geometry.
        device: "cpu", "cuda" or "mps".
        memory: what is there.
    """

    args: ModelArgs
    device: str
    memory: Memory

    def plan(self, setting: Setting) -> Plan:
        """What `setting` needs on every rank.

        Raises:
            PartitionError: when the model cannot be cut so.
        """
        partition = Partition.create(self.args, setting.n_ranks, setting.tensor_split)
        pools = tuple(self.memory.pools(setting.n_ranks))
        kernels = self._kernels(setting)
        ranks = tuple(RankPlan(rank, _items(partition, rank, setting, kernels)) for rank in range(setting.n_ranks))
        return Plan(setting, ranks, pools)

    def _kernels(self, setting: Setting) -> Kernels:
        threads = max(1, _cores() // setting.n_ranks) if self.device == "cpu" else 0
        # Cards have fused kernels of their own for grouped heads in 16 bit only.
        grouped = self.args.group_size > 1 and self.device != "cpu"
        return Kernels(setting.dtype.itemsize, threads, fused=not (grouped and setting.dtype.itemsize >= 4))

    def advise(self, setting: Setting) -> list[Setting]:
        """Settings near this one that fit, each of them planned: one of each kind that helps."""
        found = self._ways(setting)
        if not found:
            found = self._ways(_working(setting, n_prompts=1))
        return list(dict.fromkeys(found))

    def _ways(self, setting: Setting) -> list[Setting]:
        split = self._by_split(setting)
        # Where a split alone helps, the other ways are those without one.
        settle = self._settled if split is None else lambda other: other if self._fits(other) else None
        ways = (self._by_dtype, self._by_ranks, self._by_checkpointing, self._by_batch, self._by_length)
        return [better for better in (split, *(way(setting, settle) for way in ways)) if better is not None]

    def _fits(self, setting: Setting) -> bool:
        try:
            return self.plan(setting).fits()
        except PartitionError:
            return False

    def _settled(self, setting: Setting) -> Setting | None:
        """The setting if it fits, else with a split in proportion to the memories if that does."""
        if self._fits(setting):
            return setting
        return self._by_split(setting)

    def _by_split(self, setting: Setting) -> Setting | None:
        """Shards in proportion to the memories, or to what activations leave of them."""
        try:
            equal = self.plan(dataclasses.replace(setting, tensor_split=None))
        except PartitionError:
            return None
        if any(len(pool.ranks) > 1 for pool in equal.pools):
            return None
        rooms = {pool.ranks[0]: pool.nbytes for pool in equal.pools}
        if setting.tensor_split is not None and equal.fits():
            return equal.setting
        sizes = [float(rooms[rank]) for rank in range(setting.n_ranks)]
        if max(sizes) <= (1 + ALIKE) * min(sizes):
            return None
        left = [size - rank.total(PASSING) for size, rank in zip(sizes, equal.ranks, strict=True)]
        for weights in (sizes, left):
            better = dataclasses.replace(setting, tensor_split=_proportion(weights))
            if min(weights) > 0 and self._fits(better):
                return better
        return None

    def _by_dtype(self, setting: Setting, settle: Settle) -> Setting | None:
        if setting.dtype != torch.float32:
            return None
        trains = isinstance(setting.work, Training)
        narrow = torch.bfloat16 if trains or self.device == "cpu" else torch.float16
        return settle(dataclasses.replace(setting, dtype=narrow))

    def _by_ranks(self, setting: Setting, settle: Settle) -> Setting | None:
        """The fewest further ranks; they help only where they bring memory along."""
        itemsize = setting.dtype.itemsize
        most = self.args.n_heads if self.memory.grows else len(self.memory.sizes)
        for n_ranks in range(setting.n_ranks + 1, min(most, self.args.n_heads) + 1):
            # Cutting a large model in many ways takes seconds: not where even all memory together is too little.
            if sum(pool.nbytes for pool in self.memory.pools(n_ranks)) < self.args.n_unique_params * itemsize:
                continue
            better = settle(dataclasses.replace(setting, n_ranks=n_ranks, tensor_split=None))
            if better is not None:
                return better
        return None

    def _by_checkpointing(self, setting: Setting, settle: Settle) -> Setting | None:
        if not isinstance(setting.work, Training) or setting.work.checkpointing:
            return None
        saving = _working(setting, checkpointing=True)
        return settle(saving) or self._by_batch(saving, settle)

    def _by_batch(self, setting: Setting, settle: Settle) -> Setting | None:
        return self._largest(lambda n: _working(setting, n_prompts=n), settle, setting.work.n_prompts)

    def _by_length(self, setting: Setting, settle: Settle) -> Setting | None:
        high = -(-setting.work.length // SHORTEST)
        return self._largest(lambda n: _working(setting, length=SHORTEST * n), settle, high)

    def _largest(self, at: Callable[[int], Setting], settle: Settle, high: int) -> Setting | None:
        """The setting of the largest number below `high` that fits, by halving the range."""
        low, best = 1, None
        while low < high:
            middle = (low + high) // 2
            better = settle(at(middle))
            if better is None:
                high = middle
            else:
                best, low = better, middle + 1
        return best


def _items(partition: Partition, rank: int, setting: Setting, kernels: Kernels) -> tuple[Item, ...]:
    args, work, itemsize = partition.args, setting.work, setting.dtype.itemsize
    weights = Item("weights", partition.rank_params(rank) * itemsize)
    if isinstance(work, Training):
        step = training_bytes(partition, rank, work, kernels)
        names = ("trained state", *PASSING)
        return weights, *map(Item, names, (step.trained, step.kept, step.temporaries))
    # A soft prompt is held once for all requests, and again at the start of each slot.
    entries = 2 * args.n_layers * (work.n_prompts * (work.prefix + work.length) + work.prefix)
    cache_bytes = entries * len(partition.kv_rows[rank]) * itemsize
    return (
        weights,
        Item("KV cache", cache_bytes),
        Item("activations", activation_bytes(partition, rank, work, kernels)),
    )


def _working(setting: Setting, **other: Any) -> Setting:
    """The setting with some of its work's fields changed."""
    return dataclasses.replace(setting, work=dataclasses.replace(setting.work, **other))


@cache
def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _proportion(sizes: Sequence[float]) -> str:
    """Sizes as a tensor split, the smallest 1: `1,1,3,3`."""
    return ",".join(f"{size / min(sizes):.3g}" for size in sizes) if min(sizes) > 0 else ""


# -- words -----------------------------------------------------------------------------------------


def show_bytes(nbytes: float) -> str:
    """`13.48 GB` (1e9 bytes each), or MB below a tenth of one."""
    return f"{nbytes / GB:.2f} GB" if abs(nbytes) >= GB / 10 else f"{nbytes / 1e6:.2f} MB"


def table(plan: Plan) -> str:
    """One line a rank: its items, their sum, the memory there, and whether it fits."""
    names = [item.name for item in plan.ranks[0].items]
    rows = [["", *names, "total", "memory", ""]]
    for rank in plan.ranks:
        pool = min((pool for pool in plan.pools if rank.rank in pool.ranks), key=lambda pool: -plan.excess(pool))
        shared = f" for {len(pool.ranks)} ranks" if len(pool.ranks) > 1 else ""
        excess = plan.excess(pool)
        verdict = "fits" if excess <= 0 else f"lacks {show_bytes(excess)}"
        sizes = [show_bytes(item.nbytes) for item in rank.items]
        rows.append([f"rank {rank.rank}", *sizes, show_bytes(rank.total()), show_bytes(pool.nbytes) + shared, verdict])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)) for row in rows]
    return "\n".join(f"{line}  {row[-1]}".rstrip() for line, row in zip(lines, rows, strict=True))


def command(setting: Setting, ckpt_dir: str, dtype: str = "auto", device: str = "auto") -> str:
    """How a person starts `setting`; `dtype` and `device` as the person would write them."""
    start = "python" if setting.n_ranks == 1 else f"torchrun --nproc_per_node {setting.n_ranks}"
    flags = {
        "ckpt_dir": shlex.quote(ckpt_dir),
        **setting.work.flags(),
        "tensor_split": setting.tensor_split,
        "dtype": None if dtype == "auto" else dtype,
        "device": None if device == "auto" else device,
    }
    return " ".join([start, setting.work.program, *(_flag(*flag) for flag in flags.items() if flag[1] is not None)])


def _flag(name: str, value: object) -> str:
    return f"--{name}" if value is True else f"--{name} {value}"


def change(setting: Setting, wanted: Setting) -> str:
    """What is different in `setting`, in a few words: `4 ranks and --tensor_split 1,3`."""
    parts = []
    if setting.n_ranks != wanted.n_ranks:
        parts.append(f"{setting.n_ranks} ranks")
    if setting.dtype != wanted.dtype:
        parts.append(f"--dtype {NAMES[setting.dtype]}")
    former = wanted.work.flags()
    parts += [_flag(name, value) for name, value in setting.work.flags().items() if value != former[name]]
    if setting.tensor_split != wanted.tensor_split:
        parts.append(f"--tensor_split {setting.tensor_split}" if setting.tensor_split else "no --tensor_split")
    return " and ".join(parts)
