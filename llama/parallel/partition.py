"""The cut of a Llama across the ranks of one model: each rank's heads, FFN columns and vocabulary rows.

Every reader, writer and layer asks the same `Partition`, so there is one answer. Attention is cut in
whole key/value groups while there are enough of them, and inside one group beyond that (its KV head
is then held by each rank that serves a part of it). The FFN is cut in blocks of columns and makes up
for an attention that does not divide evenly; the vocabulary is cut in blocks of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from llama.config import ModelArgs
from llama.errors import PartitionError

FFN_BLOCK = 32
VOCAB_BLOCK = 16
# The FFN's block is halved until a shard's rounding costs at most this part of it.
EVENNESS = 0.01


def parse_tensor_split(tensor_split: str | Sequence[float] | None, world_size: int) -> tuple[float, ...]:
    """Return the weights of the ranks, summing to 1: from `"3,1"`, a sequence, or None for equal ones.

    Raises:
        PartitionError: unless there is one positive finite number a rank.
    """
    if tensor_split is None:
        return (1.0 / world_size,) * world_size
    parts = tensor_split.split(",") if isinstance(tensor_split, str) else tensor_split
    try:
        weights = [float(part) for part in parts]
    except (TypeError, ValueError):
        raise PartitionError(f"tensor_split {tensor_split!r} is not a list of numbers such as 3,1") from None
    if len(weights) != world_size:
        raise PartitionError(
            f"tensor_split {tensor_split!r} has {len(weights)} entries for {world_size} ranks: give one a rank"
        )
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise PartitionError(f"tensor_split {tensor_split!r}: every rank needs a weight above zero")
    exponent = math.frexp(max(weights))[1]  # so that the sum of huge weights is finite too
    weights = [math.ldexp(weight, -exponent) for weight in weights]
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)


def apportion(units: int, weights: Sequence[float]) -> list[int]:
    """Deal `units` out in proportion to `weights` by largest remainders, at least one to each.

    Raises:
        PartitionError: when there are fewer units than takers.
    """
    if units < len(weights):
        raise PartitionError(f"{units} units cannot serve {len(weights)} ranks")
    total = math.fsum(weights)
    ideal = [units * weight / total if total else units / len(weights) for weight in weights]
    shares = [max(1, math.floor(x + 1e-9)) for x in ideal]
    order = range(len(shares))
    while sum(shares) < units:
        shares[max(order, key=lambda i: (ideal[i] - shares[i], -i))] += 1
    while sum(shares) > units:
        shares[max((i for i in order if shares[i] > 1), key=lambda i: (shares[i] - ideal[i], i))] -= 1
    return shares


def ranges(sizes: Sequence[int]) -> tuple[range, ...]:
    """Lay sizes end to end: (2, 1) becomes (range(0, 2), range(2, 3))."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple(range(end - size, end) for size, end in zip(sizes, ends, strict=True))


def even_ranges(total: int, world_size: int, block: int = 1) -> tuple[range, ...]:
    """`total` cut in equal runs, to one block."""
    return weighted_ranges(total, (1.0,) * world_size, block)


