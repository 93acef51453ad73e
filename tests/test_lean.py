"""Backwards that are written out: against finite differences and torch's own operations."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama import lean
from llama.attention import attend
from llama.model import RMSNorm
from llama.rope import apply_rope, rope_table

DOUBLE = torch.float64


def noise(*shape: int, dtype: torch.dtype = DOUBLE, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def table(n_tokens: int, half: int) -> tuple[Tensor, Tensor]:
    cos, sin = rope_table(10000.0 ** -(torch.arange(half) / half), torch.arange(n_tokens)[None])
    return cos.double(), sin.double()


def test_gradients_are_those_of_finite_differences() -> None:
    weight, bias = noise(6).detach(), torch.zeros(4, 5, dtype=DOUBLE).index_fill_(1, torch.tensor([2]), float("-inf"))
    assert torch.autograd.gradcheck(lambda x: lean.rms_norm(x, weight, 1e-5), noise(2, 3, 6))
    assert torch.autograd.gradcheck(lambda x: lean.turn_pairs(x, *table(3, 4)), noise(1, 3, 2, 8))
    q, k, v = noise(2, 2, 4, 8), noise(2, 2, 5, 8, seed=1), noise(2, 2, 5, 8, seed=2)
    assert torch.autograd.gradcheck(lambda *x: lean.attention(*x, bias), (q, k, v))


@pytest.mark.parametrize("n_groups", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_torchs(n_groups: int, masked: bool) -> None:
    n_tokens, n_before = 5, 3 if masked else 0
    q = noise(2, n_tokens, 4, 8)
    k, v = (noise(2, n_groups, n_before + n_tokens, 8, seed=seed) for seed in (1, 2))
    own = torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril()
    mask = torch.cat((own.new_ones(n_tokens, n_before), own), dim=1)
    theirs = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True)
    ours = attend(q, k, v, mask if masked else None)
    slope = noise(*ours.shape, seed=3).detach()
    wanted = torch.autograd.grad(theirs.transpose(1, 2).flatten(2), (q, k, v), slope)
    found = torch.autograd.grad(ours, (q, k, v), slope)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() < 1e-12


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
