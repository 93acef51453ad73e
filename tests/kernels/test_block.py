"""Norm, rotation and SwiGLU in one pass: our kernels against the formulas of the model, and where they stay away."""

import pytest
import torch
import torch.nn.functional as F
from support import VOCAB, hf_model, meta_params, meta_state

from llama.config import ModelArgs
from llama.kernels import block, products
from llama.model import RMSNorm, Transformer
from llama.ops import rotate

pytestmark = pytest.mark.usefixtures("two_threads")

# The largest difference over the largest result: float32's sums in another order, and one rounding of 16 bits.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SHAPES = [(1, 1, 64), (2, 3, 2048), (1, 700, 96), (5, 1, 33)]


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if not products.enable():
        pytest.skip("no C++ compiler here")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_norm(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight = (3 * randn(*shape)).to(dtype), randn(shape[-1], seed=1).to(dtype)
    wide = x.double()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    # In 16 bits what is normed is rounded before it is weighted.
    assert difference(block.rms_norm(x, weight, 1e-5), normed * weight.double()) < 2 * BOUNDS[dtype]


@pytest.mark.parametrize("shape", [(1, 1, 32, 64), (2, 3, 5, 128), (1, 300, 7, 6)])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_rotation(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, angles = randn(*shape).to(dtype), 10 * randn(*shape[:2], 1, shape[-1] // 2, seed=1)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    assert difference(block.rotate(x, angles.cos(), angles.sin()), expected) < BOUNDS[dtype]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_swiglu(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    gate, up = (20 * randn(*shape)).to(dtype), randn(*shape, seed=1).to(dtype)
    gate.view(-1)[:4] = torch.tensor([-10000.0, -95.0, 0.0, 10000.0])
    expected = F.silu(gate.double()) * up.double()
    own = gate.clone()
    assert block.swiglu_(own, up) is own
    found = own.double()
    assert ((found - expected).abs() <= 2 * BOUNDS[dtype] * expected.abs() + 1e-6).all()


def test_tensors_that_are_empty_or_strided() -> None:
    x = randn(4, 6, 64)
    weight = randn(64, seed=1)
    assert torch.equal(block.rms_norm(x.transpose(0, 1), weight, 1e-5), block.rms_norm(x, weight, 1e-5).transpose(0, 1))
    assert block.rms_norm(x[:0], weight, 1e-5).shape == (0, 6, 64)
    assert block.rotate(x[:0].unsqueeze(2), randn(0, 6, 1, 32), randn(0, 6, 1, 32)).shape == (0, 6, 1, 64)
    assert block.rotate(randn(1, 6, 0, 64), randn(1, 6, 1, 32), randn(1, 6, 1, 32)).shape == (1, 6, 0, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_the_same_with_them(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = hf_model("3")
    model = Transformer(ModelArgs.from_params({**meta_params(hf), "vocab_size": VOCAB}))
    model.load_state_dict(meta_state(hf))
    model = model.to(dtype).requires_grad_(False)
    tokens = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    found = model(tokens)
    monkeypatch.setattr(products, "_loaded", False)
    expected = model(tokens)
    assert not torch.equal(found, expected), "the kernels were not used"
    assert (found - expected).abs().max() < {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]


def test_they_serve_no_gradient_and_no_other_dtype() -> None:
    x = randn(2, 8)
    assert block.serves(x)
    assert not block.serves(x.double())
    assert not block.serves(x, x.bfloat16())
    assert not block.serves(x.requires_grad_())
    with torch.no_grad():
        assert block.serves(x)
    norm = RMSNorm(8, 1e-5)
    norm(x.detach()).sum().backward()
    assert norm.weight.grad is not None
    turned = rotate(x.view(1, 2, 1, 8), (torch.ones(1, 2, 1, 4), torch.zeros(1, 2, 1, 4)))
    assert turned.requires_grad
