"""Packed batches: all examples in one row, with shared beginnings computed once and almost no padding.

The row holds the soft prompt, then the tokens that all examples begin with (a template's opening words), then those
that many examples begin with (the rest of each template), then the rest of each example. Linears and norms run over
the whole row. Attention runs stretch by stretch: a stretch's tokens see one another causally, and all of the shared
stretches that precede them in their example.

Shape legend: N tokens of the row, P virtual tokens, M supervised places, T tokens of a stretch, C tokens that a stretch
sees before its own, H query heads, K KV heads, R = H / K, D head_dim.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llama.data.examples import Example, n_common
from llama.kernels.products import round_up

# Shared tokens of one template, from which on they are worth a stretch of their own, which is one more attention call.
SHORTEST_STEM = 8

Span = tuple[int, int]


# -- a packed batch --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stretch:
    """A run of tokens that see one another causally: a shared beginning, or the rest of one example.

    Args:
        start, stop: place in the row.
        before: places of the earlier stretches that the tokens see in full, in the order of their positions.
    """

    start: int
    stop: int
    before: tuple[Span, ...] = ()

    @property
    def seen(self) -> tuple[Span, ...]:
        """Places of all stretches that the tokens see, their own last."""
        return (*self.before, (self.start, self.stop))

    def bias(self, n_repeats: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the mask to add to scores: [n_repeats * T, C + T], 0 where a query sees an entry, else -inf."""
        width = self.stop - self.start
        own = torch.full((width, width), float("-inf"), dtype=dtype, device=device).triu(1)
        before = own.new_zeros(width, sum(stop - start for start, stop in self.before))
        return torch.cat((before, own), dim=1).repeat(n_repeats, 1)


@dataclass
class Packed:
    """A batch in one row; a `llama.attention.Context` of one forward pass and its backward.

    Args:
        tokens: ids behind the soft prompt, [1, N - P] int64.
        positions: [1, N] int64; every example's begin at 0 with the soft prompt.
        stretches: in the order of the row; they cover all of the row but the padding at its end.
        supervised: places whose next token is learnt, [M] int64; a place occurs once for each next token.
        targets: the next tokens, [M] int64.
        weights: number of examples that learn each target, [M] float32; 0 for padding.
        keys: a hash of the text up to each place, [N] int64: the same in every batch.
    """

    tokens: Tensor
    positions: Tensor
    stretches: tuple[Stretch, ...]
    supervised: Tensor
    targets: Tensor
    weights: Tensor
    keys: Tensor
    _biases: list[Tensor] = field(default_factory=list)

    def mask(self, positions: Tensor) -> Tensor | None:
        """Return None: every stretch has a mask of its own."""
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Return attention stretch by stretch: q [1, N, H, D], k and v [1, N, K, D] to [1, N, H * D]."""
        if not self._biases:  # made once: they are the same in every layer
            repeats = q.shape[2] // k.shape[2]
            self._biases += [stretch.bias(repeats, q.dtype, q.device) for stretch in self.stretches]
        return _Attention.apply(q[0], k[0], v[0], self.stretches, self._biases).unsqueeze(0)


# -- attention over stretches ----------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    """Softmax attention of all stretches, as matrix products.

    The backward of torch's fused kernel takes four times as long on a CPU, and autograd over many small pieces costs as
    much again. As in the fused kernel, the backward computes the softmax again instead of keeping it.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, stretches: Sequence[Stretch], biases: Sequence[Tensor]
    ) -> Tensor:
        n_groups = k.shape[1]
        queries, keys, values = _by_group(q, n_groups), _by_group(k, n_groups), _by_group(v, n_groups)
        ctx.save_for_backward(queries, keys, values)
        ctx.stretches, ctx.biases = stretches, biases
        out = torch.zeros_like(queries)
        for stretch, bias in zip(stretches, biases, strict=True):
            weights = _weights(_own(queries, stretch), _seen(keys, stretch), bias)
            _put(out, stretch, torch.bmm(weights, _seen(values, stretch)))
        return _by_token(out).flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values = ctx.saved_tensors
        slopes = _by_group(grads[0].unflatten(1, (-1, queries.shape[-1])), keys.shape[0])
        q_slope = torch.zeros_like(queries)
        # Every example adds to the gradients of shared keys and values: sum in float32 at least.
        wide = torch.promote_types(keys.dtype, torch.float32)
        k_slope, v_slope = (torch.zeros_like(x, dtype=wide) for x in (keys, values))
        scale = queries.shape[-1] ** -0.5
        for stretch, bias in zip(ctx.stretches, ctx.biases, strict=True):
            q, k, v = _own(queries, stretch), _seen(keys, stretch), _seen(values, stretch)
            slope, weights = _own(slopes, stretch), _weights(q, k, bias)
            _add(v_slope, stretch, torch.bmm(weights.transpose(1, 2), slope))
            score_slope = torch._softmax_backward_data(torch.bmm(slope, v.transpose(1, 2)), weights, -1, q.dtype)
            _put(q_slope, stretch, torch.bmm(score_slope, k).mul_(scale))
            _add(k_slope, stretch, torch.bmm(score_slope.transpose(1, 2), q).mul_(scale))
        of_tokens = (_by_token(x).to(grads[0].dtype) for x in (q_slope, k_slope, v_slope))
        return *of_tokens, None, None


