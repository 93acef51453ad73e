"""Cross-entropy of the supervised places alone, over a vocabulary that is cut across ranks.

The output layer is frozen, so its backward yields only the gradient of its input. Loss and gradient are computed
together, piece by piece: the logits of a whole batch never exist, and no logits are gathered. As in Megatron
(arXiv:1909.08053) and Liger Kernel (arXiv:2410.10989).

Shape legend: M supervised places, E dim, V' this rank's part of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llama.model import Transformer
from llama.parallel.vocab import exponentials_, logits_of, loss_rows


def cross_entropy(model: Transformer, hidden: Tensor, targets: Tensor, weights: Tensor, factor: float) -> Tensor:
    """Return the weighted sum of the targets' negative log-probabilities, times `factor`: a scalar, equal on all ranks.

    Args:
        model: the model whose output layer computes the logits; its weights get no gradient.
        hidden: [M, E] in the model's dtype.
        targets: [M] int64.
        weights: [M] float32.
        factor: multiplies loss and gradient, such as one over the number of targets; it includes the loss scale, which
            keeps small gradients from underflowing in float16.
    """
    return _CrossEntropy.apply(hidden, model, targets, weights, factor)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, model: Transformer, targets: Tensor, weights: Tensor, factor: float
    ) -> Tensor:
        rows = loss_rows(model.partition.vocab)
        pieces = zip(hidden.split(rows), targets.split(rows), weights.split(rows), strict=True)
        losses, gradients = zip(
            *(_piece(model, *piece, factor, ctx.needs_input_grad[0]) for piece in pieces), strict=True
        )
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None, None


def _piece(
    model: Transformer, hidden: Tensor, targets: Tensor, weights: Tensor, factor: float, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return the loss of some places, and its gradient by `hidden` (empty where none is wanted)."""
    with torch.set_grad_enabled(wants_gradient):
        entered = hidden.detach().requires_grad_(wants_gradient)
        logits = model.logits(entered)
    scores = logits.detach()
    own = model.partition.vocab[model.ranks.rank]
    wanted, mine, local = logits_of(scores, targets, own, model.ranks)
    weights = weights.to(scores.dtype) * factor
    log_norm, total = exponentials_(scores, model.ranks)
    loss = ((log_norm - wanted) * weights).sum()
    if not wants_gradient:
        return loss, hidden[:0]
    slope = scores.mul_((weights / total).unsqueeze(1))
    slope.scatter_add_(1, local.unsqueeze(1), -(mine * weights).unsqueeze(1))
    return loss, torch.autograd.grad(logits, entered, slope)[0]
