"""The formulas between a block's matrices, one function each: RMSNorm, RoPE's rotation and SwiGLU.

Each function picks its own way to compute, and all ways agree but for rounding:

- With gradient, eagerly: a backward written out here. It keeps the inputs alone, where autograd would keep what every
  operation of the formula needs and pass over memory once for each of them, which takes long on a CPU in bfloat16.
- Without gradient, eagerly, on a CPU whose kernels are loaded: one pass over memory (see `llama.kernels.block`).
- Otherwise, and in every compiled graph: the plain formula.

Shape legend: B batch, T tokens, E dim, F FFN width, H heads, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.kernels import block
from llama.kernels.products import has_gradient

Table = tuple[Tensor, Tensor]


def widened(x: Tensor) -> Tensor:
    """Return `x` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x over its root mean square, times `weight`: [..., E] and [E] to [..., E] (arXiv:1910.07467).

    Computed in float32 at least, and rounded to the dtype of x before the weight is applied.
    """
    if not torch.compiler.is_compiling() and has_gradient(x) and not weight.requires_grad:
        return _RMSNorm.apply(x, weight, eps)
    if block.serves(x, weight):
        return block.rms_norm(x, weight, eps)
    wide = widened(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.type_as(x) * weight


def rotate(x: Tensor, table: Table) -> Tensor:
    """Return x [B, T, H, D] with neighbouring pairs of features rotated by the angles of `table`.

    Computed in float32 at least.

    Args:
        x: queries or keys.
        table: cosines and sines, each [B, T, 1, D/2]; see `llama.rope.rope_table`.
    """
    cos, sin = table
    if block.serves(x) and cos.dtype == torch.float32:
        return block.rotate(x, cos, sin)
    if not torch.compiler.is_compiling():
        return _Rotation.apply(x, cos, sin)
    even, odd = widened(x).unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).type_as(x)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) * up`, all [..., F] (arXiv:2002.05202); without gradient, the result overwrites `gate`."""
    if has_gradient(gate, up):
        return F.silu(gate) * up
    # In place: fresh memory for the FFN's width takes the system longer to give than the product takes.
    if block.serves(gate, up):
        return block.swiglu_(gate, up)
    return F.silu(gate, inplace=True).mul_(up)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm whose weight is frozen; keeps x and one factor a row."""

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
        # The gradient has no part along x: the norm does not change when x is made longer.
        along = torch.linalg.vecdot(slope, wide).div_(x.shape[-1]).unsqueeze(-1).mul_(scale.pow(3))
        return slope.mul_(scale).addcmul_(wide, along, value=-1).to(x.dtype), None, None


class _Rotation(torch.autograd.Function):
    """The rotation as a product of complex numbers; the backward rotates back, and x is not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _times(x, torch.complex(cos, sin))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _times(grads[0], torch.complex(cos, -sin)), None, None


def _times(x: Tensor, factors: Tensor) -> Tensor:
    """Return x [B, T, H, D], its neighbouring features read as complex numbers, times `factors` [B, T, 1, D/2]."""
    pairs = torch.view_as_complex(widened(x).contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * factors).flatten(-2).to(x.dtype)
