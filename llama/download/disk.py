"""Whether there is room for what is to come."""

from __future__ import annotations

import shutil
from pathlib import Path

from llama.errors import DownloadError


def check_space(folder: Path, needed: int) -> None:
    """Refuse what the disk has no room for.

    Raises:
        DownloadError: naming both sizes.
    """
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise DownloadError(
            f"{needed / 1e9:.2f} GB are missing, but {place} has {free / 1e9:.2f} GB free: "
            "choose another --output_dir or make room"
        )
