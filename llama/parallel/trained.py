"""A trained tensor and its part on this rank: how gradients are summed, norms counted and shards gathered.

Every rank holds either the whole of a trained tensor or the part that belongs to its shard of a frozen
linear. What is written to a file is always whole, so that a run goes on at any number of ranks.
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
    """What this rank holds of a tensor that is cut along `dim` as `cuts` says, as a view; all of it for None."""
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
        ranks: this process among those that share the model.
        dim: the dimension that is cut; None where every rank holds the whole.
        cuts: what each rank holds along `dim`; runs may overlap (KV heads that several ranks hold).
        partial: whether this rank's gradient is a part of the whole one, to be summed over the ranks, as
            that of a whole tensor that only meets this rank's features.
    """

    name: str
    parameter: nn.Parameter
    ranks: Ranks
    dim: int | None = None
    cuts: tuple[range, ...] = ()
    partial: bool = False

    @property
    def overlaps(self) -> bool:
        """Whether some of it is held by several ranks."""
        return sum(map(len, self.cuts)) > self._total

    @property
    def _total(self) -> int:
        return max((cut.stop for cut in self.cuts), default=0)

    def whole(self, part: Tensor) -> Tensor:
        """The whole tensor on every rank, from each rank's `part` (of the parameter's shape); a collective."""
        if self.dim is None or self.ranks.world_size == 1:
            return part.detach().clone()
        owned = self._owned()
        return all_reduce(self._spread(part.detach().narrow(self.dim, 0, len(owned)), owned.start), self.ranks)

    def part(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor, as a view of it."""
        return own_part(whole, self.dim, self.cuts, self.ranks)

    def gradient(self) -> Tensor:
        """This rank's gradient, zeros where nothing flowed back."""
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        return self.parameter.grad

    def addend(self) -> Tensor | None:
        """What must be summed over the ranks to make the gradient whole; None where it is already."""
        if self.ranks.world_size == 1:
            return None
        if self.dim is None:
            return self.gradient() if self.partial else None
        # Each holder of a shared head saw the gradient of its own queries alone.
        return self._spread(self.gradient(), self.cuts[self.ranks.rank].start) if self.overlaps else None

    def set_gradient(self, total: Tensor) -> None:
        """Set the gradient from the sum of all ranks' addends."""
        self.gradient().copy_(self.part(total))

    def square_sum(self) -> Tensor:
        """This rank's part of the gradient's squared norm, in `sum_dtype`: every entry is counted on one rank alone."""
        gradient, dtype = self.parameter.grad, sum_dtype(self.parameter.device)
        if gradient is None or (self.dim is None and self.ranks.rank != 0):
            return torch.zeros((), dtype=dtype, device=self.parameter.device)
        if self.dim is not None:
            gradient = gradient.narrow(self.dim, 0, len(self._owned()))
        return gradient.to(dtype).square().sum()

    def _owned(self) -> range:
        """The start of this rank's run that no later rank begins anew: such runs tile the whole."""
        own, later = self.cuts[self.ranks.rank], self.cuts[self.ranks.rank + 1 :]
        stop = min([own.stop, *(cut.start for cut in later)])
        return range(own.start, max(own.start, stop))

    def _spread(self, part: Tensor, start: int) -> Tensor:
        """A tensor of the whole shape with `part` in its place from `start` on, and zeros."""
        assert self.dim is not None
        shape = list(self.parameter.shape)
        shape[self.dim] = self._total
        whole = part.new_zeros(shape)
        whole.narrow(self.dim, start, part.shape[self.dim]).copy_(part)
        return whole


def sum_gradients(trained: Sequence[Trained], ranks: Ranks, replicas: Ranks) -> None:
    """Make every gradient that of the whole model and the whole batch, in one message for each.

    Args:
        trained: whose parameters' gradients are set, to zeros where the batch had none for this process.
        ranks: those that share the model.
        replicas: those that hold this rank's shard in other copies of the model.
    """
    addends = [(tensor, addend) for tensor in trained if (addend := tensor.addend()) is not None]
    for (tensor, _), total in zip(addends, _summed([addend for _, addend in addends], ranks), strict=True):
        tensor.set_gradient(total)
    gradients = [tensor.gradient() for tensor in trained]
    for gradient, total in zip(gradients, _summed(gradients, replicas), strict=True):
        gradient.copy_(total)


def _summed(tensors: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    """Every tensor's sum over the ranks; one collective for all of them."""
    if ranks.world_size == 1 or not tensors:
        return list(tensors)
    total = all_reduce(torch.cat([tensor.flatten() for tensor in tensors]), ranks)
    pieces = total.split([tensor.numel() for tensor in tensors])
    return [piece.view_as(tensor) for tensor, piece in zip(tensors, pieces, strict=True)]


def gradient_norm(trained: Sequence[Trained], ranks: Ranks) -> float:
    """Euclidean norm of the whole gradient, every entry counted once; a collective call."""
    squares = torch.stack([tensor.square_sum() for tensor in trained]).sum()
    return math.sqrt(float(all_reduce(squares, ranks)))


def clip(trained: Sequence[Trained], norm: float, max_norm: float, scale: float = 1.0) -> None:
    """Divide every gradient by `scale` and shorten the whole to `max_norm`, as torch's `clip_grad_norm_` does.

    Args:
        trained: whose gradients are changed.
        norm: of the gradient after the division.
        max_norm: the longest that it may be.
        scale: the loss scale.
    """
    factor = min(1.0, max_norm / (norm + 1e-6)) / scale
    if factor == 1.0:
        return
    for tensor in trained:
        if tensor.parameter.grad is not None:
            tensor.parameter.grad.mul_(factor)
