"""Noise from a counter instead of a generator: a pure function of its keys, the same at every world size.

The mixing function is SplitMix64's (Steele, Lea and Flood, 2014).
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = -7046029254386353131  # 2**64 divided by the golden ratio, odd, as int64
_MASK64 = (1 << 64) - 1


def noise_key(*values: int) -> int:
    """Return a signed 64-bit key that depends on all of the integers and on their order."""
    key = 0
    for value in values:
        key = _mix((key + GOLDEN + value) & _MASK64)
    return key - (1 << 64) if key >> 63 else key


def _mix(x: int) -> int:
    """Return `mix` of an unsigned Python integer."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def mix(x: Tensor) -> Tensor:
    """Return SplitMix64's finaliser of each int64: neighbouring numbers come out unrelated."""
    x = (x ^ shift_right(x, 30)) * -4658895280553007687
    x = (x ^ shift_right(x, 27)) * -7723592293110705685
    return x ^ shift_right(x, 31)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Return int64 shifted right logically; torch's own shift keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def dropped(key: Tensor, rows: Tensor, features: Tensor, p: float) -> Tensor:
    """Return the dropout mask of a matrix: True where an entry is left out, each with probability `p`.

    Args:
        key: of this matrix, int64 scalar.
        rows: [N] int64, a number per row; rows of equal number get the same mask.
        features: [F] int64, each column's number in the whole matrix, of which this may be a part.
        p: in steps of 2**-32.

    Returns:
        [N, F] bool. An entry depends on its row's and its feature's number alone, not on the part that holds both.
    """
    # Every row draws a hash function a * c + b, every feature its argument: pairwise independent (Dietzfelbinger,
    # 1996), at one multiplication of int32 an entry, where mixing each takes ten passes over int64.
    drawn = mix(key + rows * GOLDEN).view(torch.int32).unflatten(0, (-1, 2))
    columns = mix(features * GOLDEN).view(torch.int32).unflatten(0, (-1, 2))[:, 0]
    numbers = torch.addcmul(drawn[:, 1:], drawn[:, :1] | 1, columns)
    return numbers < min(round(p * 2**32) - 2**31, 2**31 - 1)
