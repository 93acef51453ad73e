"""GPTQ by itself: against the paper's own recursion, plain rounding, and cuts of the work that must change nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llama.errors import QuantizationError
from llama.kernels.formats import BIAS, INT8, Form, dequantize, pack_int4, quantize, unpack_int4
from llama.quantization import gptq as module
from llama.quantization.calibration import calibrated_matrix, inputs_of
from llama.quantization.gptq import Inputs, column_order, gptq

N, K, SAMPLES = 48, 256, 1024


def correlated(seed: int = 0, n_columns: int = K, samples: int = SAMPLES) -> Tensor:
    """Inputs [M, K] whose columns lean on each other and differ in size, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(samples, n_columns // 4, generator=generator) @ torch.randn(
        n_columns // 4, n_columns, generator=generator
    )
    noise = torch.randn(samples, n_columns, generator=generator)
    sizes = torch.rand(n_columns, generator=generator) * 3 + 0.1
    return (mixed / 8 + 0.3 * noise) * sizes


def matrix(seed: int = 1, n_columns: int = K) -> Tensor:
    return torch.randn(N, n_columns, generator=torch.Generator().manual_seed(seed))


def inputs(x: Tensor, group_size: int = 32, damping: float = 0.01) -> Inputs:
    return Inputs.create(x.double().T @ x.double(), group_size, damping=damping)


def error(rows: Tensor, packed: tuple[Tensor, Tensor], x: Tensor) -> float:
    """Of the outputs, relative."""
    wanted = x @ rows.T
    return ((x @ dequantize(*packed).T - wanted).norm() / wanted.norm()).item()


def by_the_paper(rows: Tensor, hessian: Tensor, order: list[int], group_size: int) -> Tensor:
    """Optimal Brain Quantization's recursion with a given order and the plain scales of what each group has become.

    The inverse of the Hessian of the columns that are left is taken anew at each: no Cholesky, no blocks.
    """
    work, numbers = rows.double().clone(), torch.empty(rows.shape, dtype=torch.uint8)
    scales: dict[int, Tensor] = {}
    for step, column in enumerate(order):
        group = column // group_size
        if group not in scales:
            _, found = quantize(
                work[:, group * group_size : (group + 1) * group_size].float(), Form("int4", group_size)
            )
            scales[group] = found.double()[:, 0]
        left = order[step:]
        inverse = torch.linalg.inv(hessian[left][:, left])
        number = (work[:, column] / scales[group]).round().add(BIAS).clamp(0, 15)
        off = (work[:, column] - (number - BIAS) * scales[group]) / inverse[0, 0]
        work[:, left] -= off[:, None] * inverse[0]
        numbers[:, column] = number
    return numbers


@pytest.mark.parametrize("group_size", [32, 64])
def test_it_is_the_papers_recursion(group_size: int) -> None:
    x, rows = correlated(n_columns=128), matrix(n_columns=128)
    hessian = x.double().T @ x.double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(128, dtype=torch.float64)
    order = column_order(hessian.diagonal(), group_size).tolist()
    packed, _ = gptq(rows, inputs(x, group_size), factors=(1.0,))
    assert torch.equal(unpack_int4(packed), by_the_paper(rows, damped, order, group_size))


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("factors", [(1.0,), module.FACTORS])
def test_outputs_err_less_than_with_plain_rounding(group_size: int, factors: tuple[float, ...]) -> None:
    rows = matrix()
    x, others = correlated(samples=2 * SAMPLES).chunk(2)
    found, plain = gptq(rows, inputs(x, group_size), factors=factors), quantize(rows, Form("int4", group_size))
    assert error(rows, found, x) < 0.6 * error(rows, plain, x)
    # Not on the samples alone that it was chosen by.
    assert error(rows, found, others) < 0.7 * error(rows, plain, others)


