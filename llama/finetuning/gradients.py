"""Gradients of trained tensors over ranks and copies of the model: summed in one message, measured, clipped."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llama.finetuning.trained import Trained
from llama.parallel.collectives import all_reduce
from llama.parallel.groups import Ranks


def settle(trained: Sequence[Trained], ranks: Ranks, replicas: Ranks) -> None:
    """Make every gradient that of the whole model and the whole batch, in one message for each.

    Args:
        trained: whose parameters' gradients are set, to zeros where the batch had none for this process.
        ranks: those that share the model.
        replicas: those that hold this rank's shard in other copies of the model.
    """
    addends = [(tensor, addend) for tensor in trained if (addend := tensor.addend()) is not None]
    for (tensor, _), total in zip(addends, _summed([addend for _, addend in addends], ranks), strict=True):
        tensor.take(total)
    gradients = [tensor.gradient() for tensor in trained]
    for gradient, total in zip(gradients, _summed(gradients, replicas), strict=True):
        gradient.copy_(total)


def _summed(tensors: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    """Every tensor's sum over the ranks; one collective for all of them."""
    if ranks.world_size == 1 or not tensors:
        return list(tensors)
    total = all_reduce(torch.cat([tensor.flatten() for tensor in tensors]), ranks)
    pieces = total.split([tensor.numel() for tensor in tensors])
    return [piece.view_as(tensor) for tensor, piece in zip(tensors, pieces, strict=True)]


def gradient_norm(trained: Sequence[Trained], ranks: Ranks) -> float:
    """Euclidean norm of the whole gradient, every entry counted once; a collective call."""
    squares = torch.stack([tensor.square_sum() for tensor in trained]).sum()
    return math.sqrt(float(all_reduce(squares, ranks)))


def clip(trained: Sequence[Trained], norm: float, max_norm: float, scale: float = 1.0) -> None:
    """Divide every gradient by `scale` and shorten the whole to `max_norm`, as torch's `clip_grad_norm_` does.

    Args:
        trained: whose gradients are changed.
        norm: of the gradient after the division.
        max_norm: the longest that it may be.
        scale: the loss scale.
    """
    factor = min(1.0, max_norm / (norm + 1e-6)) / scale
    if factor == 1.0:
        return
    for tensor in trained:
        if tensor.parameter.grad is not None:
            tensor.parameter.grad.mul_(factor)
