"""Collectives of the model-parallel ranks, and the four autograd functions between a tensor and its shards.

The autograd functions are our own, around torch's functional collectives. Those compile into one graph with the model,
but torch's backward of `all_reduce` reduces again, which multiplies every gradient by the world size. Where the ranks
share memory (see `groups.share_memory`), tensors go through shared memory rather than through the group. With one rank
every collective is the identity.

The pairs are Megatron's (arXiv:1909.08053): `copy` before a column-parallel linear and `reduce` after a row-parallel
one; `gather` and `scatter` along the last dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

from llama.kernels import shared
from llama.parallel.groups import Ranks

# torch 2.13 renamed both.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_functional_all_gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


def all_reduce(x: Tensor, ranks: Ranks, op: str = "sum") -> Tensor:
    """Return `x` reduced over the ranks of the model, by "sum" or "max"; no gradient."""
    if ranks.world_size == 1:
        return x
    if ranks.segment is not None and shared.serves(x):
        return shared.all_reduce(x, ranks.segment, op)
    if torch.compiler.is_compiling():
        return functional.wait_tensor(functional.all_reduce(x.contiguous(), op, ranks.group))
    # In eager code the functional collectives would import the compiler: a second and 80 MB per rank.
    reduced = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(reduced, _OPS[op], group=ranks.group)
    return reduced


def all_gather(x: Tensor, ranks: Ranks) -> Tensor:
    """Return the `x` of every rank, all of one shape, stacked: [world_size, *x.shape]; no gradient."""
    if ranks.world_size == 1:
        return x.unsqueeze(0)
    if ranks.segment is not None and shared.serves(x):
        return shared.all_gather(x, ranks.segment, ranks.world_size)
    x = x.contiguous().unsqueeze(0)
    if torch.compiler.is_compiling():
        return functional.wait_tensor(_functional_all_gather(x, 0, ranks.group))
    gathered = x.new_empty(ranks.world_size, *x.shape[1:])
    _all_gather(gathered, x, group=ranks.group)
    return gathered


def broadcast(x: Tensor, ranks: Ranks, source: int = 0) -> Tensor:
    """Return the `x` of rank `source`, of the same shape on every rank; not for compiled code, no gradient."""
    if ranks.world_size == 1:
        return x
    if ranks.segment is not None and shared.serves(x):
        return shared.all_gather(x, ranks.segment, ranks.world_size)[source]
    dist.broadcast(x, group=ranks.group, group_src=source)
    return x


def gather_last(x: Tensor, cuts: Sequence[range], ranks: Ranks) -> Tensor:
    """Return the ranks' shards [..., len(cuts[rank])] concatenated along the last dimension; no gradient."""
    if ranks.world_size == 1:
        return x
    widest = max(len(cut) for cut in cuts)
    padded = torch.nn.functional.pad(x, (0, widest - x.shape[-1]))
    shards = all_gather(padded, ranks)
    return torch.cat([shards[rank, ..., : len(cut)] for rank, cut in enumerate(cuts)], dim=-1)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0], ctx.ranks), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        return all_reduce(x, ranks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cuts: Sequence[range], ranks: Ranks) -> Tensor:
        ctx.own = cuts[ranks.rank]
        return gather_last(x, cuts, ranks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][..., ctx.own.start : ctx.own.stop], None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cuts: Sequence[range], ranks: Ranks) -> Tensor:
        ctx.cuts, ctx.ranks = cuts, ranks
        own = cuts[ranks.rank]
        return x[..., own.start : own.stop].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return gather_last(grads[0], ctx.cuts, ctx.ranks), None, None


def copy_to_ranks(x: Tensor, ranks: Ranks) -> Tensor:
    """Return `x` itself; the backward sums the ranks' gradients of `x`."""
    return x if ranks.world_size == 1 else _Copy.apply(x, ranks)


def reduce_from_ranks(x: Tensor, ranks: Ranks) -> Tensor:
    """Return the sum of `x` over the ranks; the backward is the identity."""
    return x if ranks.world_size == 1 else _Reduce.apply(x, ranks)


def gather_from_ranks(x: Tensor, cuts: Sequence[range], ranks: Ranks) -> Tensor:
    """Return the ranks' shards [..., len(cuts[rank])] concatenated; the backward returns this rank's part."""
    return x if ranks.world_size == 1 else _Gather.apply(x, cuts, ranks)


def scatter_to_ranks(x: Tensor, cuts: Sequence[range], ranks: Ranks) -> Tensor:
    """Return this rank's part of the last dimension; the backward gathers the parts."""
    return x if ranks.world_size == 1 else _Scatter.apply(x, cuts, ranks)
