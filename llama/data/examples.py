"""Training examples: records in a template, as token ids with the part that is learnt."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One text to learn from.

    Args:
        tokens: ids from BOS to EOS.
        n_context: tokens at the start, BOS among them, that are read but not learnt; at least one.
    """

    tokens: tuple[int, ...]
    n_context: int
