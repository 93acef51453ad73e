"""Incremental decoding of a prompt's new tokens, with stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from llama.tokenizer import Tokenizer


class TextWatch:
    """A decoder of one prompt's new tokens, which watches for stop strings.

    Text that may be the beginning of a stop string is held back until more tokens decide.

    Args:
        tokenizer: decodes the tokens.
        stops: strings that end the text and are not part of it.
        prompt: tokens whose text comes first, without being searched for stop strings.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self._stream = tokenizer.text_stream()
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=1)
        self._text = "".join(map(self._stream.push, prompt))
        self._prompt_end = len(self._text)
        self._shown = 0
        self._ends: list[int] = []  # length of the text after each token
        self._flushed = False
        self.cut: int | None = None

    def push(self, token: int) -> bool:
        """Add the next token; return whether a stop string is complete."""
        self._add(self._stream.push(token))
        self._ends.append(len(self._text))
        return self.cut is not None

    def _add(self, delta: str) -> None:
        # A stop string that ends in the new text begins at most its own length before it.
        start = max(self._prompt_end, len(self._text) - self._longest + 1)
        self._text += delta
        found = [at for at in (self._text.find(stop, start) for stop in self._stops) if at >= 0]
        if found and self.cut is None:
            self.cut = min(found)

    def new_text(self, final: bool = False) -> str:
        """Return the text that has become certain since the last call; with `final`, all that is left."""
        if final and not self._flushed:
            self._flushed = True
            if self.cut is None:
                self._add(self._stream.flush())
        end = len(self._text) if final else len(self._text) - self._held_back()
        if self.cut is not None:
            end = self.cut
        delta = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return delta

    def _held_back(self) -> int:
        """Return how many characters at the end may be the beginning of a stop string."""
        for length in range(min(self._longest - 1, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-length:]) for stop in self._stops):
                return length
        return 0

    @property
    def n_dropped(self) -> int:
        """Number of newest tokens that belong to the stop string, in part or in whole."""
        if self.cut is None:
            return 0
        return sum(end > self.cut for end in self._ends)
