"""Collectives of the ranks of one machine through memory that they share; `shared.h` says how they meet.

A segment is a file in memory (Linux's /dev/shm) that one rank creates and all of them open.
"""

from __future__ import annotations

import os
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from llama.kernels.build import load_kernels

FOLDER = Path("/dev/shm")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32, torch.int64)


def available() -> bool:
    """Whether this machine has such memory, and the kernels, which are built now if they were not."""
    return sys.platform == "linux" and FOLDER.is_dir() and load_kernels()


def create_segment(world_size: int) -> Path:
    """A file for `world_size` ranks, of half a megabyte each, which is deleted once all of them have opened it.

    Raises:
        OSError: where there is no room for it.
    """
    file, name = tempfile.mkstemp(prefix="llama-shards-", dir=FOLDER)
    try:
        # Room is taken now: memory that turns out to be missing would end the process when it is written.
        os.posix_fallocate(file, 0, torch.ops.llama_shards.segment_bytes(world_size))
    except OSError:
        os.unlink(name)
        raise
    finally:
        os.close(file)
    return Path(name)


def open_segment(path: Path, rank: int, world_size: int) -> int:
    """Take a rank's place in a segment: the handle by which the collectives know it.

    Raises:
        RuntimeError: where the file cannot be opened or mapped.
    """
    _register_shapes()
    return torch.ops.llama_shards.open_segment(str(path), rank, world_size)


def close_segment(segment: int) -> None:
    """Give up a place; no rank may be in a collective."""
    torch.ops.llama_shards.close_segment(segment)


def serves(x: Tensor) -> bool:
    """Whether a tensor can go this way."""
    return x.device.type == "cpu" and x.dtype in DTYPES


def all_reduce(x: Tensor, segment: int, op: str) -> Tensor:
    """`x` reduced over the ranks, "sum" or "max", in float32 where it is narrower; the same bits on every rank.

    Raises:
        RuntimeError: when a rank is gone.
    """
    return torch.ops.llama_shards.shared_all_reduce(x, segment, op == "max")


def all_gather(x: Tensor, segment: int, world_size: int) -> Tensor:
    """The equal-shaped `x` of every rank, stacked: [world_size, *x.shape].

    Raises:
        RuntimeError: when a rank is gone.
    """
    return torch.ops.llama_shards.shared_all_gather(x, segment, world_size)


@cache
def _register_shapes() -> None:
    """What torch.compile needs to know: the shapes that come out."""

    def reduced(x: Tensor, segment: int, largest: bool) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def gathered(x: Tensor, segment: int, world_size: int) -> Tensor:
        return x.new_empty(world_size, *x.shape)

    torch.library.register_fake("llama_shards::shared_all_reduce", reduced)
    torch.library.register_fake("llama_shards::shared_all_gather", gathered)
