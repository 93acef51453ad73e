"""Which examples a step learns from: an order that follows from the seed and the step's number alone.

Nothing is remembered between steps, so a run that is resumed, or goes on at another number of ranks, takes
the same examples in the same order. Indices are into the list of training examples.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from llama.errors import DataError


@dataclass(frozen=True)
class Order:
    """The order of the training examples.

    Every epoch is a permutation of its own. An optimiser step takes the next `batch_size * accumulation`
    examples of it as up to `accumulation` batches. No step reaches into the next epoch: an epoch's last
    step takes what is left, so it may have fewer batches, and its last batch fewer examples; none is left out
    and none is taken twice.

    Args:
        n_examples: how many there are.
        batch_size: examples of a batch, over all data-parallel replicas.
        seed: what the permutations follow from, with the epoch.
        accumulation: batches whose gradients make one step.

    Raises:
        DataError: there is no example, or a size is below 1.
    """

    n_examples: int
    batch_size: int
    seed: int
    accumulation: int = 1

    def __post_init__(self) -> None:
        if self.n_examples < 1:
            raise DataError("no examples to train on: the data set is empty")
        if self.batch_size < 1:
            raise DataError(f"--batch_size is {self.batch_size}: it must be at least 1")
        if self.accumulation < 1:
            raise DataError(f"--gradient_accumulation_steps is {self.accumulation}: it must be at least 1")

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return -(-self.n_examples // (self.batch_size * self.accumulation))

    def step_batches(self, step: int) -> list[list[int]]:
        """The batches of optimiser step `step`, counted from 0 over all epochs; none of them is empty."""
        epoch, place = divmod(step, self.steps_per_epoch)
        per_step = self.batch_size * self.accumulation
        taken = _permutation(self.n_examples, self.seed, epoch)[place * per_step : (place + 1) * per_step]
        return [list(taken[start : start + self.batch_size]) for start in range(0, len(taken), self.batch_size)]


def split_eval(n: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Set examples aside for evaluation.

    Args:
        n: how many there are.
        fraction: the part to set aside, in [0, 1); 0 sets none aside, any other at least one.
        seed: which ones follows from it and from n.

    Returns:
        Indices to train on and indices to evaluate on, each in ascending order.

    Raises:
        DataError: the fraction is out of range, or nothing would be left to train on.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"--eval_fraction is {fraction}: it must be at least 0 and below 1")
    if fraction == 0:
        return list(range(n)), []
    n_eval = max(1, round(n * fraction))
    if n_eval >= n:
        raise DataError(
            f"--eval_fraction {fraction} of {n:,} examples sets {n_eval:,} aside and leaves none to train on: "
            "lower it, or set it to 0"
        )
    # Epochs count from 0, so this permutation is none of theirs.
    shuffled = _permutation(n, seed, -1)
    return sorted(shuffled[n_eval:]), sorted(shuffled[:n_eval])


def shard(indices: Sequence[int], replica: int, n_replicas: int, lengths: Sequence[int] | None = None) -> list[int]:
    """One data-parallel replica's share of a batch, in the batch's order.

    The shares of all replicas make up the batch; they are balanced by tokens: the longest example first,
    each goes to the replica with the fewest so far. A share is empty where the batch is smaller than the
    number of replicas.

    Args:
        indices: the batch.
        replica: this one, from 0.
        n_replicas: how many share the batch.
        lengths: tokens of every example, by index; without them all count the same.
    """
    sizes = [1 if lengths is None else lengths[index] for index in indices]
    loads = [0] * n_replicas
    owners = [0] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        owners[place] = min(range(n_replicas), key=loads.__getitem__)
        loads[owners[place]] += sizes[place]
    return [index for index, owner in zip(indices, owners, strict=True) if owner == replica]


@functools.lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation of range(n)."""
    generator = random.Random(f"{seed} {epoch}")
    # Python promises that random() stays the same in later versions, and nothing of shuffle().
    keys = [generator.random() for _ in range(n)]
    return tuple(sorted(range(n), key=keys.__getitem__))
