"""Whether a model fits before anything is loaded: what each rank needs, what is there, and what would fit.

What is needed is added up in `llama.plan.needs`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch

from llama import env
from llama.checkpoint.load import cut_model
from llama.checkpoint.table import rank_params
from llama.config import ModelArgs
from llama.env import is_speaker, notice
from llama.errors import LlamaError, PartitionError, QuantizationError
from llama.kernels import products
from llama.kernels.build import can_build
from llama.offload import check_offload
from llama.parallel import store
from llama.parallel.partition import Partition
from llama.plan.inference import Kernels, Workload
from llama.plan.memory import Memory, Pool, joined_memory, machine_memory, own_pool
from llama.plan.needs import LASTING, PASSING, Plan, RankPlan, Setting, needed_items
from llama.plan.training import Training
from llama.quantization.scheme import Asked, Scheme

GB = 1e9
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SHORTEST = 16
# Memories that differ by less than this are alike: cards of one make are never equal to the byte.
ALIKE = 0.05

# A setting that fits, made from one that may not; None when there is none.
Settle = Callable[[Setting], Setting | None]


@dataclass(frozen=True)
class Planner:
    """Makes plans for one model on one kind of machine.

    Args:
        args: the geometry.
        device: "cpu", "cuda" or "mps".
        memory: what is there.
        host: the main memory beside cards; None where it is not known, or where `memory` is that.
        stored: how the checkpoint holds its weights as integers, where it does: they cannot be held otherwise.
    """

    args: ModelArgs
    device: str
    memory: Memory
    host: Memory | None = None
    stored: Scheme | None = None

    def plan(self, setting: Setting) -> Plan:
        """What `setting` needs on every rank.

        Raises:
            PartitionError: when the model cannot be cut so.
            QuantizationError: when it cannot be quantized so.
            UsageError: when it has not so many layers to offload.
        """
        check_offload(setting.offload_layers, self.args.n_layers)
        partition = _cut(self.args, setting.scheme, setting.n_ranks, setting.tensor_split)
        pools = self.memory.pools(setting.n_ranks)
        if self.host is not None and setting.offload_layers:
            pools += [dataclasses.replace(pool, is_host=True) for pool in self.host.pools(setting.n_ranks)]
        kernels, on_card = self._kernels(setting, partition), self.device == "cuda"
        items = (needed_items(partition, rank, setting, kernels, on_card) for rank in range(setting.n_ranks))
        return Plan(setting, tuple(RankPlan(rank, needed) for rank, needed in enumerate(items)), tuple(pools))

    def _kernels(self, setting: Setting, partition: Partition) -> Kernels:
        threads = max(1, _cores() // setting.n_ranks) if self.device == "cpu" else 0
        # Cards have fused kernels of their own for grouped heads in 16 bit only.
        grouped = self.args.group_size > 1 and self.device != "cpu"
        fused = not (grouped and setting.dtype.itemsize >= 4)
        itemsize = setting.dtype.itemsize
        # Generation with offloaded layers does without; see `llama.generation.steps.choose_mode`.
        wanted = isinstance(setting.work, Training) or not setting.offload_layers
        serve = products.serve(setting.dtype, has_integers=setting.scheme is not None)
        serve = serve and products.worth_building(rank_params(partition, 0) * itemsize)
        native = threads and wanted and serve and can_build()
        return Kernels(itemsize, threads, fused, bool(native))

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
        ways = (
            self._by_dtype, self._by_int8, self._by_int4, self._by_ranks, self._by_offload, self._by_checkpointing,
            self._by_batch, self._by_length,
        )  # fmt: skip
        return [better for better in (split, *(way(setting, settle) for way in ways)) if better is not None]

    def _fits(self, setting: Setting) -> bool:
        try:
            return self.plan(setting).fits()
        except (PartitionError, QuantizationError):
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
        except (PartitionError, QuantizationError):
            return None
        if any(len(pool.ranks) > 1 for pool in equal.pools if not pool.is_host):
            return None
        rooms = {pool.ranks[0]: pool.nbytes for pool in equal.pools if not pool.is_host}
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

    def _by_int8(self, setting: Setting, settle: Settle) -> Setting | None:
        return self._by_integers(setting, settle, "int8")

    def _by_int4(self, setting: Setting, settle: Settle) -> Setting | None:
        return self._by_integers(setting, settle, "int4")

    def _by_integers(self, setting: Setting, settle: Settle, kind: str) -> Setting | None:
        """Integers of fewer bits, where the checkpoint leaves a choice."""
        held = None if setting.scheme is None else setting.scheme.linears.kind
        if self.stored is not None or held in (kind, "int4"):
            return None
        return settle(dataclasses.replace(setting, scheme=Scheme.create(kind)))

    def _by_offload(self, setting: Setting, settle: Settle) -> Setting | None:
        """The fewest layers; on a CPU there is nowhere to move them."""
        if self.device != "cuda":
            return None
        for n_layers in range(setting.offload_layers + 1, self.args.n_layers + 1):
            better = settle(dataclasses.replace(setting, offload_layers=n_layers))
            if better is not None:
                return better
        return None

    def _by_ranks(self, setting: Setting, settle: Settle) -> Setting | None:
        """The fewest further ranks; they help only where they bring memory along."""
        least = self._weights(setting)
        most = self.args.n_heads if self.memory.grows else len(self.memory.sizes)
        for n_ranks in range(setting.n_ranks + 1, min(most, self.args.n_heads) + 1):
            # Cutting a large model in many ways takes seconds: not where even all memory together is too little.
            if sum(pool.nbytes for pool in self.memory.pools(n_ranks)) < least:
                continue
            better = settle(dataclasses.replace(setting, n_ranks=n_ranks, tensor_split=None))
            if better is not None:
                return better
        return None

    def _weights(self, setting: Setting) -> int:
        """Bytes on the devices of all weights, in one piece."""
        whole = dataclasses.replace(setting, n_ranks=1, tensor_split=None, work=Workload(1, 1))
        return self.plan(whole).ranks[0].total(("weights",))

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


# Cutting a large model takes a while, and advice asks for the same cuts again and again.
_cut = lru_cache(maxsize=256)(cut_model)


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
    first = plan.ranks[0].items
    on_device, in_host = (tuple(item.name for item in first if item.in_host == where) for where in (False, True))
    rows = [["", *on_device, "total", "memory", *in_host, ""]]
    for rank in plan.ranks:
        own = [pool for pool in plan.pools if rank.rank in pool.ranks]
        device = max((pool for pool in own if not pool.is_host), key=plan.excess)
        shared = f" for {len(device.ranks)} ranks" if len(device.ranks) > 1 else ""
        sizes = {item.name: show_bytes(item.nbytes) for item in rank.items}
        there = [show_bytes(rank.total()), show_bytes(device.nbytes) + shared]
        rows.append(
            [f"rank {rank.rank}", *(sizes[name] for name in on_device), *there, *(sizes[name] for name in in_host),
             _verdict(plan, max(own, key=plan.excess))]
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)) for row in rows]
    return "\n".join(f"{line}  {row[-1]}".rstrip() for line, row in zip(lines, rows, strict=True))


def _verdict(plan: Plan, pool: Pool) -> str:
    excess = plan.excess(pool)
    return "fits" if excess <= 0 else f"lacks {show_bytes(excess)}{' of main memory' * pool.is_host}"


def command(
    setting: Setting, ckpt_dir: str, dtype: str = "auto", device: str = "auto", stored: Scheme | None = None
) -> str:
    """How a person starts `setting`.

    Args:
        setting: what is started.
        ckpt_dir, dtype, device: as the person would write them.
        stored: how the checkpoint holds its weights: what needs no flag.
    """
    start = "python" if setting.n_ranks == 1 else f"torchrun --nproc_per_node {setting.n_ranks}"
    flags = {
        "ckpt_dir": shlex.quote(ckpt_dir),
        **setting.work.flags(),
        "tensor_split": setting.tensor_split,
        **(_integer_flags(setting.scheme) if setting.scheme != stored else {}),
        "offload_layers": setting.offload_layers or None,
        "dtype": None if dtype == "auto" else dtype,
        "device": None if device == "auto" else device,
    }
    return " ".join([start, setting.work.program, *(_flag(*flag) for flag in flags.items() if flag[1] is not None)])


def _integer_flags(scheme: Scheme | None) -> dict[str, object]:
    return {} if scheme is None else vars(Asked.of(scheme))


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
    if setting.scheme != wanted.scheme:
        flags = _integer_flags(setting.scheme)
        parts.append(" ".join(_flag(*flag) for flag in flags.items() if flag[1] is not None))
    if setting.offload_layers != wanted.offload_layers:
        parts.append(_flag("offload_layers", setting.offload_layers))
    if setting.tensor_split != wanted.tensor_split:
        parts.append(f"--tensor_split {setting.tensor_split}" if setting.tensor_split else "no --tensor_split")
    return " and ".join(parts)


def check_fit(
    args: ModelArgs,
    device: torch.device,
    dtype: torch.dtype,
    n_ranks: int,
    tensor_split: str | Sequence[float] | None,
    limits: Workload,
    expected: Workload | None = None,
    *,
    scheme: Scheme | None = None,
    stored: Scheme | None = None,
    offload_layers: int = 0,
) -> None:
    """Whether the model fits into the memory of all processes; every process makes this call.

    Args:
        args, device, dtype, n_ranks, tensor_split: of the run.
        limits: the most that may be run at a time; a `Training` is all of it going to be run.
        expected: what is going to be run, where that is known. The cache is made for the request, so
            without it only a cache for one prompt is sure to be needed.
        scheme: which weights are held as integers.
        stored: which of them the checkpoint itself holds so.
        offload_layers: layers whose weights stay in main memory.

    Raises:
        LlamaError: when weights and cache alone exceed the memory, or all that training needs; it names what
            would fit.
    """
    memory, host = _joined(device, copies=env.world_size() // n_ranks)
    if tensor_split is not None and not isinstance(tensor_split, str):
        tensor_split = ",".join(map(str, tensor_split))
    planner = Planner(args, device.type, memory, host, stored)
    # A request may turn out smaller than it could be; steps of training come by the thousand.
    one = dataclasses.replace(limits, n_prompts=1)
    sure, names = (limits, None) if isinstance(limits, Training) else (expected or one, LASTING)
    needed = planner.plan(Setting(n_ranks, sure, dtype, tensor_split, scheme, offload_layers))
    if not needed.fits(names):
        planner = dataclasses.replace(planner, memory=_all_memory(device, memory))
        raise LlamaError(f"{_too_much(needed, names)}{_advice(planner, needed)}; --no_plan skips this check")
    full = planner.plan(dataclasses.replace(needed.setting, work=expected or limits))
    if not full.fits():
        notice(f"memory may run out: {_too_much(full, None)}{_advice(planner, full)}")


def _joined(device: torch.device, copies: int) -> tuple[Memory, Memory | None]:
    """What all processes have where they compute, and the main memory beside their cards; a collective call."""
    own = [own_pool(device), *([own_pool(torch.device("cpu"))] if device.type == "cuda" else [])]
    told = [json.loads(text) for text in store.exchange(json.dumps(own))]
    memory, *host = (joined_memory([tuple(pool) for pool in pools], copies) for pools in zip(*told, strict=True))
    return memory, host[0] if host else None


def _all_memory(device: torch.device, memory: Memory) -> Memory:
    """The memory of this run, or of all cards where this machine has some to spare; asking them takes a while."""
    alone = is_speaker() and env.world_size() == env.local_world_size()
    spare = device.type == "cuda" and torch.cuda.device_count() > len(memory.sizes)
    return machine_memory(device) if alone and spare else memory


def _too_much(plan: Plan, names: Sequence[str] | None) -> str:
    pool = plan.worst(names)
    items = plan.ranks[pool.ranks[0]].items
    needs = [item for item in items if item.in_host == pool.is_host and (names is None or item.name in names)]
    who = f"rank {pool.ranks[0]} needs" if len(pool.ranks) == 1 else f"each of {len(pool.ranks)} ranks needs about"
    what = ", ".join(f"{show_bytes(item.nbytes)} for {item.name}" for item in needs)
    shared = " between them" if len(pool.ranks) > 1 else ""
    return f"{who} {what} ({plan.setting.work.words()}), but {show_bytes(pool.nbytes)} are there{shared}"


def _advice(planner: Planner, plan: Plan) -> str:
    ways = [change(setting, plan.setting) for setting in planner.advise(plan.setting)]
    if not ways:
        return "; nothing smaller would fit here: use more or larger cards or machines"
    return f"; what fits: {', or '.join(ways)}"
