"""Needs of a run on every rank, item by item, beside the memory that is there.

A `Plan` has a list of `Item`s a rank: training, quantization or offloading add an item or change its size. Weights,
cache and trained state are exact; activations are those of `llama.plan.inference` and `llama.plan.training`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llama.checkpoint.table import Spec, own_size, parts
from llama.offload import N_BUFFERS, piece_bytes
from llama.parallel.partition import Partition
from llama.plan.inference import Kernels, Workload, activation_bytes
from llama.plan.memory import Pool
from llama.plan.training import Training, training_bytes
from llama.quantization.scheme import Scheme

# Items that a run holds however full it is, and those that depend on its prompts.
LASTING = ("weights", "buffers", "KV cache", "offloaded")
PASSING = ("activations", "temporaries")


@dataclass(frozen=True)
class Item:
    """One use of memory on a rank, in bytes: of its device, or with `in_host` of the main memory beside it."""

    name: str
    nbytes: int
    in_host: bool = False


@dataclass(frozen=True)
class RankPlan:
    """All needs of one rank."""

    rank: int
    items: tuple[Item, ...]

    def total(self, names: Sequence[str] | None = None, in_host: bool = False) -> int:
        """Return the bytes of the items of these names, None for all, on the device or `in_host` in main memory."""
        named = (item for item in self.items if names is None or item.name in names)
        return sum(item.nbytes for item in named if item.in_host == in_host)


@dataclass(frozen=True)
class Proposal:
    """The choices of a run.

    Args:
        n_ranks: ranks of the model.
        work: prompts at a time and tokens of each, or a training step.
        dtype: of weights, cache and stream.
        tensor_split: weights of the ranks, as a person writes them; None for equal shards.
        scheme: the weights that are held as integers; None for none.
        offload_layers: layers whose weights stay in main memory.
    """

    n_ranks: int
    work: Workload
    dtype: torch.dtype
    tensor_split: str | None = None
    scheme: Scheme | None = None
    offload_layers: int = 0


@dataclass(frozen=True)
class Plan:
    """The needs of the ranks and the memory that they draw on."""

    proposal: Proposal
    ranks: tuple[RankPlan, ...]
    pools: tuple[Pool, ...]

    def excess(self, pool: Pool, names: Sequence[str] | None = None) -> int:
        """Return the bytes that the ranks of a pool need beyond its own; below zero where there is room."""
        return sum(self.ranks[rank].total(names, pool.is_host) for rank in pool.ranks) - pool.nbytes

    def fits(self, names: Sequence[str] | None = None) -> bool:
        """True where the items of these names, None for all, fit into every pool."""
        return all(self.excess(pool, names) <= 0 for pool in self.pools)

    def worst(self, names: Sequence[str] | None = None) -> Pool:
        """Return the pool that lacks most, or has least to spare."""
        return max(self.pools, key=lambda pool: self.excess(pool, names))


def needed_items(
    partition: Partition, rank: int, proposal: Proposal, kernels: Kernels, on_card: bool
) -> tuple[Item, ...]:
    """Return all needs of `rank`.

    Args:
        partition, rank: of the shard.
        proposal: of the run.
        kernels: of the device.
        on_card: true for a device with memory of its own, so that offloaded layers lie elsewhere.
    """
    args, work, itemsize = partition.args, proposal.work, proposal.dtype.itemsize
    weights = _weight_items(partition, rank, proposal, on_card)
    if isinstance(work, Training):
        step = training_bytes(partition, rank, work, kernels, proposal.scheme, proposal.offload_layers)
        names = ("trained state", *PASSING)
        return *weights, *map(Item, names, (step.trained, step.kept, step.temporaries))
    # A soft prompt is held once for all requests, and again at the start of each slot.
    entries = 2 * args.n_layers * (work.n_prompts * (work.prefix + work.length) + work.prefix)
    cache_bytes = entries * len(partition.kv_rows[rank]) * itemsize
    return (
        *weights,
        Item("KV cache", cache_bytes),
        Item("activations", activation_bytes(partition, rank, work, kernels, proposal.scheme)),
    )


def _weight_items(partition: Partition, rank: int, proposal: Proposal, on_card: bool) -> list[Item]:
    """Return weights on the device; with offloading the buffers there, and the layers in main memory."""
    layer, outside = weight_bytes(partition, rank, proposal.dtype, proposal.scheme)
    n_offloaded = proposal.offload_layers
    piece = piece_bytes(layer)
    on_device = (partition.args.n_layers - n_offloaded) * sum(layer) + outside
    if not n_offloaded:
        return [Item("weights", on_device)]
    buffers = Item("buffers", min(N_BUFFERS, n_offloaded) * piece)
    if on_card:
        return [Item("weights", on_device), buffers, Item("offloaded", n_offloaded * piece, in_host=True)]
    return [Item("weights", on_device + n_offloaded * piece), buffers]


def weight_bytes(
    partition: Partition, rank: int, dtype: torch.dtype, scheme: Scheme | None = None
) -> tuple[list[int], int]:
    """Return the bytes of each tensor of a layer on `rank`, and of all tensors outside the layers."""
    layer, outside = parts(partition.args, scheme)

    def nbytes(spec: Spec) -> int:
        return own_size(spec, partition, rank) * (spec.dtype or dtype).itemsize

    return list(map(nbytes, layer)), sum(map(nbytes, outside))
