"""Plans of one model, proposals that would fit, and the check before a model is loaded.

`llama.plan.needs` adds up the needs of a proposal, `llama.plan.words` puts plans into words.
"""

from __future__ import annotations

import dataclasses
import json
import os
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
from llama.plan.memory import Memory, joined_memory, machine_memory, own_pool
from llama.plan.needs import LASTING, PASSING, Plan, Proposal, RankPlan, needed_items
from llama.plan.training import Training
from llama.plan.words import change, too_much
from llama.quantization.scheme import Scheme

SHORTEST = 16
# Memories that differ by less than this are alike: cards of one make are never equal to the byte.
ALIKE = 0.05

# Makes a proposal that fits of one that may not; None where it finds none.
Fitting = Callable[[Proposal], Proposal | None]

# Cutting a large model takes a while, and advice asks for the same cuts again and again.
_cut = lru_cache(maxsize=256)(cut_model)


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
    """Refuse a model that cannot fit into the memory of all processes, and warn where it may not.

    Every process makes this call.

    Args:
        args, device, dtype, n_ranks, tensor_split: of the run.
        limits: the most that may be run at a time; a `Training` is sure to be run in full.
        expected: the work to come, where it is known. The cache is made for the request, so
            without `expected` only a cache for one prompt is sure to be needed.
        scheme: the weights that are held as integers.
        stored: the weights that the checkpoint itself holds as integers.
        offload_layers: layers whose weights stay in main memory.

    Raises:
        LlamaError: when weights and cache alone exceed the memory, or a training step does; the message names
            proposals that would fit.
    """
    memory, host = _joined(device, copies=env.world_size() // n_ranks)
    if tensor_split is not None and not isinstance(tensor_split, str):
        tensor_split = ",".join(map(str, tensor_split))
    planner = Planner(args, device.type, memory, host, stored)
    # A request may turn out smaller than it could be; steps of training come by the thousand.
    one = dataclasses.replace(limits, n_prompts=1)
    sure, names = (limits, None) if isinstance(limits, Training) else (expected or one, LASTING)
    needed = planner.plan(Proposal(n_ranks, sure, dtype, tensor_split, scheme, offload_layers))
    if not needed.fits(names):
        planner = dataclasses.replace(planner, memory=_all_memory(device, memory))
        raise LlamaError(f"{too_much(needed, names)}{_advice(planner, needed)}; --no_plan skips this check")
    full = planner.plan(dataclasses.replace(needed.proposal, work=expected or limits))
    if not full.fits():
        notice(f"memory may run out: {too_much(full)}{_advice(planner, full)}")


def _joined(device: torch.device, copies: int) -> tuple[Memory, Memory | None]:
    """Return the memory of all processes' devices, and the main memory beside their cards; a collective call."""
    own = [own_pool(device), *([own_pool(torch.device("cpu"))] if device.type == "cuda" else [])]
    told = [json.loads(text) for text in store.exchange(json.dumps(own))]
    memory, *host = (joined_memory([tuple(pool) for pool in pools], copies) for pools in zip(*told, strict=True))
    return memory, host[0] if host else None


def _all_memory(device: torch.device, memory: Memory) -> Memory:
    """Return the memory of this run, or of all cards where this machine has some to spare.

    Asking the cards takes a while.
    """
    alone = is_speaker() and env.world_size() == env.local_world_size()
    spare = device.type == "cuda" and torch.cuda.device_count() > len(memory.sizes)
    return machine_memory(device) if alone and spare else memory


def _advice(planner: Planner, plan: Plan) -> str:
    ways = [change(proposal, plan.proposal) for proposal in planner.advise(plan.proposal)]
    if not ways:
        return "; nothing smaller would fit here: use more or larger cards or machines"
    return f"; what fits: {', or '.join(ways)}"


@dataclass(frozen=True)
class Planner:
    """Makes plans for one model on one kind of machine.

    Args:
        args: the geometry.
        device: "cpu", "cuda" or "mps".
        memory: of the devices.
        host: the main memory beside cards; None where it is not known, or where `memory` is the main memory.
        stored: the scheme of a checkpoint of integers, which can be held in no other way.
    """

    args: ModelArgs
    device: str
    memory: Memory
    host: Memory | None = None
    stored: Scheme | None = None

    def plan(self, proposal: Proposal) -> Plan:
        """Return the needs of a proposal on every rank.

        Raises:
            PartitionError: when the model cannot be cut so.
            QuantizationError: when it cannot be quantized so.
            UsageError: when it has not so many layers to offload.
        """
        check_offload(proposal.offload_layers, self.args.n_layers)
        partition = _cut(self.args, proposal.scheme, proposal.n_ranks, proposal.tensor_split)
        pools = self.memory.pools(proposal.n_ranks)
        if self.host is not None and proposal.offload_layers:
            pools += [dataclasses.replace(pool, is_host=True) for pool in self.host.pools(proposal.n_ranks)]
        kernels, on_card = self._kernels(proposal, partition), self.device == "cuda"
        items = (needed_items(partition, rank, proposal, kernels, on_card) for rank in range(proposal.n_ranks))
        return Plan(proposal, tuple(RankPlan(rank, needed) for rank, needed in enumerate(items)), tuple(pools))

    def _kernels(self, proposal: Proposal, partition: Partition) -> Kernels:
        itemsize = proposal.dtype.itemsize
        threads = max(1, _cores() // proposal.n_ranks) if self.device == "cpu" else 0
        # Cards have fused kernels of their own for grouped heads in 16 bit only.
        grouped = self.args.group_size > 1 and self.device != "cpu"
        fused = not (grouped and itemsize >= 4)
        # As `Opened.prepare_kernels` decides.
        serve = products.serve(proposal.dtype, has_integers=proposal.scheme is not None)
        pays = self.device == "cpu" and products.worth_building(rank_params(partition, 0) * itemsize)
        return Kernels(itemsize, threads, fused, native=serve and pays and can_build())

    def advise(self, proposal: Proposal) -> list[Proposal]:
        """Return proposals near this one that fit, each of them planned: one of each kind that helps."""
        found = self._ways(proposal)
        if not found:
            found = self._ways(_working(proposal, n_prompts=1))
        return list(dict.fromkeys(found))

    def _ways(self, proposal: Proposal) -> list[Proposal]:
        split = self._by_split(proposal)
        # Where a split alone helps, the other ways do without a split.
        fitting = self._split_to_fit if split is None else lambda other: other if self._fits(other) else None
        ways = (
            self._by_dtype, self._by_int8, self._by_int4, self._by_ranks, self._by_offload, self._by_checkpointing,
            self._by_batch, self._by_length,
        )  # fmt: skip
        return [better for better in (split, *(way(proposal, fitting) for way in ways)) if better is not None]

    def _fits(self, proposal: Proposal) -> bool:
        try:
            return self.plan(proposal).fits()
        except (PartitionError, QuantizationError):
            return False

    def _split_to_fit(self, proposal: Proposal) -> Proposal | None:
        """Return the proposal if it fits, else with a split in proportion to the memories if that fits."""
        if self._fits(proposal):
            return proposal
        return self._by_split(proposal)

    def _by_split(self, proposal: Proposal) -> Proposal | None:
        """Cut shards in proportion to the memories, or to the memories less activations."""
        try:
            equal = self.plan(dataclasses.replace(proposal, tensor_split=None))
        except (PartitionError, QuantizationError):
            return None
        if any(len(pool.ranks) > 1 for pool in equal.pools if not pool.is_host):
            return None
        rooms = {pool.ranks[0]: pool.nbytes for pool in equal.pools if not pool.is_host}
        if proposal.tensor_split is not None and equal.fits():
            return equal.proposal
        sizes = [float(rooms[rank]) for rank in range(proposal.n_ranks)]
        if max(sizes) <= (1 + ALIKE) * min(sizes):
            return None
        left = [size - rank.total(PASSING) for size, rank in zip(sizes, equal.ranks, strict=True)]
        for weights in (sizes, left):
            better = dataclasses.replace(proposal, tensor_split=_proportion(weights))
            if min(weights) > 0 and self._fits(better):
                return better
        return None

    def _by_dtype(self, proposal: Proposal, fitting: Fitting) -> Proposal | None:
        if proposal.dtype != torch.float32:
            return None
        trains = isinstance(proposal.work, Training)
        narrow = torch.bfloat16 if trains or self.device == "cpu" else torch.float16
        return fitting(dataclasses.replace(proposal, dtype=narrow))

    def _by_int8(self, proposal: Proposal, fitting: Fitting) -> Proposal | None:
        return self._by_integers(proposal, fitting, "int8")

    def _by_int4(self, proposal: Proposal, fitting: Fitting) -> Proposal | None:
        return self._by_integers(proposal, fitting, "int4")

    def _by_integers(self, proposal: Proposal, fitting: Fitting, kind: str) -> Proposal | None:
        """Hold integers of fewer bits, where the checkpoint leaves a choice."""
        held = None if proposal.scheme is None else proposal.scheme.linears.kind
        if self.stored is not None or held in (kind, "int4"):
            return None
        return fitting(dataclasses.replace(proposal, scheme=Scheme.create(kind)))

    def _by_offload(self, proposal: Proposal, fitting: Fitting) -> Proposal | None:
        """Offload the fewest layers; a CPU has nowhere to move them."""
        if self.device != "cuda":
            return None
        for n_layers in range(proposal.offload_layers + 1, self.args.n_layers + 1):
            better = fitting(dataclasses.replace(proposal, offload_layers=n_layers))
            if better is not None:
                return better
        return None

    def _by_ranks(self, proposal: Proposal, fitting: Fitting) -> Proposal | None:
        """Add the fewest ranks; they help only where they bring memory along."""
        least = self._weights(proposal)
        most = self.args.n_heads if self.memory.grows else len(self.memory.sizes)
        for n_ranks in range(proposal.n_ranks + 1, min(most, self.args.n_heads) + 1):
            # Cutting a large model in many ways takes seconds: not where even all memory together is too little.
            if sum(pool.nbytes for pool in self.memory.pools(n_ranks)) < least:
                continue
            better = fitting(dataclasses.replace(proposal, n_ranks=n_ranks, tensor_split=None))
            if better is not None:
                return better
        return None

    def _weights(self, proposal: Proposal) -> int:
        """Return the bytes of all weights on the devices, in one piece."""
        whole = dataclasses.replace(proposal, n_ranks=1, tensor_split=None, work=Workload(1, 1))
        return self.plan(whole).ranks[0].total(("weights",))

    def _by_checkpointing(self, proposal: Proposal, fitting: Fitting) -> Proposal | None:
        if not isinstance(proposal.work, Training) or proposal.work.checkpointing:
            return None
        saving = _working(proposal, checkpointing=True)
        return fitting(saving) or self._by_batch(saving, fitting)

    def _by_batch(self, proposal: Proposal, fitting: Fitting) -> Proposal | None:
        return self._largest(lambda n: _working(proposal, n_prompts=n), fitting, proposal.work.n_prompts)

    def _by_length(self, proposal: Proposal, fitting: Fitting) -> Proposal | None:
        high = -(-proposal.work.length // SHORTEST)
        return self._largest(lambda n: _working(proposal, length=SHORTEST * n), fitting, high)

    def _largest(self, at: Callable[[int], Proposal], fitting: Fitting, high: int) -> Proposal | None:
        """Return the proposal of the largest number below `high` that fits, by halving the range."""
        low, best = 1, None
        while low < high:
            middle = (low + high) // 2
            better = fitting(at(middle))
            if better is None:
                high = middle
            else:
                best, low = better, middle + 1
        return best


def _working(proposal: Proposal, **other: Any) -> Proposal:
    """Return the proposal with some fields of its work changed."""
    return dataclasses.replace(proposal, work=dataclasses.replace(proposal.work, **other))


@cache
def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _proportion(sizes: Sequence[float]) -> str:
    """Return sizes as a tensor split, the smallest 1: `1,1,3,3`."""
    return ",".join(f"{size / min(sizes):.3g}" for size in sizes) if min(sizes) > 0 else ""
