"""Frequencies against transformers, and the turning of pairs against Meta's complex numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from llama.config import ModelArgs, RopeScaling
from llama.ops import rotate
from llama.rope import rope_frequencies, rope_table

HEADS = 4
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "llama3 by 8": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3 by 32": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3 of its own": {
        "rope_type": "llama3", "factor": 3.0, "low_freq_factor": 0.5, "high_freq_factor": 9.0,
        "original_max_position_embeddings": 64,
    },
    "linear": {"rope_type": "linear", "factor": 4.0},
}  # fmt: skip
LAST_BIT = {"atol": 0.0, "rtol": 1.2e-7}
# Values of unit size: some rounding of float32 each.
CLOSE = {"atol": 2e-6, "rtol": 0.0}


def theirs(scaling: str, head_dim: int, theta: float) -> LlamaRotaryEmbedding:
    parameters = {**SCALINGS[scaling], "rope_theta": theta}
    size = {"hidden_size": HEADS * head_dim, "num_attention_heads": HEADS}
    return LlamaRotaryEmbedding(LlamaConfig(**size, rope_parameters=parameters))


def ours(scaling: str, head_dim: int, theta: float) -> Tensor:
    config = {
        "hidden_size": HEADS * head_dim, "num_attention_heads": HEADS, "num_hidden_layers": 1,
        "intermediate_size": 8, "vocab_size": 8, "rope_parameters": {**SCALINGS[scaling], "rope_theta": theta},
    }  # fmt: skip
    return rope_frequencies(ModelArgs.from_hf(config))


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("head_dim", "theta"), [(128, 10000.0), (128, 500000.0), (64, 500000.0), (10, 1e6)])
def test_frequencies_are_those_of_transformers(scaling: str, head_dim: int, theta: float) -> None:
    expected = theirs(scaling, head_dim, theta)
    assert expected.attention_scaling == 1.0
    torch.testing.assert_close(ours(scaling, head_dim, theta), expected.inv_freq, **LAST_BIT)


def test_llama3_slows_long_waves_in_full_and_short_ones_not_at_all() -> None:
    plain, scaled = (ours(name, 64, 500000.0) for name in ("default", "llama3 by 32"))
    assert torch.equal(scaled[:8], plain[:8])
    assert torch.equal(scaled[-8:], plain[-8:] / 32)
    blended = (scaled < plain) & (scaled > plain / 32)
    assert blended.sum() >= 2


def test_cosines_and_sines_are_those_of_transformers_far_out() -> None:
    positions = torch.tensor([[0, 1, 77, 8191], [8192, 50000, 131071, 5]])
    cos, sin = rope_table(ours("llama3 by 8", 128, 500000.0), positions)
    expected = theirs("llama3 by 8", 128, 500000.0)(torch.zeros(1), positions)
    for table, reference in zip((cos, sin), expected, strict=True):
        assert table.dtype == torch.float32
        torch.testing.assert_close(table.squeeze(2), reference[..., :64], atol=1e-6, rtol=0.0)


def some_heads(head_dim: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 50, HEADS, head_dim, generator=generator)
    return x, torch.randint(0, 9000, (2, 50), generator=generator)


def test_turning_is_metas_complex_product() -> None:
    x, positions = some_heads()
    frequencies = ours("llama3 by 8", 32, 500000.0)
    # Meta's apply_rotary_emb: neighbouring features are one complex number.
    angles = positions.unsqueeze(-1) * frequencies
    turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(2)
    expected = torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turn).flatten(-2)
    torch.testing.assert_close(rotate(x, rope_table(frequencies, positions)), expected, **CLOSE)


def test_turning_is_transformers_rotate_half_after_the_row_permutation() -> None:
    x, positions = some_heads()
    halves = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)  # pairs side by side -> halves apart
    cos, sin = theirs("llama3 by 32", 32, 500000.0)(x, positions)
    turned, _ = apply_rotary_pos_emb(halves, halves, cos, sin, unsqueeze_dim=2)
    expected = turned.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    table = rope_table(ours("llama3 by 32", 32, 500000.0), positions)
    torch.testing.assert_close(rotate(x, table), expected, **CLOSE)


def test_half_precision_is_turned_in_float32() -> None:
    x, positions = some_heads()
    table = rope_table(ours("default", 32, 10000.0), positions)
    coarse = rotate(x.bfloat16(), table)
    assert coarse.dtype == torch.bfloat16
    assert torch.equal(coarse, rotate(x.bfloat16().float(), table).bfloat16())


def test_scores_depend_on_distance_alone() -> None:
    x, _ = some_heads()
    frequencies = ours("default", 32, 10000.0)
    near, far = (
        [rotate(x, rope_table(frequencies, torch.full((2, 50), at + step))) for step in (0, 7)] for at in (3, 900)
    )
    torch.testing.assert_close((near[0] * near[1]).sum(-1), (far[0] * far[1]).sum(-1), atol=5e-3, rtol=0.0)


def test_default_scaling_is_metas() -> None:
    args = ModelArgs(128, 1, 4, vocab_size=8, rope_theta=500000.0, rope_scaling=RopeScaling(8.0))
    torch.testing.assert_close(rope_frequencies(args), theirs("llama3 by 8", 32, 500000.0).inv_freq, **LAST_BIT)
