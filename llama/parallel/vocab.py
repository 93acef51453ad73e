"""Probabilities over a vocabulary that lies cut across ranks, without gathering the logits.

Shape legend: V' this rank's part of the vocabulary.
"""

import torch
from torch import Tensor

from llama.parallel.collectives import all_reduce
from llama.parallel.groups import Ranks

# Logits that exist at a time where a loss is computed piece by piece.
MAX_LOSS_LOGITS = 8 << 20


def log_sum_exp(logits: Tensor, ranks: Ranks) -> Tensor:
    """Logarithm of the softmax denominator over all ranks: [..., V'] float32 to [...]."""
    local = torch.logsumexp(logits, dim=-1)
    if ranks.world_size == 1:
        return local
    largest = all_reduce(local, ranks, "max")
    return largest + all_reduce((local - largest).exp(), ranks).log()


def exponentials_(logits: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Turn logits [..., V'] float32 into their exponentials, in place, each row's largest scaled to 1.

    Returns:
        The logarithm of the softmax denominator over all ranks, [...]; the sum of each row's exponentials over all
        ranks, [...], by which they become probabilities.
    """
    largest = all_reduce(logits.amax(dim=-1), ranks, "max")
    total = all_reduce(logits.sub_(largest.unsqueeze(-1)).exp_().sum(dim=-1), ranks)
    return largest + total.log(), total


def logits_of(logits: Tensor, targets: Tensor, own: range, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """The logit of each target, wherever it lies: logits [..., V'], targets [...] int64 to [...].

    Returns:
        The logits; which targets are this rank's own, [...] bool; where it has them, [...] int64 (0 for others).
    """
    local = targets - own.start
    mine = (local >= 0) & (local < len(own))
    local = local.masked_fill(~mine, 0)
    picked = logits.gather(-1, local.unsqueeze(-1)).squeeze(-1)
    return all_reduce(picked.masked_fill(~mine, 0.0), ranks), mine, local


def log_probs_of(logits: Tensor, targets: Tensor, own: range, ranks: Ranks) -> Tensor:
    """Log-probability of each target: logits [..., V'] float32, targets [...] int64 to [...] float32."""
    return logits_of(logits, targets, own, ranks)[0] - log_sum_exp(logits, ranks)
