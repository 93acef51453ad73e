"""Perplexity of a text under a model: how well the model predicts each token.

A text is cut into windows without overlap. Each window begins with BOS and sees nothing before it, so every token of
the text is predicted once; the perplexity is e to the mean negative log-probability of a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama.errors import DataError, LlamaError
from llama.generation.engine import Request
from llama.generation.llama import Llama
from llama.generation.sampling import Sampling
from llama.tokenizer import Tokenizer
from llama.tokenizer.texts import read_text, windows

# Fewest tokens that a perplexity is computed from; the mean over fewer says nothing.
FEWEST = 16
# exp() of more than this overflows a float; a broken model may predict that badly.
LARGEST = 709.0


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of a text under one model.

    Args:
        log_probs: log-probability of every token in order, natural logarithms.
        n_windows: windows that the text was cut into.
    """

    log_probs: tuple[float, ...]
    n_windows: int

    @property
    def nats(self) -> float:
        """Mean negative log-probability of a token."""
        return -math.fsum(self.log_probs) / len(self.log_probs)

    @property
    def perplexity(self) -> float:
        """e to the mean negative log-probability of a token."""
        return math.exp(min(self.nats, LARGEST))

    def change(self, other: Scores) -> float:
        """Return the mean absolute difference between two models' log-probabilities of a token, in nats."""
        pairs = zip(self.log_probs, other.log_probs, strict=True)
        return math.fsum(abs(own - theirs) for own, theirs in pairs) / len(self.log_probs)


def read_windows(path: str | Path, tokenizer: Tokenizer, max_seq_len: int) -> list[list[int]]:
    """Read a text file and cut it into windows of at most `max_seq_len` tokens, BOS included.

    Raises:
        LlamaError: for a file that is missing, empty, not UTF-8 or too short, and for windows of fewer than 2 tokens.
    """
    if max_seq_len < 2:
        raise LlamaError(f"max_seq_len must be 2 or more, is {max_seq_len}: BOS and a token that follows it")
    text = read_text(Path(path))
    if not text.strip():
        raise DataError(f"{path} is empty: give a text to predict")
    tokens = tokenizer.encode(text, bos=False, eos=False)
    if len(tokens) < FEWEST:
        raise DataError(
            f"{path} has {len(tokens)} tokens, but a perplexity needs {FEWEST} at least: give a longer text"
        )
    return windows(tokens, tokenizer.bos_id, max_seq_len)


def score(llama: Llama, texts: Sequence[Sequence[int]]) -> Scores:
    """Return the log-probability of every token of each window but its first; a collective call.

    Args:
        llama: the model, which runs `max_batch_size` windows at a time and keeps no more logits than the engine does.
        texts: windows of token ids.
    """
    greedy = Sampling(temperature=0.0)
    requests = [Request(number, text, 0, greedy, score_prompt=True) for number, text in enumerate(texts)]
    found: dict[int, list[float]] = {}
    for event in llama.engine.run(requests, llama.max_batch_size):
        if event.prompt_log_probs is not None:
            found[event.index] = event.prompt_log_probs[1:]
    return Scores(tuple(value for number in range(len(texts)) for value in found[number]), len(texts))
