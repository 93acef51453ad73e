"""A trained tensor and its part on this rank: how gradients are summed, norms counted and shards gathered.

Every rank holds either the whole of a trained tensor or the part that belongs to its shard of a frozen
linear. What is written to a file is always whole, so that a run goes on at any number of ranks.
"""

from __future__ import annotations

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

    def take(self, total: Tensor) -> None:
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
