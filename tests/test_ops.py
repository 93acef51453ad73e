"""Each op in every way that it can be computed, against its formula in float64; gradients by finite differences."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama.kernels import block, products
from llama.model import RMSNorm
from llama.ops import rms_norm, rotate, swiglu
from llama.rope import rope_table

pytestmark = pytest.mark.usefixtures("two_threads")

DOUBLE = torch.float64
EPS = 1e-5
# The largest difference over the largest result: float32's sums in another order, and two roundings of 16 bits.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
WAYS = ("gradient", "no gradient", "kernels", "compiled", "compiled with gradient")


def noise(*shape: int, dtype: torch.dtype = DOUBLE, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def table(n_tokens: int, half: int) -> tuple[Tensor, Tensor]:
    cos, sin = rope_table(10000.0 ** -(torch.arange(half) / half), torch.arange(n_tokens)[None])
    return cos.double(), sin.double()


# -- every way against the formula -----------------------------------------------------------------


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def plain_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + (-gate).exp()) * up


def in_the_way(way: str, monkeypatch: pytest.MonkeyPatch, op: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Compute `op` in one of `WAYS`; the first input carries the gradient."""
    if way == "kernels" and not products.enable():
        pytest.skip("no C++ compiler here")
    monkeypatch.setattr(products, "_loaded", way == "kernels")
    run = torch.compile(op, fullgraph=True, backend="aot_eager") if way.startswith("compiled") else op
    first, *others = (x.clone() for x in inputs)
    if way.endswith("gradient") and way != "no gradient":
        out = run(first.requires_grad_(), *others)
        assert out.requires_grad
        return out.detach()
    with torch.no_grad():
        return run(first, *others)


def check(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() <= BOUNDS[dtype] * expected.abs().max()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_norm(way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = noise(2, 3, 48, dtype=dtype).detach(), noise(48, dtype=dtype, seed=1).detach()
    found = in_the_way(way, monkeypatch, lambda x, weight: rms_norm(x, weight, EPS), x, weight)
    check(found, plain_norm(x.double(), weight.double()), dtype)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_rotation(way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, (cos, sin) = noise(1, 5, 3, 16, dtype=dtype).detach(), (part.float() for part in table(5, 8))
    found = in_the_way(way, monkeypatch, lambda x, cos, sin: rotate(x, (cos, sin)), x, cos, sin)
    check(found, plain_rotation(x.double(), cos.double(), sin.double()), dtype)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_swiglu(way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, up = noise(2, 3, 48, dtype=dtype).detach(), noise(2, 3, 48, dtype=dtype, seed=1).detach()
    found = in_the_way(way, monkeypatch, swiglu, gate, up)
    check(found, plain_swiglu(gate.double(), up.double()), dtype)


# -- which way is taken ----------------------------------------------------------------------------


@pytest.mark.parametrize("with_kernels", [False, True])
def test_swiglu_overwrites_the_gate_without_gradient(with_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if with_kernels and not products.enable():
        pytest.skip("no C++ compiler here")
    monkeypatch.setattr(products, "_loaded", with_kernels)
    gate, up = noise(2, 8, dtype=torch.float32).detach(), noise(2, 8, dtype=torch.float32, seed=1).detach()
    assert swiglu(gate, up) is gate


@pytest.mark.parametrize("with_kernels", [False, True])
@pytest.mark.parametrize("trained", ["gate", "up"])
def test_either_input_of_swiglu_may_have_a_gradient(
    trained: str, with_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if with_kernels and not products.enable():
        pytest.skip("no C++ compiler here")
    monkeypatch.setattr(products, "_loaded", with_kernels)
    inputs = {name: noise(2, 8, dtype=torch.float32, seed=n).detach() for n, name in enumerate(("gate", "up"))}
    before = {name: x.clone() for name, x in inputs.items()}
    inputs[trained].requires_grad_()
    out = swiglu(inputs["gate"], inputs["up"])
    out.sum().backward()
    expected = {name: x.double().requires_grad_(name == trained) for name, x in before.items()}
    (F.silu(expected["gate"]) * expected["up"]).sum().backward()
    torch.testing.assert_close(inputs[trained].grad.double(), expected[trained].grad, atol=1e-6, rtol=1e-6)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs), "an input was overwritten"


def test_the_kernels_are_left_alone_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    if not products.enable():
        pytest.skip("no C++ compiler here")
    seen = []
    monkeypatch.setattr(block, "rms_norm", lambda x, weight, eps: seen.append("kernel") or x)
    x, weight = torch.ones(2, 8), torch.ones(8)
    torch.compile(rms_norm, fullgraph=True, backend="aot_eager")(x, weight, EPS)
    assert not seen
    rms_norm(x, weight, EPS)
    assert seen == ["kernel"]


# -- backwards that are written out ----------------------------------------------------------------


def test_gradients_are_those_of_finite_differences() -> None:
    weight = noise(6).detach()
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-5), noise(2, 3, 6))
    assert torch.autograd.gradcheck(lambda x: rotate(x, table(3, 4)), noise(1, 3, 2, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_rope_with_gradient_are_those_without(dtype: torch.dtype) -> None:
    norm = RMSNorm(16, 1e-5, dtype=dtype).requires_grad_(False)
    norm.weight.copy_(noise(16, seed=5))
    x, heads = noise(4, 16, dtype=dtype), noise(1, 4, 2, 8, dtype=dtype)
    cos, sin = (x.float() for x in table(4, 4))
    # Order and fusing of float32's roundings; in bfloat16, one unit in the last place.
    close = {"atol": 1e-6, "rtol": 2e-6 if dtype == torch.float32 else 2**-7}
    torch.testing.assert_close(norm(x), norm(x.detach()), **close)
    torch.testing.assert_close(rotate(heads, (cos, sin)), rotate(heads.detach(), (cos, sin)), **close)


def test_a_trained_norm_gets_its_gradient() -> None:
    norm = RMSNorm(8, 1e-5, dtype=DOUBLE)
    norm(noise(3, 8)).sum().backward()
    assert norm.weight.grad is not None
