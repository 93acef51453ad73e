"""Products with packed and plain matrices: our kernels against torch, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from llama.kernels import products
from llama.kernels.formats import INT8, Form, dequantize, quantize

pytestmark = pytest.mark.usefixtures("two_threads")

FORMS = [INT8, Form("int4", 32), Form("int4", 64), Form("int4", 128)]
# The largest difference over the largest result: sums in another order, and one rounding to bfloat16.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


@pytest.fixture(params=["kernels", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "kernels":
        if not products.enable():
            pytest.skip("no C++ compiler here")
    else:
        monkeypatch.setattr(products, "_loaded", False)
    return request.param


def matrix(n_rows: int, n_columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(seed))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("n_columns", [128, 640, 2176])  # less and more than the kernels take at a time, and a rest
def test_packed_products_are_those_of_the_numbers(way: str, form: Form, dtype: torch.dtype, n_columns: int) -> None:
    packed, scales = quantize(matrix(77, n_columns) * 0.02, form)
    numbers = dequantize(packed, scales, torch.float64)
    for n_rows in (1, 2, 3, 4, 7, 16, 17, 40):
        x = matrix(n_rows, n_columns, seed=n_rows).to(dtype)
        expected = x.double() @ numbers.T
        assert difference(products.packed_linear(x, packed, scales), expected) < BOUNDS[dtype]
    x = matrix(6, n_columns).to(dtype).unflatten(0, (2, 3))
    assert products.packed_linear(x, packed, scales).shape == (2, 3, 77)


def test_one_row_of_bfloat16(way: str) -> None:
    for n_columns in (64, 300, 2048):
        x, weight = (matrix(*shape).to(torch.bfloat16) for shape in ((1, n_columns), (93, n_columns)))
        expected = x.double() @ weight.double().T
        assert difference(products.linear(x, weight), expected) < BOUNDS[torch.bfloat16]
        assert products.linear(x.unsqueeze(0), weight).shape == (1, 1, 93)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_the_same_both_ways(way: str, form: Form, dtype: torch.dtype) -> None:
    packed, scales = quantize(matrix(9, 256), form)
    assert torch.equal(products.values(packed, scales, dtype), dequantize(packed, scales, dtype))


@pytest.mark.parametrize("form", FORMS)
def test_rounding_is_the_same_both_ways(way: str, form: Form) -> None:
    rows = matrix(50, 384) * torch.logspace(-3, 3, 50).unsqueeze(1)
    rows[3] = 0
    rows[4, ::2] = -rows[4, 1::2]  # magnitudes that are as large as each other
    expected = quantize(rows, form)
    for found, right in zip(products.pack(rows, form), expected, strict=True):
        assert torch.equal(found, right)
    packed, scales = products.pack(rows, form, slice(128, 256))
    assert torch.equal(packed, expected[0][:, 128 // form.columns_per_byte : 256 // form.columns_per_byte])
    assert torch.equal(scales, expected[1] if form.kind == "int8" else quantize(rows[:, 128:256], form)[1])


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_numbers(way: str, form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "PIECE", 20)  # several pieces
    packed, scales = quantize(matrix(77, 128), form)
    x, slope = matrix(5, 128).requires_grad_(), matrix(5, 77, seed=3)
    found = torch.autograd.grad(products.packed_linear(x, packed, scales), x, slope)[0]
    expected = torch.autograd.grad(F.linear(x, dequantize(packed, scales)), x, slope)[0]
    assert difference(found, expected.double()) < BOUNDS[torch.float32]


def test_a_large_matrix_is_widened_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, scales = quantize(matrix(100, 128), INT8)
    x = matrix(30, 128)
    expected = x.double() @ dequantize(packed, scales, torch.float64).T
    sizes: list[int] = []
    widen = products.values
    monkeypatch.setattr(products, "PIECE", 33)
    monkeypatch.setattr(products, "values", lambda *args: (sizes.append(args[0].shape[0]), widen(*args))[1])
    assert difference(products.packed_linear(x, packed, scales), expected) < BOUNDS[torch.float32]
    assert sizes == [33, 33, 33, 1]


@pytest.mark.parametrize("form", [INT8, Form("int4", 32)])
def test_the_compiler_knows_the_kernels(form: Form) -> None:
    if not products.enable():
        pytest.skip("no C++ compiler here")
    packed, scales = quantize(matrix(40, 128), form)
    run = torch.compile(lambda x: products.packed_linear(x, packed, scales) * 2, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        x = matrix(1, 128)
        assert torch.equal(run(x), products.packed_linear(x, packed, scales) * 2)
