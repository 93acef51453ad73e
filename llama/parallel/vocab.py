"""Probabilities over a vocabulary that is cut across ranks, without gathering the logits.

Shape legend: V' this rank's part of the vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llama.parallel.collectives import all_reduce
from llama.parallel.groups import Ranks

# Logits that a rank holds at a time while a loss is computed piece by piece.
MAX_LOSS_LOGITS = 8 << 20


def loss_rows(cuts: Sequence[range]) -> int:
    """Return the places whose loss is computed at a time, the same on every rank.

    The largest part of the vocabulary decides: each piece is several collectives, in which all ranks must meet.

    Args:
        cuts: each rank's part of the vocabulary.
    """
    return max(1, MAX_LOSS_LOGITS // max(map(len, cuts)))


def log_sum_exp(logits: Tensor, ranks: Ranks) -> Tensor:
    """Return the logarithm of the softmax denominator over all ranks: [..., V'] float32 to [...]."""
    local = torch.logsumexp(logits, dim=-1)
    if ranks.world_size == 1:
        return local
    largest = all_reduce(local, ranks, "max")
    return largest + all_reduce((local - largest).exp(), ranks).log()


def exponentials_(logits: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Replace logits [..., V'] float32 by their exponentials, in place, scaled so that each row's largest is 1.

    Returns:
        The logarithm of the softmax denominator over all ranks, [...]. The sum of each row's exponentials over all
        ranks, [...]: divided by this sum, exponentials are probabilities.
    """
    largest = all_reduce(logits.amax(dim=-1), ranks, "max")
    total = all_reduce(logits.sub_(largest.unsqueeze(-1)).exp_().sum(dim=-1), ranks)
    return largest + total.log(), total


def logits_of(logits: Tensor, targets: Tensor, own: range, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logit of each target, whichever rank holds it: logits [..., V'], targets [...] int64 to [...].

    Returns:
        The targets' logits [...]; whether this rank holds a target, [...] bool; the target's index in this rank's part,
        [...] int64, 0 for targets of other ranks.
    """
    local = targets - own.start
    mine = (local >= 0) & (local < len(own))
    local = local.masked_fill(~mine, 0)
    picked = logits.gather(-1, local.unsqueeze(-1)).squeeze(-1)
    return all_reduce(picked.masked_fill(~mine, 0.0), ranks), mine, local


def log_probs_of(logits: Tensor, targets: Tensor, own: range, ranks: Ranks) -> Tensor:
    """Return the log-probability of each target: logits [..., V'] float32, targets [...] int64 to [...] float32."""
    return logits_of(logits, targets, own, ranks)[0] - log_sum_exp(logits, ranks)
