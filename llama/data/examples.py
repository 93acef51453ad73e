"""Training examples: records in a template, as token ids of which a part is learnt."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from llama.data.records import Record
from llama.data.templates import Template, find_template
from llama.errors import DataError
from llama.tokenizer import Tokenizer


@dataclass(frozen=True)
class Example:
    """One training example.

    Args:
        tokens: ids from BOS to EOS.
        n_context: tokens at the start, BOS included, that are read but not learnt; at least one.
    """

    tokens: tuple[int, ...]
    n_context: int

    @property
    def n_learnt(self) -> int:
        """Tokens that are learnt."""
        return len(self.tokens) - self.n_context


@dataclass(frozen=True)
class Encoded:
    """The examples of a data set.

    Args:
        examples: in the order of their records.
        max_seq_len: tokens at which examples were cut.
        n_truncated: examples that lost their end.
        n_dropped: records that became no example, as all their learnt tokens were cut off.
    """

    examples: list[Example]
    max_seq_len: int
    n_truncated: int = 0
    n_dropped: int = 0

    @property
    def n_tokens(self) -> int:
        """Tokens of all examples."""
        return sum(len(example.tokens) for example in self.examples)

    @property
    def n_learnt(self) -> int:
        """Tokens that are learnt, of all examples."""
        return sum(example.n_learnt for example in self.examples)

    def report(self) -> str:
        """Return one line for a person: sizes and cuts."""
        text = f"{len(self.examples):,} examples of {self.n_tokens:,} tokens, {self.n_learnt:,} of them learnt"
        if self.n_truncated:
            text += f"; {self.n_truncated:,} cut to {self.max_seq_len:,} tokens"
        if self.n_dropped:
            text += f"; {self.n_dropped:,} left out, whose prompts alone have {self.max_seq_len:,} tokens or more"
        return text


def encode_records(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    template: str = "alpaca",
    max_seq_len: int = 512,
    train_on_prompt: bool = False,
) -> Encoded:
    """Write records in a template and encode them.

    Prompt and answer are encoded apart (but for llama2, whose turns Meta encodes in one piece), so that training
    continues from the same ids as generation. In one piece, as Stanford had them, the prompt's last colon would merge
    with the first word of 45 % of Alpaca's answers under Llama 3's tokenizer, and a SentencePiece model would lose
    the blank that it has always seen before a word. The tokens that are read but not learnt are those that the
    example has in common with the prompt encoded alone.

    Args:
        records: to encode.
        tokenizer: the model's own.
        template: "alpaca", "llama2", "llama3" or "plain"; see `Template`.
        max_seq_len: tokens of an example at most, a soft prompt not counted; longer ones lose their end.
        train_on_prompt: learn all but BOS.

    Raises:
        DataError: no template has this name, or no example is left.
        TokenizerError: the tokenizer lacks the template's special tokens.
    """
    chosen = find_template(template, tokenizer)
    examples = []
    n_truncated = shortest = 0
    for record in records:
        whole, n_context = _encode(record, chosen, train_on_prompt)
        shortest = min(shortest or n_context, n_context)
        if n_context < max_seq_len:
            examples.append(Example(tuple(whole[:max_seq_len]), n_context))
            n_truncated += len(whole) > max_seq_len
    if not examples:
        raise DataError(_nothing_left(len(records), max_seq_len, shortest))
    return Encoded(examples, max_seq_len, n_truncated, len(records) - len(examples))


def _encode(record: Record, template: Template, train_on_prompt: bool) -> tuple[list[int], int]:
    whole = template.encode(record)
    return whole, 1 if train_on_prompt else n_common(whole, template.encode_prompt(record))


def n_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of tokens that both begin with."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _nothing_left(n_records: int, max_seq_len: int, shortest: int) -> str:
    if not n_records:
        return "no records to encode: the data set is empty"
    return (
        f"of {n_records:,} records none has anything to learn within --max_seq_len {max_seq_len:,} tokens: the "
        f"shortest prompt alone has {shortest:,}; raise --max_seq_len"
    )
