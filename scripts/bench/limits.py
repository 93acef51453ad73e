"""Limits of machines and links: what they can do at best, measured or nominal, and what work takes within them.

Measured are the bytes read and the operations a second of this machine, with torch alone. Nominal are those of a card
and of its links, for costs that are reckoned. A collective among N ranks, of S bytes, over links of bandwidth W (each
way) and latency L takes

    all-reduce (ring)   2 (N - 1) (L + S / (N W))
    all-gather (ring)   (N - 1) (L + S / (N W)), S the bytes of the result
    broadcast (ring)    (N - 1) L + S / W

A decode step reads a rank's weights and its part of the cache once; a prefill computes two operations a weight of the
linears and token. The overhead of launching kernels, and what of the two can overlap, are left out.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from llama.checkpoint.table import WEIGHT, parts, rank_params, specs
from llama.config import ModelArgs
from llama.errors import LlamaError
from llama.parallel.partition import Partition
from llama.quantization.scheme import EMBEDDING, OUTPUT, Scheme
from scripts.bench.peers import synchronize
from scripts.bench.weights import DTYPE

# Large enough that no cache holds it.
READ_BYTES = 1 << 30
# Sides of the matrices that are multiplied: rows of a prompt, and of a square weight.
MATMUL = {"cpu": (512, 4096), "cuda": (8192, 8192)}
TRIES = 5


@dataclass(frozen=True)
class Limits:
    """The most that a device can do.

    Args:
        read: bytes a second; measured on a card, those that a copy reads and writes, on a CPU those that a sum reads.
        flops: operations a second of a matrix product.
    """

    read: float
    flops: float

    def better(self, other: Limits) -> Limits:
        """Return the best of both."""
        return Limits(max(self.read, other.read), max(self.flops, other.flops))

    def decode_seconds(self, partition: Partition, batch_size: int, context: int) -> float:
        """Return the time to read the fullest rank's weights and a cache of `context` tokens a row, in `DTYPE`.

        An embedding apart from the output layer is left out: a step reads only some rows of its table.
        """
        args = partition.args
        nbytes = []
        for rank in range(partition.world_size):
            table = 0 if args.tied else args.dim * len(partition.vocab[rank])
            cached = 2 * args.n_layers * batch_size * context * len(partition.kv_rows[rank])
            nbytes.append((rank_params(partition, rank) - table + cached) * DTYPE.itemsize)
        return max(nbytes) / self.read

    def prefill_seconds(self, partition: Partition, n_tokens: int) -> float:
        """Return the time to multiply `n_tokens` tokens with the fullest rank's linears.

        The two tables and attention's own products are left out.
        """
        args = partition.args
        tables = 1 if args.tied else 2
        linears = max(
            rank_params(partition, rank) - tables * args.dim * len(partition.vocab[rank])
            for rank in range(partition.world_size)
        )
        return 2 * linears * n_tokens / self.flops


# -- measured --------------------------------------------------------------------------------------


def measure_limits(device: torch.device, dtype: torch.dtype, quick: bool = False) -> Limits:
    """Measure what `device` can do now with the threads that torch has; `quick` takes little memory and work."""
    n_bytes = READ_BYTES // (16 if quick else 1)
    rows, side = (size // (4 if quick else 1) for size in MATMUL[device.type])
    left = torch.ones(rows, side, device=device, dtype=dtype)
    right = torch.ones(side, side, device=device, dtype=dtype)
    flops = 2 * rows * side**2 / _fastest(lambda: torch.nn.functional.linear(left, right), device)
    found = Limits(_read_speed(device, n_bytes), flops)
    if device.type == "cuda":
        del left, right
        torch.cuda.empty_cache()  # the engines share the card
    return found


def _read_speed(device: torch.device, n_bytes: int) -> float:
    """Return bytes a second: of a card, those that a copy reads and writes; of a CPU, those that all threads read."""
    source = torch.ones(n_bytes // 4, device=device)
    if device.type == "cuda":
        target = torch.empty_like(source)
        return 2 * n_bytes / _fastest(lambda: target.copy_(source), device)
    # Which of these is the fastest reader differs between machines.
    return n_bytes / min(_fastest(source.sum, device), _fastest(source.view(torch.int64).sum, device))


def _fastest(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of several calls."""
    taken = []
    for _ in range(TRIES):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        taken.append(time.perf_counter() - started)
    return min(taken)


def read_bytes(args: ModelArgs, dtype: torch.dtype, scheme: Scheme | None) -> int:
    """Return the bytes of the weights that a decode step reads: all but an embedding apart from the output layer."""
    skipped = (OUTPUT if args.tied else EMBEDDING).removesuffix(WEIGHT)
    stored = (spec for spec in specs(args, scheme).values() if not spec.name.startswith(skipped))
    return sum(math.prod(spec.shape) * (spec.dtype or dtype).itemsize for spec in stored)


def prefill_flops(args: ModelArgs) -> int:
    """Return the operations a token of the linears in a prefill, whose logits are computed for the last token alone."""
    return 2 * sum(math.prod(spec.shape) for spec in parts(args)[0] if len(spec.axes) == 2) * args.n_layers


# -- links -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """A connection between ranks.

    Args:
        latency: seconds from one rank's memory to the next one's, however little is sent.
        bandwidth: bytes a second, each way.
    """

    latency: float
    bandwidth: float


# Usual figures, not measured; the latencies count in that cards without peer access go through the host.
LINKS = {
    "NVLink 3": Link(3e-6, 300e9),
    "PCIe 4 x16": Link(8e-6, 25e9),
    "PCIe 3 x8": Link(10e-6, 6.5e9),
    "10 GbE": Link(30e-6, 1.15e9),
}
LINK = re.compile(r"(?P<name>[^=]+)=(?P<latency>[\d.]+)us@(?P<bandwidth>[\d.]+)")


def parse_links(text: str | None) -> dict[str, Link]:
    """Return links by name: those of `LINKS` that a list with commas names, or a user's own, "name=20us@50" (GB/s).

    Args:
        text: the list; None for all of `LINKS`.

    Raises:
        LlamaError: for anything else.
    """
    if text is None:
        return LINKS
    links = {}
    for part in map(str.strip, text.split(",")):
        own = LINK.fullmatch(part)
        try:
            links[own["name"].strip() if own else part] = (
                Link(float(own["latency"]) * 1e-6, float(own["bandwidth"]) * 1e9) if own else LINKS[part]
            )
        except (KeyError, ValueError):
            raise LlamaError(
                f"no link is called {part!r}: use {', '.join(LINKS)}, or your own, such as 'my switch=20us@50' (GB/s)"
            ) from None
        if min(dataclasses.astuple(links[list(links)[-1]])) <= 0:
            raise LlamaError(f"--links {part!r}: latency and bandwidth must lie above zero")
    return links


def collective_seconds(kind: str, nbytes: int, n_ranks: int, link: Link) -> float:
    """Return the time that one collective takes, by the formulas at the head of this file."""
    steps, piece = n_ranks - 1, nbytes / (n_ranks * link.bandwidth)
    if kind == "broadcast":
        return steps * link.latency + nbytes / link.bandwidth
    return (2 if kind == "all-reduce" else 1) * steps * (link.latency + piece)
