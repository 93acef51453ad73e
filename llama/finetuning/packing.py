"""Training examples laid out so that what they share is computed once and next to nothing is padded.

All tokens of a batch stand in one row: the soft prompt, then what every example begins with (a template's opening
words), then what many of them begin with (each template's own words), then the rest of each example. Linears
and norms see that row. Attention alone is done stretch by stretch (`llama.finetuning.packed`): a stretch sees its
own tokens causally, and all of the shared stretches before it.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence

import torch

from llama.data.examples import Example, n_common
from llama.finetuning.packed import Packed, Span, Stretch
from llama.lengths import round_up

# A template's own words are worth an attention call of their own from so many tokens on.
SHORTEST_STEM = 8


def pack(examples: Sequence[Example], n_virtual: int, device: torch.device, share: bool = True) -> Packed:
    """Lay a batch out.

    Args:
        examples: at least one.
        n_virtual: virtual tokens before every example's BOS.
        device: where the tensors are made.
        share: whether what examples have in common is computed once; off, only the soft prompt is.
    """
    return _Packer(examples, n_virtual, share).packed(device)


class _Packer:
    """Collects the row; `paths` says where each example's tokens ended up."""

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
        """How many tokens all of them begin with."""
        rows = [self.inputs[i] for i in members]
        # What the first and the last in order share, all between them share.
        return n_common(min(rows), max(rows))

    def _branches(self, members: Sequence[int], at: int) -> list[list[int]]:
        """Members by their token at `at`, those that stand alone together."""
        branches: dict[tuple[int, ...], list[int]] = {}
        for i in members:
            branches.setdefault(self.inputs[i][at : at + 1], []).append(i)
        together = [branch for branch in branches.values() if len(branch) > 1]
        alone = [branch[0] for branch in branches.values() if len(branch) == 1]
        return together + ([alone] if alone else [])

    def _add_shared(
        self, members: Sequence[int], run: range, before: tuple[Span, ...], place: int | None = None
    ) -> tuple[Span, ...]:
        """Add the tokens `run` of the members' beginning, a stretch from `place` on; return what is seen after it."""
        place = len(self.positions) if place is None else place
        self._add_tokens(members, run)
        if len(self.positions) == place:
            return before
        self.stretches.append(Stretch(place, len(self.positions), before))
        return self.stretches[-1].seen

    def _add_examples(self, members: Sequence[int], start: int, before: tuple[Span, ...]) -> None:
        """Add the members' own tokens from `start` on."""
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
            n_real=sum(len(example.tokens) for example in self.examples),
        )
