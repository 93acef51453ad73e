"""What collectives cost over links, and what a card computes meanwhile: reckoned, not measured.

A collective among N ranks, of S bytes, over links of bandwidth W (each way) and latency L takes

    all-reduce (ring)   2 (N - 1) (L + S / (N W))
    all-gather (ring)   (N - 1) (L + S / (N W)), S the bytes of the result
    broadcast (ring)    (N - 1) L + S / W

A decode step reads a rank's weights and its part of the cache once; a prefill computes two operations a weight of the
linears and token. Overheads of launching, and what of the two can overlap, are left out.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from allocations import DTYPE

from llama.checkpoint.table import rank_params
from llama.errors import LlamaError
from llama.parallel.partition import Partition


@dataclass(frozen=True)
class Link:
    """How ranks are connected.

    Args:
        latency: seconds from one rank's memory to the next one's, however little is sent.
        bandwidth: bytes a second, each way.
    """

    latency: float
    bandwidth: float


# What is usual, not measured here; cards without peer access go through the host, which the latencies count in.
LINKS = {
    "NVLink 3": Link(3e-6, 300e9),
    "PCIe 4 x16": Link(8e-6, 25e9),
    "PCIe 3 x8": Link(10e-6, 6.5e9),
    "10 GbE": Link(30e-6, 1.15e9),
}
LINK = re.compile(r"(?P<name>[^=]+)=(?P<latency>[\d.]+)us@(?P<bandwidth>[\d.]+)")


def parse_links(text: str | None) -> dict[str, Link]:
    """Links by name: of `LINKS`, or "name=20us@50" of one's own (GB/s), in a list with commas; None for all of `LINKS`.

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


def seconds(kind: str, nbytes: int, n_ranks: int, link: Link) -> float:
    """What one collective takes, as the head of this file says."""
    steps, piece = n_ranks - 1, nbytes / (n_ranks * link.bandwidth)
    if kind == "broadcast":
        return steps * link.latency + nbytes / link.bandwidth
    return (2 if kind == "all-reduce" else 1) * steps * (link.latency + piece)


@dataclass(frozen=True)
class Machine:
    """What a card does: bytes read a second, and operations a second."""

    bandwidth: float
    flops: float

    def decode_seconds(self, partition: Partition, batch_size: int, context: int) -> float:
        """Reading the fullest rank's weights, a separate embedding left out, and a cache of `context` tokens a row."""
        args = partition.args
        nbytes = []
        for rank in range(partition.world_size):
            table = 0 if args.tied else args.dim * len(partition.vocab[rank])
            cached = 2 * args.n_layers * batch_size * context * len(partition.kv_rows[rank])
            nbytes.append((rank_params(partition, rank) - table + cached) * DTYPE.itemsize)
        return max(nbytes) / self.bandwidth

    def prefill_seconds(self, partition: Partition, n_tokens: int) -> float:
        """Multiplying the fullest rank's linears with so many tokens; tables and attention's own products left out."""
        args = partition.args
        tables = 1 if args.tied else 2
        linears = max(
            rank_params(partition, rank) - tables * args.dim * len(partition.vocab[rank])
            for rank in range(partition.world_size)
        )
        return 2 * linears * n_tokens / self.flops
