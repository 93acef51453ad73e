"""What a block computes between its matrices, each in one pass, on a CPU whose kernels are loaded; see `block.h`.

They serve eager passes without gradient. Elsewhere the plain formulas stand, which these are held against.

Shape legend: B batch, T tokens, E dim, F FFN width, H heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama.kernels import products

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors."""
    return (
        products.is_enabled()
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and all(tensor.device.type == "cpu" and tensor.dtype == tensors[0].dtype for tensor in tensors)
        and tensors[0].dtype in DTYPES
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `llama.model.RMSNorm`: x [..., E] and weight [E] to [..., E]."""
    return torch.ops.llama_shards.rms_norm(x, weight, eps)


def turn_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `llama.rope.apply_rope`: x [B, T, H, D] turned by [B, T, 1, D/2] float32."""
    return torch.ops.llama_shards.turn_pairs(x, cos, sin)


def swiglu_(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` in the place of gate, both [..., F], rounded once (arXiv:2002.05202)."""
    torch.ops.llama_shards.swiglu_(gate, up)
    return gate
