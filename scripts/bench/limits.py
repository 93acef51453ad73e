"""What a machine can do at best, measured with torch alone: bytes read, and operations, a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peers import synchronize

from llama.checkpoint.table import specs
from llama.config import ModelArgs
from llama.quantization.scheme import EMBEDDING, OUTPUT, Scheme

# Large enough that no cache holds it.
READ_BYTES = 1 << 30
# Sides of the matrices that are multiplied: rows of a prompt, and of a square weight.
MATMUL = {"cpu": (512, 4096), "cuda": (8192, 8192)}
TRIES = 5


@dataclass(frozen=True)
class Limits:
    """The best of several tries.

    Args:
        read: bytes a second; on a card those that a copy reads and writes, on a CPU those that a sum reads.
        flops: operations a second of a matrix product.
    """

    read: float
    flops: float

    def better(self, other: Limits) -> Limits:
        """The best of both."""
        return Limits(max(self.read, other.read), max(self.flops, other.flops))


def measure_limits(device: torch.device, dtype: torch.dtype, quick: bool = False) -> Limits:
    """What `device` can do now with the threads that torch has; `quick` with little memory and work."""
    n_bytes = READ_BYTES // (16 if quick else 1)
    rows, side = (size // (4 if quick else 1) for size in MATMUL[device.type])
    left = torch.ones(rows, side, device=device, dtype=dtype)
    right = torch.ones(side, side, device=device, dtype=dtype)
    flops = 2 * rows * side**2 / fastest(lambda: torch.nn.functional.linear(left, right), device)
    found = Limits(read_speed(device, n_bytes), flops)
    if device.type == "cuda":
        del left, right
        torch.cuda.empty_cache()  # the engines share the card
    return found


def read_speed(device: torch.device, n_bytes: int) -> float:
    """Bytes a second: of a card's memory, copied within it (read and written); of a CPU's, read by all threads."""
    source = torch.ones(n_bytes // 4, device=device)
    if device.type == "cuda":
        target = torch.empty_like(source)
        return 2 * n_bytes / fastest(lambda: target.copy_(source), device)
    # Which of these is the fastest reader differs between machines.
    return n_bytes / min(fastest(source.sum, device), fastest(source.view(torch.int64).sum, device))


def fastest(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several calls."""
    taken = []
    for _ in range(TRIES):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        taken.append(time.perf_counter() - started)
    return min(taken)


def read_bytes(args: ModelArgs, dtype: torch.dtype, scheme: Scheme | None) -> int:
    """Bytes of the weights that a decode step reads: all, but of an embedding of its own only a row."""
    total = 0
    for spec in specs(args).values():
        if spec.name == (OUTPUT if args.tied else EMBEDDING):
            continue
        form = None if scheme is None else scheme.form(spec.name, args)
        n_values = torch.Size(spec.shape).numel()
        total += n_values * dtype.itemsize if form is None else form.nbytes(*spec.shape)
    return total


def prefill_flops(args: ModelArgs) -> int:
    """Operations a token of the linears in a prefill, whose logits are computed for the last token alone."""
    names = ("norm", EMBEDDING, OUTPUT)
    return 2 * sum(
        torch.Size(spec.shape).numel() for spec in specs(args).values() if not any(name in spec.name for name in names)
    )
