"""The environment: this process's place among the ranks, OpenMP's waiting, and notices that rank 0 prints."""

import os
import sys
from typing import Any

from llama.errors import LlamaError

LEAST_SHOWN_BYTES = 256 << 20


def _number(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        raise LlamaError(f"the environment variable {name} must be a number, is {os.environ[name]!r}") from None


def rank() -> int:
    """Return the rank of this process among all processes; 0 without torchrun."""
    return _number("RANK", 0)


def world_size() -> int:
    """Return the number of processes; 1 without torchrun."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """Return the rank of this process among those of its machine."""
    return _number("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return _number("LOCAL_WORLD_SIZE", 1)


def wait_briefly() -> None:
    """Make OpenMP's threads sleep after some microseconds of waiting; to be called before torch is loaded.

    By default threads spin for milliseconds, which costs time when another program holds one of the cores: products
    then took two to three times as long. Settings that are already in the environment stand. See docs/speed.md.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"


def is_speaker() -> bool:
    """Return whether this process is the one that prints: rank 0, or the only process."""
    return rank() == 0


def notice(text: str) -> None:
    """Print one line to stderr on rank 0; every other rank stays silent."""
    if is_speaker():
        print(text, file=sys.stderr, flush=True)


def byte_bar(total: int, task: str, leave: bool = True) -> Any:
    """Return a progress bar of bytes, which only rank 0 shows, and only for work long enough not to flicker.

    Args:
        total: bytes of the work.
        task: one word for it, such as "loading".
        leave: whether the full bar stays on the screen.
    """
    from tqdm import tqdm

    hidden = not is_speaker() or total < LEAST_SHOWN_BYTES
    return tqdm(total=total, unit="B", unit_scale=True, desc=task, disable=hidden, leave=leave)
