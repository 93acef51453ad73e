"""Probabilities over a vocabulary that lies cut across ranks, without gathering the logits.

Shape legend: V' this rank's part of the vocabulary.
"""

import torch
from torch import Tensor

from llama.parallel.collectives import all_reduce
from llama.parallel.groups import Ranks


def log_sum_exp(logits: Tensor, ranks: Ranks) -> Tensor:
    """Logarithm of the softmax denominator over all ranks: [..., V'] float32 to [...]."""
    local = torch.logsumexp(logits, dim=-1)
    if ranks.world_size == 1:
        return local
    largest = all_reduce(local, ranks, "max")
    return largest + all_reduce((local - largest).exp(), ranks).log()


def log_probs_of(logits: Tensor, targets: Tensor, own: range, ranks: Ranks) -> Tensor:
    """Log-probability of each target: logits [..., V'] float32, targets [...] int64 to [...] float32."""
    local = targets - own.start
    foreign = (local < 0) | (local >= len(own))
    picked = logits.gather(-1, local.masked_fill(foreign, 0).unsqueeze(-1)).squeeze(-1)
    picked = all_reduce(picked.masked_fill(foreign, 0.0), ranks)
    return picked - log_sum_exp(logits, ranks)
