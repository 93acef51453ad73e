"""Ranks that share memory for a while; the pools of ranks stay, and in other tests they exchange through the group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llama.kernels import shared
from llama.parallel import groups
from llama.parallel.groups import Ranks


@contextmanager
def sharing() -> Iterator[Ranks]:
    """Yield the ranks, which share memory where they can until the end; call this on every rank at once."""
    plain = groups.current()
    try:
        yield groups.share_memory()
    finally:
        if groups.current().segment is not None:
            shared.close_segment(groups.current().segment)
        groups._current = plain