def _by_group(x: Tensor, n_groups: int) -> Tensor:
    """Group heads by KV head: [N, K * R, D] to [K, R, N, D]."""
    return x.unflatten(1, (n_groups, -1)).permute(1, 2, 0, 3).contiguous()


def _by_token(x: Tensor) -> Tensor:
    """Undo `_by_group`: [K, R, N, D] to [N, K * R, D]."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)


def _own(x: Tensor, stretch: Stretch) -> Tensor:
    """Return a stretch's rows of [K, R, N, D], all queries of a KV head in one matrix: [K, R * T, D]."""
    return x[:, :, stretch.start : stretch.stop].flatten(1, 2)


def _put(x: Tensor, stretch: Stretch, values: Tensor) -> None:
    """Write values [K, R * T, D] to a stretch's rows of x [K, R, N, D]: the reverse of `_own`."""
    x[:, :, stretch.start : stretch.stop] = values.unflatten(1, (x.shape[1], -1))


def _seen(x: Tensor, stretch: Stretch) -> Tensor:
    """Return the entries of [K, 1, N, D] that a stretch sees: [K, C + T, D]."""
    parts = [x[:, 0, start:stop] for start, stop in stretch.seen]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _add(x: Tensor, stretch: Stretch, values: Tensor) -> None:
    """Add values [K, C + T, D] to the entries of x [K, 1, N, D] that a stretch sees: the reverse of `_seen`."""
    lengths = [stop - start for start, stop in stretch.seen]
    for (start, stop), part in zip(stretch.seen, values.split(lengths, dim=1), strict=True):
        x[:, 0, start:stop] += part


