"""Our CPU kernels of the formulas between a block's matrices, one pass over memory each; see `block.h`.

`llama.ops` decides when they run and has the plain formulas, which tests hold these against.

Shape legend: B batch, T tokens, E dim, F FFN width, H heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama.kernels.products import has_gradient, is_enabled

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def serves(*tensors: Tensor) -> bool:
    """Return whether the kernels take these tensors: on the CPU, of one dtype, eagerly and without gradient."""
    return (
        is_enabled()
        and not torch.compiler.is_compiling()
        and not has_gradient(*tensors)
        and all(tensor.device.type == "cpu" and tensor.dtype == tensors[0].dtype for tensor in tensors)
        and tensors[0].dtype in DTYPES
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `llama.ops.rms_norm`: x [..., E] and weight [E] to [..., E]."""
    return torch.ops.llama_shards.rms_norm(x, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `llama.ops.rotate`: x [B, T, H, D] rotated by cos and sin [B, T, 1, D/2] float32."""
    return torch.ops.llama_shards.rotate(x, cos, sin)


def swiglu_(gate: Tensor, up: Tensor) -> Tensor:
    """Overwrite gate with `silu(gate) * up`, both [..., F], rounded once; return gate."""
    torch.ops.llama_shards.swiglu_(gate, up)
    return gate
