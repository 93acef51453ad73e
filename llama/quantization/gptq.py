"""GPTQ (arXiv:2210.17323): int4 numbers and scales chosen for the least error of a layer's outputs, not of its weights.

A matrix's columns are rounded one after another. The columns that follow compensate for a column's error, as far as
the Hessian of the layer's inputs allows. Three things go beyond the paper's plain form:

- Important columns come first, while many are left to compensate for them: groups are ordered by their part of the
  Hessian's diagonal, and so are the columns of a group. Groups stay whole, so the packed format is the usual one.
- A group's scale is found by trying: the group is rounded with several scales, and each row keeps its best.
- The inputs of a quantized model's layer have drifted from the original's. The matrix is first moved so that its
  outputs on the drifted inputs are near the original outputs (as in GPTAQ, arXiv:2504.02692).

All of it is computed in float64, so the result does not depend on the size of the blocks.

Shape legend: N rows, K columns, G columns of a group, C scales that are tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.errors import QuantizationError
from llama.kernels.formats import BIAS, group_scales, pack_int4

# Part of the Hessian's mean diagonal that is added to the diagonal.
DAMPING = 0.01
# Scales to try, as multiples of the scale by which the value of largest magnitude becomes -8.
FACTORS = (0.85, 0.9, 0.95, 1.0, 1.05)
# Columns after which errors are carried to all later columns.
BLOCK = 128
# Rows that are worked on at a time; no row depends on another.
ROWS = 4096


@dataclass(frozen=True)
class Inputs:
    """Statistics of a layer's inputs, prepared once for all the matrices that read them.

    Args:
        group_size: columns that share a scale.
        order: column of the matrix that is rounded first, second and so on, [K] int64.
        factor: U, upper triangular with `U^T U` the inverse of the damped Hessian in that order, [K, K] float64. Row i
            says how the columns after i compensate for an error in column i.
        shift: P for which `W + W P` on the drifted inputs is nearest to W on the original inputs, in that order,
            [K, K] float64; None where the inputs have not drifted.
    """

    group_size: int
    order: Tensor
    factor: Tensor
    shift: Tensor | None = None

    @classmethod
    def create(
        cls,
        hessian: Tensor,
        group_size: int,
        drift: Tensor | None = None,
        n_inputs: int = 1,
        damping: float = DAMPING,
    ) -> Inputs:
        """Return the statistics of sums over the inputs.

        Args:
            hessian: sum of `x x^T` over the inputs x of the quantized model, [K, K] float32 or float64.
            group_size: columns that share a scale.
            drift: sum of `(x0 - x) x^T`, x0 the original model's input in the same place, [K, K].
            n_inputs: the number of inputs; it counts where there is drift.
            damping: part of the Hessian's mean diagonal that is added to its diagonal.

        Raises:
            QuantizationError: for sums that are not finite.
        """
        if not hessian.isfinite().all() or not (drift is None or drift.isfinite().all()):
            raise QuantizationError("the calibration text makes activations that are not finite: use another text")
        order = column_order(hessian.diagonal(), group_size)
        hessian = hessian[order][:, order]
        shift = None
        if drift is not None:
            # A regression of K numbers on the inputs: the fewer the inputs, the more it must be damped.
            lower = torch.linalg.cholesky(damped(hessian, max(damping, len(hessian) / n_inputs)))
            shift = torch.cholesky_solve(drift[order][:, order].T.to(torch.float64), lower).T
        return cls(group_size, order, inverse_factor(hessian, damping), shift)


def column_order(importance: Tensor, group_size: int) -> Tensor:
    """Return columns in the order of rounding, [K] to [K] int64: important groups first, and so within each group."""
    groups = importance.unflatten(0, (-1, group_size))
    within = groups.argsort(dim=1, descending=True, stable=True)
    first = groups.sum(dim=1).argsort(dim=0, descending=True, stable=True)
    return (first.unsqueeze(1) * group_size + within[first]).flatten()


def damped(hessian: Tensor, damping: float) -> Tensor:
    """Return the Hessian with a part of its mean diagonal added to its diagonal: [K, K] to [K, K] float64."""
    sums = hessian.to(torch.float64, copy=True)
    diagonal = sums.diagonal()
    diagonal.add_(damping * diagonal.mean())
    diagonal[diagonal == 0] = 1.0
    return sums


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return U, upper triangular with `U^T U` the inverse of the damped Hessian: [K, K] to [K, K] float64.

    A dead column, whose input is always zero, is independent of all others: it is rounded to the nearest, since
    another text may use it.
    """
    lower = torch.linalg.cholesky(damped(hessian, damping))
    return torch.linalg.cholesky(torch.cholesky_inverse(lower, out=lower), upper=True)