def test_trying_scales_helps() -> None:
    x, rows = correlated(), matrix()
    assert error(rows, gptq(rows, inputs(x)), x) < 0.97 * error(rows, gptq(rows, inputs(x), factors=(1.0,)), x)


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("sizes", [None, 2])
def test_inputs_that_know_nothing_of_each_other_leave_plain_rounding(group_size: int, sizes: int | None) -> None:
    """With sizes that differ the order of the columns does too, and must not show."""
    rows = matrix()
    diagonal = torch.ones(K) if sizes is None else torch.rand(K, generator=torch.Generator().manual_seed(sizes))
    found = gptq(rows, Inputs.create(torch.diag(diagonal), group_size), factors=(1.0,))
    for own, plain in zip(found, quantize(rows, Form("int4", group_size)), strict=True):
        assert own.dtype == plain.dtype
        assert torch.equal(own, plain)


@pytest.mark.parametrize("block", [1, 64, 96, 1024])
def test_the_blocks_change_nothing(block: int) -> None:
    x, rows = correlated(), matrix()
    expected = gptq(rows, inputs(x))
    assert all(map(torch.equal, gptq(rows, inputs(x), block=block), expected))


def test_the_pieces_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, rows = correlated(), matrix()
    expected = gptq(rows, inputs(x))
    monkeypatch.setattr(module, "ROWS", 7)
    assert all(map(torch.equal, gptq(rows, inputs(x)), expected))


def test_dead_columns_are_rounded_to_the_nearest() -> None:
    x, rows = correlated(), matrix()
    dead = torch.arange(64, 96)  # a whole group, so that its scale is its own
    x[:, dead] = 0
    numbers = [unpack_int4(packed)[:, dead] for packed, _ in (gptq(rows, inputs(x, damping=damping), factors=(1.0,))
               for damping in (0.01, 0.0))]  # fmt: skip
    plain = unpack_int4(quantize(rows, Form("int4", 32))[0])[:, dead]
    assert all(torch.equal(own, plain) for own in numbers)


def test_no_input_at_all_leaves_plain_rounding() -> None:
    rows = matrix()
    found = gptq(rows, inputs(torch.zeros(4, K)), factors=(1.0,))
    assert all(map(torch.equal, found, quantize(rows, Form("int4", 32))))


def test_a_row_of_zeros_stays_one() -> None:
    rows = matrix()
    rows[3] = 0
    assert not dequantize(*gptq(rows, inputs(correlated())))[3].any()


def test_drift_is_made_up_for() -> None:
    """The outputs on drifted inputs come nearer to those of the original on its own."""
    x0, rows = correlated(), matrix()
    x = x0 + 0.2 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(5)) + 0.1 * x0.roll(1, dims=1)
    wanted = x0 @ rows.T

    def missed(packed: tuple[Tensor, Tensor]) -> float:
        return ((x @ dequantize(*packed).T - wanted).norm() / wanted.norm()).item()

    assert missed(gptq(rows, inputs_of(x, x0, 32))) < 0.8 * missed(gptq(rows, inputs(x)))
    # Without drift there is nothing to make up for.
    assert all(map(torch.equal, gptq(rows, inputs_of(x0, x0, 32)), gptq(rows, Inputs.create(x0.T @ x0, 32))))


def test_the_order_keeps_groups_whole() -> None:
    importance = torch.tensor([1.0, 2.0, 9.0, 1.0, 3.0, 4.0])
    assert column_order(importance, 2).tolist() == [2, 3, 5, 4, 1, 0]


def test_int8_is_rounded_to_the_nearest() -> None:
    rows = matrix()
    assert all(map(torch.equal, calibrated_matrix(rows, INT8, None), quantize(rows, INT8)))


def test_sums_that_are_not_finite_are_refused() -> None:
    x = correlated()
    x[0, 0] = torch.inf
    with pytest.raises(QuantizationError, match="not finite"):
        inputs_of(x, x, 32)


def test_numbers_pack_as_everywhere() -> None:
    packed, scales = gptq(matrix(), inputs(correlated()))
    assert (packed.dtype, packed.shape) == (torch.uint8, (N, K // 2))
    assert (scales.dtype, scales.shape) == (torch.bfloat16, (N, K // 32))
    assert torch.equal(pack_int4(unpack_int4(packed)), packed)
