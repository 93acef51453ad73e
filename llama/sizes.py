"""Sizes as people read and write them, and the room that a disk has for one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path

from llama.errors import LlamaError

GB = 1e9
_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}
# Bytes of each unit, by its name in capitals; "" is that of a bare number.
UNITS = {
    "": 1,
    "B": 1,
    **{letter + end: 1000**power for letter, power in _POWERS.items() for end in ("", "B")},
    **{letter + end: 1024**power for letter, power in _POWERS.items() for end in ("I", "IB")},
}
# A bare number is more often a mistake than a few bytes.
NAMED_UNITS = frozenset(UNITS) - {""}
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?I?B?)", re.IGNORECASE)


def parse_bytes(text: str, units: Collection[str] = NAMED_UNITS) -> int:
    """Return the bytes of a size such as `8GB` (1e9 bytes each), `8GiB` (2**30) or `8000MB`.

    Args:
        text: the size; capitals and blanks around the unit do not matter.
        units: the keys of `UNITS` that are taken; with "" a bare number is one of bytes.

    Raises:
        LlamaError: for anything else, or less than one byte.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = match[2].upper() if match else None
    nbytes = int(float(match[1]) * UNITS[unit]) if match and unit in UNITS and unit in units else 0
    if nbytes < 1:
        raise LlamaError(f"{text!r} is not a size above zero such as 8GB (1e9 bytes each), 8GiB or 8000MB")
    return nbytes


def show_bytes(nbytes: float) -> str:
    """Return bytes as `13.48 GB` (1e9 bytes each), or as MB below a tenth of a GB."""
    return show_gigabytes(nbytes) if abs(nbytes) >= GB / 10 else f"{nbytes / 1e6:.2f} MB"


def show_gigabytes(nbytes: float) -> str:
    """Return bytes as `13.48 GB` (1e9 bytes each), however few they are."""
    return f"{nbytes / GB:.2f} GB"


def show_count(n: int) -> str:
    """Return a number of parameters as `6.74 B`, or as `3.71 M` below a billion."""
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"


def check_space(folder: Path, nbytes: int, need: str, remedy: str, error: type[LlamaError] = LlamaError) -> None:
    """Refuse to write more than the disk has room for.

    Args:
        folder: where the bytes are to be written; it need not exist yet.
        nbytes: bytes to be written.
        need: the message's beginning, such as "13.00 GB are missing".
        remedy: the way out besides making room, such as "choose another --output_dir".
        error: the class to raise.

    Raises:
        LlamaError: of the class `error`, naming both sizes.
    """
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if nbytes > free:
        raise error(f"{need}, but {place} has {show_gigabytes(free)} free: {remedy} or make room")