def _weights(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """Return the softmax of the scores of q [K, R * T, D] and k [K, C + T, D]: [K, R * T, C + T]."""
    return torch.baddbmm(bias, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5).softmax(-1)


# -- packing ---------------------------------------------------------------------------------------


def pack(examples: Sequence[Example], n_virtual: int, device: torch.device, share: bool = True) -> Packed:
    """Pack a batch into one row.

    Args:
        examples: at least one.
        n_virtual: virtual tokens before every example's BOS.
        device: of the tensors.
        share: whether examples share their common beginnings; off, they share only the soft prompt.
    """
    return _Packer(examples, n_virtual, share).packed(device)


class _Packer:
    """The row under construction; `paths` holds the places of each example's tokens."""

    def __init__(self, examples: Sequence[Example], n_virtual: int, share: bool) -> None:
        self.examples, self.n_virtual = examples, n_virtual
        # The last token is only ever a target.
        self.inputs = [example.tokens[:-1] for example in examples]
        self.row: list[int] = []
        self.positions = list(range(n_virtual))
        self.stretches: list[Stretch] = []
        self.paths: list[list[int]] = [[] for _ in examples]
        self.keys = [0] * n_virtual
        everyone = list(range(len(examples)))
        n_shared = self._common(everyone) if share else 0
        before = self._add_shared(everyone, range(n_shared), (), place=0)
        for members in self._branches(everyone, n_shared) if share else [everyone]:
            stop = self._common(members) if len(members) > 1 and share else n_shared
            if stop - n_shared < SHORTEST_STEM:
                stop = n_shared
            self._add_examples(members, stop, self._add_shared(members, range(n_shared, stop), before))

    def _common(self, members: Sequence[int]) -> int:
        """Return how many tokens all members begin with."""
        rows = [self.inputs[i] for i in members]
        # A beginning of both the first and the last in sorted order is a beginning of all between them.
        return n_common(min(rows), max(rows))

    def _branches(self, members: Sequence[int], at: int) -> list[list[int]]:
        """Return members grouped by their token at `at`; members that share it with nobody form one group."""
        branches: dict[tuple[int, ...], list[int]] = {}
        for i in members:
            branches.setdefault(self.inputs[i][at : at + 1], []).append(i)
        together = [branch for branch in branches.values() if len(branch) > 1]
        alone = [branch[0] for branch in branches.values() if len(branch) == 1]
        return together + ([alone] if alone else [])

    def _add_shared(
        self, members: Sequence[int], run: range, before: tuple[Span, ...], place: int | None = None
    ) -> tuple[Span, ...]:
        """Add tokens `run` of the members as a stretch that starts at `place`; return all spans seen after it."""
        place = len(self.positions) if place is None else place
        self._add_tokens(members, run)
        if len(self.positions) == place:
            return before
        self.stretches.append(Stretch(place, len(self.positions), before))
        return self.stretches[-1].seen

    def _add_examples(self, members: Sequence[int], start: int, before: tuple[Span, ...]) -> None:
        """Add each member's tokens from `start` on as a stretch of its own."""
        for i in members:
            if len(self.inputs[i]) > start:
                place = len(self.positions)
                self._add_tokens([i], range(start, len(self.inputs[i])))
                self.stretches.append(Stretch(place, len(self.positions), before))

    def _add_tokens(self, members: Sequence[int], run: range) -> None:
        places = range(len(self.positions), len(self.positions) + len(run))
        key = self.keys[self.paths[members[0]][-1]] if run.start else 0
        for token in self.inputs[members[0]][run.start : run.stop]:
            key = zlib.crc32(token.to_bytes(4, "little"), key)
            self.keys.append(key)
        self.row += self.inputs[members[0]][run.start : run.stop]
        self.positions += range(self.n_virtual + run.start, self.n_virtual + run.stop)
        for i in members:
            self.paths[i] += places

    def packed(self, device: torch.device) -> Packed:
        learnt: Counter[tuple[int, int]] = Counter()
        for example, path in zip(self.examples, self.paths, strict=True):
            first = example.n_context
            learnt.update(zip(path[first - 1 :], example.tokens[first:], strict=True))
        n_pad = round_up(len(self.positions)) - len(self.positions)
        n_idle = round_up(len(learnt)) - len(learnt)
        places, targets = zip(*learnt, *[(0, 0)] * n_idle, strict=True)
        return Packed(
            tokens=torch.tensor([[*self.row, *[0] * n_pad]], device=device, dtype=torch.int64),
            positions=torch.tensor([[*self.positions, *range(n_pad)]], device=device),
            stretches=tuple(self.stretches),
            supervised=torch.tensor(places, device=device),
            targets=torch.tensor(targets, device=device),
            weights=torch.tensor([*learnt.values(), *[0] * n_idle], device=device, dtype=torch.float32),
            keys=torch.tensor([*self.keys, *[0] * n_pad], device=device),
        )
