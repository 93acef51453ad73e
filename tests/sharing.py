"""Ranks that share memory for a while: the pools of ranks are kept, and other tests go through the group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llama.kernels import shared
from llama.parallel import groups
from llama.parallel.groups import Ranks


@contextmanager
def sharing() -> Iterator[Ranks]:
    """On every rank at once: the ranks, which share memory where they can, and no longer afterwards."""
    plain = groups.current()
    try:
        yield groups.share_memory()
    finally:
        if groups.current().segment is not None:
            shared.close_segment(groups.current().segment)
        groups._current = plain
