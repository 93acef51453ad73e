"""A batch in one row, and attention over it group by group.

Keys and values of a shared stretch are used by every row behind it, and autograd sums what flows back to them: the
gradient is that of the plain computation, in which every example carries its own copy.

Shape legend: N tokens of the batch, P virtual tokens, G rows of a group, T tokens of a padded row, C tokens that a
group sees before its own, M supervised places, H query heads and K KV heads of this rank, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llama.attention import attend

# Rows are padded for attention to a multiple of this: it then meets few shapes, and a CPU's library writes code for
# each new one.
WIDTH_MULTIPLE = 16

Parts = Sequence[Tensor]


@dataclass(frozen=True)
class Group:
    """Rows that are attended together.

    Args:
        start: place of the first row's first token; the rows lie end to end from there.
        lengths: tokens of each row.
        before: numbers of earlier groups, of one row each, that every row sees whole; in the order of their positions.
    """

    start: int
    lengths: tuple[int, ...]
    before: tuple[int, ...] = ()

    @property
    def stop(self) -> int:
        """Place behind the last row's last token."""
        return self.start + sum(self.lengths)

    @property
    def width(self) -> int:
        """Tokens of a padded row."""
        return WIDTH_MULTIPLE * -(-max(self.lengths) // WIDTH_MULTIPLE)

    @property
    def is_padded(self) -> bool:
        """Whether a row has less than the width."""
        return min(self.lengths) < self.width

    def rows(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where the padded rows take their tokens, [G * T] int64 (counted from `start`), and where they go back."""
        lengths = torch.tensor(self.lengths)
        steps = torch.arange(self.width)
        starts = lengths.cumsum(0) - lengths
        real = steps < lengths[:, None]
        # A padded place repeats the row's first token: later places are seen by no real one.
        taken = starts[:, None] + steps * real
        return taken.flatten().to(device), real.flatten().nonzero().squeeze(1).to(device)

    def mask(self, n_before: int, device: torch.device) -> Tensor | None:
        """[T, C + T] bool, True where a query sees an entry, with C `n_before`; None for plain causal attention."""
        if n_before == 0:
            return None
        own = torch.ones(self.width, self.width, dtype=torch.bool, device=device).tril()
        return torch.cat((own.new_ones(self.width, n_before), own), dim=1)


@dataclass
class Packed:
    """A batch in one row; a `llama.attention.Context` of one forward pass and its backward.

    Args:
        tokens: ids behind the soft prompt, [1, N - P] int64.
        positions: [1, N] int64; every example's begin at 0 with the soft prompt.
        groups: in the order of the row, of which they cover all.
        supervised: places whose next token is learnt, [M] int64; one may occur with several next tokens.
        targets: those next tokens, [M] int64.
        weights: how many examples learn each of them, [M] float32.
        n_real: tokens that the plain computation would have without padding: every example's own, the virtual
            ones not counted.
    """

    tokens: Tensor
    positions: Tensor
    groups: tuple[Group, ...]
    supervised: Tensor
    targets: Tensor
    weights: Tensor
    n_real: int
    _places: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _masks: dict[int, Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = self.tokens.device
        for number, group in enumerate(self.groups):
            n_before = sum(sum(self.groups[earlier].lengths) for earlier in group.before)
            self._masks[number] = group.mask(n_before, device)
            if group.is_padded:
                self._places[number] = group.rows(device)

    @property
    def n_targets(self) -> float:
        """Tokens that are learnt, as often as examples learn them."""
        return float(self.weights.sum())

    @property
    def n_computed(self) -> int:
        """Tokens that pass through the model, virtual ones included."""
        return self.positions.shape[1]

    @property
    def padding(self) -> float:
        """The part of padding in what attention computes; linears compute none."""
        padded = sum(group.width * len(group.lengths) for group in self.groups)
        return 1 - self.n_computed / padded

    def mask(self, positions: Tensor) -> Tensor | None:
        """No mask serves all tokens: every group has its own."""
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """q [1, N, H, D], k and v [1, N, K, D] to [1, N, H * D], group by group."""
        # Split, not sliced: the backward then writes each gradient once.
        rows = [x[0].split([sum(group.lengths) for group in self.groups]) for x in (q, k, v)]
        parts = [self._attend_group(number, *rows) for number in range(len(self.groups))]
        return torch.cat(parts).unsqueeze(0)

    def _attend_group(self, number: int, q: Parts, k: Parts, v: Parts) -> Tensor:
        """Each group's q [n, H, D], k and v [n, K, D] to one group's [n, H * D]."""
        group, places = self.groups[number], self._places.get(number)
        n_rows = len(group.lengths)

        def own(x: Tensor) -> Tensor:
            x = x if places is None else _Pad.apply(x, *places)
            return x.unflatten(0, (n_rows, -1))  # [G, T, heads, D]

        def seen(parts: Parts) -> Tensor:
            before = [_for_rows(parts[earlier], n_rows) for earlier in group.before]
            return torch.cat((*before, own(parts[number])), dim=1).transpose(1, 2)  # [G, K, C + T, D]

        out = attend(own(q[number]), seen(k), seen(v), self._masks[number]).flatten(0, 1)
        return out if places is None else _Unpad.apply(out, *places)


class _Pad(torch.autograd.Function):
    """A group's tokens [n, ...] into its padded rows [G * T, ...].

    No gradient reaches the padding, as no real query sees it: the backward takes the real places alone, where
    `index_select`'s own would add to zeros place by place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, taken: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(real)
        return x.index_select(0, taken)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (real,) = ctx.saved_tensors
        return grads[0].index_select(0, real), None, None


class _Unpad(torch.autograd.Function):
    """The real places [n, ...] of padded rows [G * T, ...]; the padding's gradient is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taken: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(real)
        ctx.n_places = len(taken)
        return x.index_select(0, real)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (real,) = ctx.saved_tensors
        padded = grads[0].new_zeros(ctx.n_places, *grads[0].shape[1:])
        return padded.index_copy_(0, real, grads[0]), None, None


def _for_rows(x: Tensor, n_rows: int) -> Tensor:
    """[C, K, D] to [G, C, K, D]."""
    x = x.unsqueeze(0)
    # An expansion is summed in the backward, even where there is nothing to sum.
    return x if n_rows == 1 else x.expand(n_rows, -1, -1, -1)
