"""Collectives of one machine's ranks through shared memory; `shared.h` describes the protocol.

A segment is a file in memory (Linux's /dev/shm) that one rank creates and all ranks open.
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
    """Return whether this machine has shared memory and the kernels, which are built first if need be."""
    return sys.platform == "linux" and FOLDER.is_dir() and load_kernels()


def create_segment(world_size: int) -> Path:
    """Create a segment for `world_size` ranks, half a megabyte each; the caller deletes it once all have opened it.

    Raises:
        OSError: where there is no room for the file.
    """
    file, name = tempfile.mkstemp(prefix="llama-shards-", dir=FOLDER)
    try:
        # Memory is reserved now: where there is none, the first write would kill the process.
        os.posix_fallocate(file, 0, torch.ops.llama_shards.segment_bytes(world_size))
    except OSError:
        os.unlink(name)
        raise
    finally:
        os.close(file)
    return Path(name)


def open_segment(path: Path, rank: int, world_size: int) -> int:
    """Open a segment as `rank`, and return the handle that the collectives ask for.

    Raises:
        RuntimeError: where the file cannot be opened or mapped.
    """
    _register_shapes()
    return torch.ops.llama_shards.open_segment(str(path), rank, world_size)


def close_segment(segment: int) -> None:
    """Close a segment; no rank may be in a collective."""
    torch.ops.llama_shards.close_segment(segment)


def serves(x: Tensor) -> bool:
    """Return whether these collectives take a tensor, by device and dtype."""
    return x.device.type == "cpu" and x.dtype in DTYPES


def all_reduce(x: Tensor, segment: int, op: str) -> Tensor:
    """Return `x` reduced over the ranks, the same bits on every rank; 16-bit numbers are reduced in float32.

    Args:
        x: of the same shape and dtype on every rank.
        segment: the handle.
        op: "sum" or "max".

    Raises:
        RuntimeError: when a rank is gone.
    """
    return torch.ops.llama_shards.shared_all_reduce(x, segment, op == "max")


def all_gather(x: Tensor, segment: int, world_size: int) -> Tensor:
    """Return the `x` of every rank, all of one shape, stacked: [world_size, *x.shape].

    Raises:
        RuntimeError: when a rank is gone.
    """
    return torch.ops.llama_shards.shared_all_gather(x, segment, world_size)


@cache
def _register_shapes() -> None:
    """Tell torch.compile the shapes of the results."""

    def reduced(x: Tensor, segment: int, largest: bool) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def gathered(x: Tensor, segment: int, world_size: int) -> Tensor:
        return x.new_empty(world_size, *x.shape)

    torch.library.register_fake("llama_shards::shared_all_reduce", reduced)
    torch.library.register_fake("llama_shards::shared_all_gather", gathered)
