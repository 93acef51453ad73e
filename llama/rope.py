"""Frequencies and tables of the rotary position embedding (arXiv:2104.09864); `llama.ops.rotate` applies them.

Shape legend: B batch, T tokens, D head_dim.
"""

import math

import torch
from torch import Tensor

from llama.config import ModelArgs, RopeScaling


def rope_frequencies(args: ModelArgs, device: torch.device | str | None = None) -> Tensor:
    """Return the angle per position of each pair of features, [D/2] float32, scaled by `args.rope_scaling`."""
    exponents = torch.arange(0, args.head_dim, 2, dtype=torch.float32, device="cpu") / args.head_dim
    frequencies = 1.0 / (args.rope_theta**exponents)
    if args.rope_scaling is not None:
        frequencies = _scale(frequencies, args.rope_scaling)
    return frequencies.to(device)


def _scale(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    slowed = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slowed
    wavelengths = 2 * math.pi / frequencies
    longest_kept = scaling.original_context / scaling.high_freq_factor
    shortest_slowed = scaling.original_context / scaling.low_freq_factor
    # Between the two wavelengths, the scaled and the unscaled frequency are blended.
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = (scaling.original_context / wavelengths - scaling.low_freq_factor) / span
    blended = (1 - smooth) * slowed + smooth * frequencies
    scaled = torch.where(wavelengths > shortest_slowed, slowed, blended)
    return torch.where(wavelengths < longest_kept, frequencies, scaled)


def rope_table(frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines at `positions` [B, T]: two tensors [B, T, 1, D/2] float32."""
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
    return angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)
