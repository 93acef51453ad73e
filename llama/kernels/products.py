"""Products of activations with large matrices: by our CPU kernels where they are loaded and fit, else by torch.

A matrix is held in a floating dtype, or as packed integers with scales (see `llama.kernels.formats`).

Shape legend: M rows of x, N rows of the matrix, K columns.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.kernels.build import load_kernels
from llama.kernels.formats import Form, dequantize, quantize, row_scales, to_int8

# A smaller shard decodes in a few milliseconds per token without kernels.
WORTH_BUILDING_BYTES = 256 << 20
# Rows of x up to which packed integers are multiplied directly; for more rows, dequantizing first costs less.
FEW_ROWS = 16
# Rows of a matrix that are dequantized at a time, few enough to stay in a cache until they are multiplied: for matrices
# of up to LONG columns, and of more. Some other numbers, such as 512, take oneDNN twice as long (docs/speed.md).
LONG, PIECE, LONG_PIECE = 4096, 1024, 256
# Lengths from one power of two to the next that `round_up` returns.
LENGTH_STEPS = 24

_loaded = False


# -- loading the kernels ---------------------------------------------------------------------------


def enable() -> bool:
    """Build and load the kernels where this machine can; return whether they are loaded."""
    global _loaded
    if not _loaded and load_kernels():
        _register_shapes()
        _loaded = True
    return _loaded


def is_enabled() -> bool:
    """Return whether the kernels are loaded."""
    return _loaded


def serve(dtype: torch.dtype, has_integers: bool) -> bool:
    """Return whether there are kernels for a model computed in `dtype`, or with quantized weights."""
    return has_integers or dtype == torch.bfloat16


def worth_building(n_bytes: int) -> bool:
    """Return whether the kernels save more time on a shard of `n_bytes` than building them takes."""
    return n_bytes >= WORTH_BUILDING_BYTES


@cache
def _register_shapes() -> None:
    """Tell torch.compile the shapes of the kernels' results."""

    def product(x: Tensor, weight: Tensor, *_: Tensor) -> Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    for name in ("bf16_row", "int8_linear", "int4_linear"):
        torch.library.register_fake(f"llama_shards::{name}", product)
    for name, per_byte in (("int8_values", 1), ("int4_values", 2)):

        def numbers(packed: Tensor, scales: Tensor, like: Tensor, per_byte: int = per_byte) -> Tensor:
            return like.new_empty(packed.shape[0], per_byte * packed.shape[1])

        torch.library.register_fake(f"llama_shards::{name}", numbers)


# -- products --------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x W^T`: x [..., K] and weight [N, K] to [..., N]."""
    if _loaded and _is_one_row(x) and x.dtype == weight.dtype == torch.bfloat16 and not has_gradient(x, weight):
        return torch.ops.llama_shards.bf16_row(x, weight)
    return F.linear(x, weight)


def packed_linear(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """Return `x W^T` for a W of packed integers: x [..., K] to [..., N]; see `llama.kernels.formats`."""
    if has_gradient(x):
        return _PackedLinear.apply(x, packed, scales)
    if _loaded and x.device.type == "cpu" and x.numel() <= FEW_ROWS * x.shape[-1]:
        kernel = (
            torch.ops.llama_shards.int8_linear if packed.dtype == torch.int8 else torch.ops.llama_shards.int4_linear
        )
        return kernel(x, packed, scales)
    return _in_pieces(x, packed, scales)


def _is_one_row(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.numel() == x.shape[-1]


def has_gradient(*tensors: Tensor) -> bool:
    """Return whether autograd records an operation on these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def piece_rows(n_columns: int) -> int:
    """Return how many rows are dequantized at a time."""
    return PIECE if n_columns <= LONG else LONG_PIECE


def _pieces(packed: Tensor) -> list[slice]:
    """Return the runs of rows of a matrix that are dequantized one after another."""
    n_rows, step = packed.shape[0], piece_rows(packed.shape[1] * (1 if packed.dtype == torch.int8 else 2))
    return [slice(first, min(first + step, n_rows)) for first in range(0, n_rows, step)]


def _in_pieces(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    parts = [F.linear(x, values(packed[rows], scales[rows], x.dtype)) for rows in _pieces(packed)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class _PackedLinear(torch.autograd.Function):
    """The product with packed integers; the backward dequantizes again, so that the whole matrix never exists."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(packed, scales)
        return _in_pieces(x, packed, scales)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        packed, scales = ctx.saved_tensors
        grad = grads[0]
        total: Tensor | None = None
        for rows in _pieces(packed):
            part = grad[..., rows] @ values(packed[rows], scales[rows], grad.dtype)
            total = part if total is None else total.add_(part)
            del part  # before the next one is made
        assert total is not None
        return total, None, None


# -- packed matrices -------------------------------------------------------------------------------


def pack(rows: Tensor, form: Form, columns: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Round rows [N, K] float32 to the nearest; return the packed integers of `columns`, and their scales.

    int8's scales are always those of the whole rows.
    """
    if _loaded and rows.device.type == "cpu":
        if form.kind == "int4":
            return torch.ops.llama_shards.int4_pack(rows[:, columns], form.group_size)
        start, stop, _ = columns.indices(rows.shape[1])
        return torch.ops.llama_shards.int8_pack(rows, start, stop)
    if form.kind == "int4":
        return quantize(rows[:, columns], form)
    scales = row_scales(rows)
    return to_int8(rows[:, columns], scales), scales


def values(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of packed integers, [N, K] of `dtype`."""
    if _loaded and packed.device.type == "cpu":
        kernels = torch.ops.llama_shards
        widen = kernels.int8_values if packed.dtype == torch.int8 else kernels.int4_values
        return widen(packed, scales, torch.empty(0, dtype=dtype))
    return dequantize(packed, scales, dtype)


# -- lengths ---------------------------------------------------------------------------------------


def round_up(length: int) -> int:
    """Round a length up to one of a few, at most 1 / LENGTH_STEPS longer.

    oneDNN compiles a kernel for each shape that it meets and keeps a limited number of them: few lengths reuse kernels.
    """
    step = max(1, 2 ** (length.bit_length() - 1) // LENGTH_STEPS)
    return step * -(-length // step)
