"""Batches: the examples of each step, as a function of the seed and the step's number alone.

No state is kept between steps, so a run that is resumed, even at another number of ranks, sees the same examples in the
same order. Indices point into the list of training examples.
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

    Every epoch is a new permutation. An optimiser step takes the epoch's next `batch_size * accumulation` examples, as
    up to `accumulation` batches. No step reaches into the next epoch: the last step of an epoch takes the rest, so it
    may have fewer batches, and its last batch fewer examples. Every epoch has each example exactly once.

    Args:
        n_examples: number of training examples.
        batch_size: examples per batch, over all data-parallel replicas.
        seed: of the permutations.
        accumulation: batches whose gradients make one step.

    Raises:
        DataError: when there is no example, or a size is below 1.
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
        """Optimiser steps per epoch."""
        return -(-self.n_examples // (self.batch_size * self.accumulation))

    def step_batches(self, step: int) -> list[list[int]]:
        """Return the batches of optimiser step `step`, counted from 0 over all epochs; no batch is empty."""
        epoch, place = divmod(step, self.steps_per_epoch)
        per_step = self.batch_size * self.accumulation
        taken = _permutation(self.n_examples, self.seed, epoch)[place * per_step : (place + 1) * per_step]
        return [list(taken[start : start + self.batch_size]) for start in range(0, len(taken), self.batch_size)]


def split_eval(n: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Set examples aside for evaluation.

    Args:
        n: number of examples.
        fraction: the part to set aside, in [0, 1); 0 sets none aside, any other fraction at least one.
        seed: of the choice, which depends on nothing else but n.

    Returns:
        Indices to train on and indices to evaluate on, each in ascending order.

    Raises:
        DataError: when the fraction is out of range, or nothing would be left to train on.
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
    # Epochs count from 0, so this permutation differs from all of theirs.
    shuffled = _permutation(n, seed, -1)
    return sorted(shuffled[n_eval:]), sorted(shuffled[:n_eval])


def shard(indices: Sequence[int], replica: int, n_replicas: int, lengths: Sequence[int] | None = None) -> list[int]:
    """Return one data-parallel replica's share of a batch, in the batch's order.

    Each example belongs to one share. Shares are balanced by tokens: from the longest example on, each goes to the
    replica with the fewest tokens so far. A share is empty where the batch has fewer examples than there are replicas.

    Args:
        indices: the batch.
        replica: number of this replica, from 0.
        n_replicas: number of replicas.
        lengths: tokens of every example, by index; None counts all examples as equal.
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
    """Return a permutation of range(n)."""
    generator = random.Random(f"{seed} {epoch}")
    # Python guarantees random() across versions, but not shuffle().
    keys = [generator.random() for _ in range(n)]
    return tuple(sorted(range(n), key=keys.__getitem__))
