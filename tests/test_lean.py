"""Backwards that are written out: against finite differences and torch's own operations."""

import pytest
import torch
from torch import Tensor

from llama import lean
from llama.model import RMSNorm
from llama.rope import apply_rope, rope_table

DOUBLE = torch.float64


def noise(*shape: int, dtype: torch.dtype = DOUBLE, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def table(n_tokens: int, half: int) -> tuple[Tensor, Tensor]:
    cos, sin = rope_table(10000.0 ** -(torch.arange(half) / half), torch.arange(n_tokens)[None])
    return cos.double(), sin.double()


def test_gradients_are_those_of_finite_differences() -> None:
    weight = noise(6).detach()
    assert torch.autograd.gradcheck(lambda x: lean.rms_norm(x, weight, 1e-5), noise(2, 3, 6))
    assert torch.autograd.gradcheck(lambda x: lean.turn_pairs(x, *table(3, 4)), noise(1, 3, 2, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_rope_with_gradient_are_those_without(dtype: torch.dtype) -> None:
    norm = RMSNorm(16, 1e-5, dtype=dtype).requires_grad_(False)
    norm.weight.copy_(noise(16, seed=5))
    x, heads = noise(4, 16, dtype=dtype), noise(1, 4, 2, 8, dtype=dtype)
    cos, sin = (x.float() for x in table(4, 4))
    # Order and fusing of float32's roundings; in bfloat16, one unit in the last place.
    close = {"atol": 1e-6, "rtol": 2e-6 if dtype == torch.float32 else 2**-7}
    torch.testing.assert_close(norm(x), norm(x.detach()), **close)
    torch.testing.assert_close(apply_rope(heads, (cos, sin)), apply_rope(heads.detach(), (cos, sin)), **close)


def test_a_trained_norm_gets_its_gradient() -> None:
    norm = RMSNorm(8, 1e-5, dtype=DOUBLE)
    norm(noise(3, 8)).sum().backward()
    assert norm.weight.grad is not None
