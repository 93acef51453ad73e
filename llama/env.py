"""The environment: what torchrun left there of this process's place, and the voice of the process that speaks."""

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
    """Place of this process among all of them; 0 without torchrun."""
    return _number("RANK", 0)


def world_size() -> int:
    """Number of processes; 1 without torchrun."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """Place among the processes of this machine."""
    return _number("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Number of processes on this machine."""
    return _number("LOCAL_WORLD_SIZE", 1)


def wait_briefly() -> None:
    """Let OpenMP's threads sleep when they have waited for each other for some microseconds; before torch is loaded.

    By default they spin for milliseconds, which is a loss when another program holds one of the cores: products then
    took two to three times as long. What a person says of it in the environment stands. See docs/speed.md.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"


def is_speaker() -> bool:
    """Whether this process is the one that talks to the person: rank 0, or the only process."""
    return rank() == 0


def notice(text: str) -> None:
    """Print one line to stderr on rank 0; every other rank stays silent."""
    if is_speaker():
        print(text, file=sys.stderr, flush=True)


def byte_bar(total: int, task: str, leave: bool = True) -> Any:
    """A progress bar of bytes; shown by rank 0 alone, and not where the work is so small that it would only flicker.

    Args:
        total: bytes of the work.
        task: one word for it, such as "loading".
        leave: whether the full bar stays on the screen.
    """
    from tqdm import tqdm

    hidden = not is_speaker() or total < LEAST_SHOWN_BYTES
    return tqdm(total=total, unit="B", unit_scale=True, desc=task, disable=hidden, leave=leave)
