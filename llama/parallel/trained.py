"""Trained tensors over ranks: each rank's part of a tensor, and the gradients of all parts, summed and clipped.

Every rank holds either a whole trained tensor, or the part that belongs to its shard of a frozen linear. Files always
hold whole tensors, so that a run can go on at any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llama.device import sum_dtype
from llama.parallel.collectives import all_reduce
from llama.parallel.groups import Ranks


def own_part(whole: Tensor, dim: int | None, cuts: Sequence[range], ranks: Ranks) -> Tensor:
    """Return this rank's part of a whole tensor that is cut along `dim`, as a view; the whole where `dim` is None."""
    if dim is None:
        return whole
    own = cuts[ranks.rank]
    return whole.narrow(dim, own.start, len(own))


@dataclass(frozen=True)
class Trained:
    """One trained tensor.

    Args:
        name: unique, the same on every rank.
        parameter: this rank's part, float32.
        ranks: this process's place among those that share the model.
        dim: the dimension that is cut; None where every rank holds the whole tensor.
        cuts: each rank's range along `dim`; ranges may overlap (KV heads that several ranks hold).
        partial: whether this rank's gradient is an addend of the whole gradient. So it is for a whole tensor that is
            multiplied with this rank's features alone.
    """

    name: str
    parameter: nn.Parameter
    ranks: Ranks
    dim: int | None = None
    cuts: tuple[range, ...] = ()
    partial: bool = False

    @property
    def overlaps(self) -> bool:
        """True where several ranks hold the same entries."""
        return sum(map(len, self.cuts)) > self._total

    @property
    def _total(self) -> int:
        return max((cut.stop for cut in self.cuts), default=0)

    def whole(self, part: Tensor) -> Tensor:
        """Return the whole tensor on every rank, from each rank's `part` of the parameter's shape; a collective."""
        if self.dim is None or self.ranks.world_size == 1:
            return part.detach().clone()
        owned = self._owned()
        return all_reduce(self._spread(part.detach().narrow(self.dim, 0, len(owned)), owned.start), self.ranks)

    def part(self, whole: Tensor) -> Tensor:
        """Return this rank's part of a whole tensor, as a view."""
        return own_part(whole, self.dim, self.cuts, self.ranks)

    def gradient(self) -> Tensor:
        """Return this rank's gradient, zeros where the backward left none."""
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        return self.parameter.grad

    def addend(self) -> Tensor | None:
        """Return the tensor to sum over the ranks for the whole gradient; None where this rank's gradient is whole."""
        if self.ranks.world_size == 1:
            return None
        if self.dim is None:
            return self.gradient() if self.partial else None
        # Each rank that holds a shared KV head has the gradient from its own queries alone.
        return self._spread(self.gradient(), self.cuts[self.ranks.rank].start) if self.overlaps else None

    def set_gradient(self, total: Tensor) -> None:
        """Set the gradient from the sum of all ranks' addends."""
        self.gradient().copy_(self.part(total))

    def square_sum(self) -> Tensor:
        """Return this rank's part of the gradient's squared norm, in `sum_dtype`; one rank counts each entry."""
        gradient, dtype = self.parameter.grad, sum_dtype(self.parameter.device)
        if gradient is None or (self.dim is None and self.ranks.rank != 0):
            return torch.zeros((), dtype=dtype, device=self.parameter.device)
        if self.dim is not None:
            gradient = gradient.narrow(self.dim, 0, len(self._owned()))
        return gradient.to(dtype).square().sum()

    def _owned(self) -> range:
        """Return this rank's range up to the first entry that a later rank holds too: these ranges do not overlap."""
        own, later = self.cuts[self.ranks.rank], self.cuts[self.ranks.rank + 1 :]
        stop = min([own.stop, *(cut.start for cut in later)])
        return range(own.start, max(own.start, stop))

    def _spread(self, part: Tensor, start: int) -> Tensor:
        """Return a tensor of the whole shape: `part` from `start` on, zeros elsewhere."""
        assert self.dim is not None
        shape = list(self.parameter.shape)
        shape[self.dim] = self._total
        whole = part.new_zeros(shape)
        whole.narrow(self.dim, start, part.shape[self.dim]).copy_(part)
        return whole


# -- gradients of all trained tensors --------------------------------------------------------------


def sum_gradients(trained: Sequence[Trained], ranks: Ranks, replicas: Ranks) -> None:
    """Sum every gradient over the ranks of the model and then over its copies, in one collective each.

    Args:
        trained: the tensors whose gradients are set; to zeros where this process had no example of the batch.
        ranks: the ranks that share the model.
        replicas: the processes that hold this rank's shard in other copies of the model.
    """
    addends = [(tensor, addend) for tensor in trained if (addend := tensor.addend()) is not None]
    for (tensor, _), total in zip(addends, _summed([addend for _, addend in addends], ranks), strict=True):
        tensor.set_gradient(total)
    gradients = [tensor.gradient() for tensor in trained]
    for gradient, total in zip(gradients, _summed(gradients, replicas), strict=True):
        gradient.copy_(total)


def _summed(tensors: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    """Return every tensor's sum over the ranks, by one collective for all of them."""
    if ranks.world_size == 1 or not tensors:
        return list(tensors)
    total = all_reduce(torch.cat([tensor.flatten() for tensor in tensors]), ranks)
    pieces = total.split([tensor.numel() for tensor in tensors])
    return [piece.view_as(tensor) for tensor, piece in zip(tensors, pieces, strict=True)]


def gradient_norm(trained: Sequence[Trained], ranks: Ranks) -> float:
    """Return the Euclidean norm of the whole gradient, every entry counted once; a collective call."""
    squares = torch.stack([tensor.square_sum() for tensor in trained]).sum()
    return math.sqrt(float(all_reduce(squares, ranks)))


def clip(trained: Sequence[Trained], norm: float, max_norm: float, scale: float = 1.0) -> None:
    """Divide every gradient by `scale`, and clip the whole gradient to `max_norm` as torch's `clip_grad_norm_` does.

    Args:
        trained: the tensors whose gradients are changed.
        norm: norm of the gradient after the division.
        max_norm: the largest norm allowed.
        scale: the loss scale.
    """
    factor = min(1.0, max_norm / (norm + 1e-6)) / scale
    if factor == 1.0:
        return
    for tensor in trained:
        if tensor.parameter.grad is not None:
            tensor.parameter.grad.mul_(factor)
