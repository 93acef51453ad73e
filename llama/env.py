"""What torchrun left in the environment: this process's place among the others."""

import os

from llama.errors import LlamaError


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
