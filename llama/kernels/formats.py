"""Matrices in int8 and int4, in plain torch: rounding, packing and dequantization.

int8: [N, K] and one float32 scale per row. int4: groups of columns of a row share a bfloat16 scale; 16 bytes hold 32
columns, where byte j has column j in its low half and column 16 + j in its high half, biased by 8 (as GGUF's q4_0).
Whole groups are therefore whole bytes, and a matrix can be cut wherever a group ends.

Shape legend: N rows, K columns, G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llama.errors import QuantizationError

BLOCK = 32  # columns that are packed together
GROUP_SIZES = (32, 64, 128)
KINDS = ("int8", "int4")
BIAS = 8


@dataclass(frozen=True)
class Form:
    """The format of one quantized matrix.

    Args:
        kind: "int8" or "int4".
        group_size: columns that share a scale; 0 for int8, which has one scale per row.

    Raises:
        QuantizationError: for another kind or size.
    """

    kind: str
    group_size: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise QuantizationError(f"quantization {self.kind!r} is not one of {', '.join(KINDS)}")
        if self.kind == "int4" and self.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise QuantizationError(f"group_size {self.group_size} is not one of {sizes}")
        if self.kind == "int8" and self.group_size:
            raise QuantizationError("int8 has one scale a row: leave group_size out")

    @property
    def block(self) -> int:
        """Columns that must stay together."""
        return self.group_size or 1

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the packed integers."""
        return torch.int8 if self.kind == "int8" else torch.uint8

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of the scales."""
        return torch.float32 if self.kind == "int8" else torch.bfloat16

    @property
    def columns_per_byte(self) -> int:
        """Columns of the matrix that one packed column holds."""
        return 1 if self.kind == "int8" else 2

    def scale_shape(self, n_rows: int, n_columns: int) -> tuple[int, ...]:
        """Return the shape of the scales: [N] for int8, [N, G] for int4."""
        return (n_rows,) if self.kind == "int8" else (n_rows, n_columns // self.group_size)

    def nbytes(self, n_rows: int, n_columns: int) -> int:
        """Return the bytes of a matrix [n_rows, n_columns], its scales included."""
        scales = torch.Size(self.scale_shape(n_rows, n_columns)).numel() * self.scale_dtype.itemsize
        return n_rows * n_columns // self.columns_per_byte + scales

    def check_columns(self, n_columns: int, name: str) -> None:
        """Refuse a matrix `name` whose rows do not divide into whole groups.

        Raises:
            QuantizationError: naming both numbers.
        """
        if n_columns % self.block:
            fitting = [str(size) for size in GROUP_SIZES if n_columns % size == 0]
            way = f"use group_size {' or '.join(fitting)}" if fitting else "use int8"
            raise QuantizationError(
                f"{name} has rows of {n_columns}, which groups of {self.block} do not divide: {way}"
            )


INT8 = Form("int8")


def row_scales(rows: Tensor) -> Tensor:
    """Return int8's scale of each row, from its largest magnitude: [N, K] to [N] float32; 1 for a row of zeros."""
    largest = rows.abs().amax(dim=-1).to(torch.float32)
    return torch.where(largest > 0, largest / 127, 1.0)


def to_int8(rows: Tensor, scales: Tensor) -> Tensor:
    """Return rows rounded to their scales: [N, K] and [N] to [N, K] int8."""
    return (rows.to(torch.float32) / scales.unsqueeze(-1)).round_().clamp_(-127, 127).to(torch.int8)


def group_scales(rows: Tensor, group_size: int) -> Tensor:
    """Return int4's scale of each group: [N, K] to [N, G] bfloat16.

    The value of largest magnitude becomes -8, so that all 16 integers are used; a scale may be negative.
    """
    groups = rows.to(torch.float32).unflatten(-1, (-1, group_size))
    at = groups.abs().argmax(dim=-1, keepdim=True)
    scales = (groups.gather(-1, at).squeeze(-1) / -BIAS).to(torch.bfloat16)
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def round_groups(rows: Tensor, scales: Tensor) -> Tensor:
    """Return rows rounded to their groups' scales: [N, K] and [N, G] to [N, K] uint8 from 0 to 15."""
    groups = rows.to(torch.float32).unflatten(-1, (scales.shape[-1], -1))
    numbers = (groups / scales.to(torch.float32).unsqueeze(-1)).round_().add_(BIAS).clamp_(0, 15)
    return numbers.flatten(-2).to(torch.uint8)


def pack_int4(numbers: Tensor) -> Tensor:
    """Pack integers from 0 to 15, two per byte: [N, K] uint8 to [N, K / 2]."""
    low, high = numbers.unflatten(-1, (-1, 2, BLOCK // 2)).unbind(-2)
    return (low | high << 4).flatten(-2)


def unpack_int4(packed: Tensor) -> Tensor:
    """Undo `pack_int4`: [N, K / 2] uint8 to [N, K] from 0 to 15."""
    halves = packed.unflatten(-1, (-1, BLOCK // 2))
    return torch.stack((halves & 15, halves >> 4), dim=-2).flatten(-3)


def quantize(rows: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Round whole rows [N, K] to the nearest; return the packed integers and their scales in the format `form`."""
    if form.kind == "int8":
        scales = row_scales(rows)
        return to_int8(rows, scales), scales
    scales = group_scales(rows, form.group_size)
    return pack_int4(round_groups(rows, scales)), scales


def dequantize(packed: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values of packed integers, [N, K] of `dtype`; the integers' own dtype tells int8 from int4."""
    if packed.dtype == torch.int8:
        return (packed.to(torch.float32) * scales.unsqueeze(-1)).to(dtype)
    numbers = unpack_int4(packed).to(torch.float32).sub_(BIAS).unflatten(-1, (scales.shape[-1], -1))
    return (numbers * scales.to(torch.float32).unsqueeze(-1)).flatten(-2).to(dtype)