def gptq(
    rows: Tensor, inputs: Inputs, *, factors: Sequence[float] = FACTORS, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Quantize whole rows [N, K] to int4; return packed integers and scales as `llama.kernels.formats.quantize` does.

    Args:
        rows: the matrix.
        inputs: of the layer.
        factors: multiples of the plain scale to try; (1.0,) for the plain scale alone.
        block: columns between updates of all later columns; it changes the speed alone.
    """
    pieces = [_Rows(piece, inputs).rounded(factors, block) for piece in rows.split(ROWS)]
    numbers, scales = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    # Back from the order of rounding to that of storage.
    place = inputs.order.argsort()
    groups = place[:: inputs.group_size] // inputs.group_size
    return pack_int4(numbers[:, place]), scales[:, groups]


class _Rows:
    """Rows of a matrix in the order of rounding; columns not yet rounded compensate for the errors of the others."""

    def __init__(self, rows: Tensor, inputs: Inputs) -> None:
        self.rows = rows.to(torch.float64)[:, inputs.order]
        self.factor, self.group_size = inputs.factor, inputs.group_size
        if inputs.shift is not None:
            self.rows = self.rows + self.rows @ inputs.shift

    def rounded(self, factors: Sequence[float], block: int) -> tuple[Tensor, Tensor]:
        """Return numbers from 0 to 15, [N, K] uint8, and scales, [N, K / G] bfloat16."""
        numbers, scales = torch.empty_like(self.rows, dtype=torch.uint8), []
        n_columns, size = self.rows.shape[1], self.group_size
        block = max(1, block // size) * size
        for first in range(0, n_columns, block):
            last = min(first + block, n_columns)
            errors = torch.empty_like(self.rows[:, first:last])
            for start in range(first, last, size):
                own = slice(start, start + size)
                numbers[:, own], chosen, error = self._round_group(own, factors)
                scales.append(chosen)
                errors[:, start - first : start - first + size] = error
                self.rows[:, own.stop : last] -= error @ self.factor[own, own.stop : last]
            self.rows[:, last:] -= errors @ self.factor[first:last, last:]
        return numbers, torch.stack(scales, dim=1)

    def _round_group(self, own: slice, factors: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
        """Round a group with every scale and keep each row's best: numbers [N, G], scales [N], errors [N, G]."""
        rows, factor = self.rows[:, own], self.factor[own, own]
        scales = _candidates(rows, factors)  # [C, N]
        wide = scales.to(rows.dtype)
        left = rows.expand(len(scales), -1, -1).clone()  # [C, N, G]
        numbers, errors = torch.empty_like(left, dtype=torch.uint8), torch.empty_like(left)
        for column in range(self.group_size):
            values = left[..., column]
            number = (values / wide).round_().add_(BIAS).clamp_(0, 2 * BIAS - 1)
            error = (values - (number - BIAS) * wide) / factor[column, column]
            left[..., column + 1 :] -= error.unsqueeze(-1) * factor[column, column + 1 :]
            numbers[..., column], errors[..., column] = number, error
        # The sum of squares is the group's part of the output's error once all later columns have compensated.
        best = errors.square().sum(dim=-1).argmin(dim=0)
        at = torch.arange(len(best), device=best.device)
        return numbers[best, at], scales[best, at], errors[best, at]


def _candidates(rows: Tensor, factors: Sequence[float]) -> Tensor:
    """Return scales to try for a group of each row: [N, G] to [C, N] bfloat16, none of them zero."""
    plain = group_scales(rows, rows.shape[1])  # [N, 1]
    scales = (plain.to(torch.float32) * torch.tensor(factors, device=rows.device)).to(torch.bfloat16)
    return torch.where(scales == 0, plain, scales).T.contiguous()
