"""A block's arithmetic around its matrices, with the backward written out: less is kept, fewer passes are made.

Autograd keeps what every operation of a formula needs and passes over memory once for each of them; on a CPU in
bfloat16 norms and rotations then take longer than they should. Each function here keeps
its inputs alone. They serve passes with gradient: inference and compiled graphs have the plain formulas.

Shape legend: B batch, T tokens, E dim, H heads, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def applies(x: Tensor) -> bool:
    """Whether this pass through `x` is one with gradient, run eagerly."""
    return x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def widened(x: Tensor) -> Tensor:
    """`x` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The root-mean-square norm of x [..., E], times a frozen weight [E]; see `llama.model.RMSNorm`."""
    return _RMSNorm.apply(x, weight, eps)


def turn_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring pairs of features of x [B, T, H, D] turned by [B, T, 1, D/2]; see `llama.rope.apply_rope`."""
    return _Turn.apply(x, cos, sin)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = widened(x)
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        wide, slope = widened(x), widened(grads[0] * weight)
        # What is left along x itself: the norm does not change when x is made longer.
        along = torch.linalg.vecdot(slope, wide).div_(x.shape[-1]).unsqueeze(-1).mul_(scale.pow(3))
        return slope.mul_(scale).addcmul_(wide, along, value=-1).to(x.dtype), None, None


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, torch.complex(cos, sin))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], torch.complex(cos, -sin)), None, None


def _turn(x: Tensor, by: Tensor) -> Tensor:
    pairs = torch.view_as_complex(widened(x).contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * by).flatten(-2).to(x.dtype)