def weighted_ranges(total: int, weights: Sequence[float], block: int = 1) -> tuple[range, ...]:
    """`total` cut in proportion to `weights`, in blocks; the last block may be a part of one."""
    runs = ranges([share * block for share in apportion(-(-total // block), weights)])
    return tuple(range(min(run.start, total), min(run.stop, total)) for run in runs)


@dataclass(frozen=True)
class Partition:
    """The cut of one model across `world_size` ranks. Build it with `Partition.create`.

    Args:
        args: the geometry that is cut.
        weights: the ranks' parts of the whole, summing to 1.
        heads: query heads of each rank, [start, stop) of `n_heads`.
        kv_heads: key and value heads that each rank holds; neighbours overlap where one KV head
            serves several ranks.
        ffn: columns of the FFN of each rank, [start, stop) of `ffn_dim`.
        vocab: rows of the vocabulary of each rank, [start, stop) of `vocab_size`.
    """

    args: ModelArgs
    weights: tuple[float, ...]
    heads: tuple[range, ...]
    kv_heads: tuple[range, ...]
    ffn: tuple[range, ...]
    vocab: tuple[range, ...]

    @classmethod
    def create(
        cls,
        args: ModelArgs,
        world_size: int = 1,
        tensor_split: str | Sequence[float] | None = None,
        ffn_block: int | None = None,
    ) -> Partition:
        """Cut `args` across `world_size` ranks.

        Args:
            args: the geometry, its `vocab_size` known.
            world_size: ranks of one model, at most `args.n_heads`.
            tensor_split: the ranks' weights, `"3,1"` or a sequence; None for equal shards.
            ffn_block: columns that must stay together (a quantization group); None for 32, or less
                where blocks of 32 would leave shards uneven.

        Raises:
            PartitionError: more ranks than heads, FFN blocks or vocabulary rows; an unusable split.
        """
        if world_size > args.n_heads:
            raise PartitionError(
                f"{world_size} ranks but only {args.n_heads} attention heads: start at most {args.n_heads} ranks"
            )
        weights = parse_tensor_split(tensor_split, world_size)
        heads, kv_heads = _cut_heads(args, weights)
        ffn = _cut_ffn(args, weights, heads, kv_heads, ffn_block)
        vocab = _cut_vocab(args.vocab_size, weights)
        return cls(args, weights, heads, kv_heads, ffn, vocab)

    @property
    def world_size(self) -> int:
        """Ranks of one model."""
        return len(self.weights)

    @cached_property
    def q_rows(self) -> tuple[range, ...]:
        """Rows of `wq`, and columns of `wo`, of each rank."""
        return tuple(self._features(run) for run in self.heads)

    @cached_property
    def kv_rows(self) -> tuple[range, ...]:
        """Rows of `wk` and `wv` of each rank."""
        return tuple(self._features(run) for run in self.kv_heads)

    def _features(self, heads: range) -> range:
        return range(heads.start * self.args.head_dim, heads.stop * self.args.head_dim)


def _cut_heads(args: ModelArgs, weights: Sequence[float]) -> tuple[tuple[range, ...], tuple[range, ...]]:
    """Return the query heads and the KV heads that serve them: whole groups a rank, or ranks inside one group."""
    if len(weights) <= args.n_kv_heads:
        kv_heads = ranges(apportion(args.n_kv_heads, weights))
        group = args.group_size
        return tuple(range(run.start * group, run.stop * group) for run in kv_heads), kv_heads
    sizes: list[int] = []
    kv_of_rank: list[range] = []
    for kv_head, (first, last) in enumerate(_ranks_of_groups(args, weights)):
        sizes += apportion(args.group_size, weights[first:last])
        kv_of_rank += [range(kv_head, kv_head + 1)] * (last - first)
    return ranges(sizes), tuple(kv_of_rank)


def _ranks_of_groups(args: ModelArgs, weights: Sequence[float]) -> list[tuple[int, int]]:
    """Return the run of ranks that serves each KV group, so that heads follow the weights most closely.

    With more ranks than groups each rank serves (part of) exactly one: a shortest path over
    (groups served, ranks used), the cost of a step being the squared misfit of its ranks' heads.
    """
    n_ranks, group = len(weights), args.group_size
    best: dict[int, tuple[float, list[tuple[int, int]]]] = {0: (0.0, [])}
    for served in range(1, args.n_kv_heads + 1):
        step: dict[int, tuple[float, list[tuple[int, int]]]] = {}
        left = args.n_kv_heads - served
        for used, (cost, runs) in best.items():
            for stop in range(used + 1, min(used + group, n_ranks - left) + 1):
                if n_ranks - stop > left * group:
                    continue
                shares = apportion(group, weights[used:stop])
                misfit = sum((share - weights[used + i] * args.n_heads) ** 2 for i, share in enumerate(shares))
                if stop not in step or cost + misfit < step[stop][0] - 1e-12:
                    step[stop] = (cost + misfit, [*runs, (used, stop)])
        best = step
    return best[n_ranks][1]


def _cut_ffn(
    args: ModelArgs,
    weights: Sequence[float],
    heads: Sequence[range],
    kv_heads: Sequence[range],
    block: int | None,
) -> tuple[range, ...]:
    """Return the FFN columns, so that attention and FFN together follow the weights."""
    # Columns of dim parameters: wq and wo have head_dim of them a head, wk and wv likewise.
    attention = [2 * args.head_dim * (len(q) + len(kv)) for q, kv in zip(heads, kv_heads, strict=True)]
    total = sum(attention) + 3 * args.ffn_dim
    wanted = [max(weight * total - held, 0.0) for weight, held in zip(weights, attention, strict=True)]
    if block is None:
        exact = _divides(args.ffn_dim, wanted)
        block = _largest_block(
            args.ffn_dim, FFN_BLOCK, lambda n: n % len(wanted) == 0 if exact else _is_even(n, wanted), whole=exact
        )
    elif args.ffn_dim // block < len(weights):
        raise PartitionError(f"an FFN of {args.ffn_dim} columns in groups of {block} cannot serve {len(weights)} ranks")
    return weighted_ranges(args.ffn_dim, wanted, block)


def _cut_vocab(vocab_size: int, weights: Sequence[float]) -> tuple[range, ...]:
    """Return the vocabulary rows by weight; equal ones exactly where they divide, as Meta's files have them."""
    exact = _divides(vocab_size, weights)
    block = _largest_block(
        vocab_size, VOCAB_BLOCK, lambda n: n % len(weights) == 0 if exact else n >= len(weights), whole=exact
    )
    return weighted_ranges(vocab_size, weights, block)


def _divides(total: int, weights: Sequence[float]) -> bool:
    """Return whether `total` falls into equal whole parts for ranks of equal weight."""
    return max(weights) - min(weights) < 1e-9 * max(weights) and total % len(weights) == 0


def _is_even(n_blocks: int, wanted: Sequence[float]) -> bool:
    """Return whether dealing blocks out leaves each rank within EVENNESS of its share."""
    if n_blocks < len(wanted):
        return False
    ideal = [n_blocks * columns / sum(wanted) for columns in wanted]
    shares = apportion(n_blocks, wanted)
    return all(abs(s - i) <= EVENNESS * max(i, 1.0) for s, i in zip(shares, ideal, strict=True))


def _largest_block(total: int, start: int, fits: Callable[[int], bool], whole: bool = False) -> int:
    """Return the largest block, halving from `start`, for which the number of blocks fits; 1 if none does.

    With `whole`, blocks must also fill the total without a rest.
    """
    block = start
    while block > 1 and not (fits(-(-total // block)) and not (whole and total % block)):
        block //= 2
    return block
