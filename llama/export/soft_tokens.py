"""Soft prompts as vocabulary, for programs that know only tokens.

Each virtual token becomes a control token, and its vector a row of the embedding. The output layer gets a row for each
as well: a copy of the row of a token that models never generate, so that they never generate a virtual token either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.checkpoint.files import Index
from llama.checkpoint.rows import SourceTensor
from llama.checkpoint.source import Checkpoint
from llama.checkpoint.table import specs
from llama.errors import AdapterError, TokenizerError
from llama.tokenizer.vocabulary import UNUSED_SCORE, Kind, Vocabulary, spell

# No UTF-8 text holds this byte, so its token is in no training text.
NEVER = b"\xff"


def token_names(n_tokens: int) -> list[str]:
    """Return the names of the virtual tokens: `<|soft_0|>` and so on."""
    return [f"<|soft_{number}|>" for number in range(n_tokens)]


def add_tokens(vocabulary: Vocabulary, n_tokens: int) -> Vocabulary:
    """Return the vocabulary with the virtual tokens behind all others.

    Raises:
        TokenizerError: when the vocabulary has tokens of these names.
    """
    names = token_names(n_tokens)
    taken = sorted(set(names) & set(vocabulary.tokens))
    if taken:
        raise TokenizerError(f"the tokenizer has a token {taken[0]} of its own: no soft prompt can be added to it")
    return dataclasses.replace(
        vocabulary,
        tokens=[*vocabulary.tokens, *names],
        kinds=[*vocabulary.kinds, *[Kind.CONTROL] * n_tokens],
        scores=[*vocabulary.scores, *[UNUSED_SCORE] * n_tokens] if vocabulary.scores else (),
    )


def never_said(vocabulary: Vocabulary) -> int:
    """Return the token whose row of the output layer the virtual tokens get: `<unk>`, else the byte 0xFF.

    Raises:
        TokenizerError: when the vocabulary has neither.
    """
    if vocabulary.unk_id >= 0:
        return vocabulary.unk_id
    name = "<0xFF>" if vocabulary.family == "spm" else spell(NEVER)
    if name not in vocabulary.tokens:
        raise TokenizerError(f"the tokenizer has neither an unknown token nor {name}: virtual tokens could be said")
    return list(vocabulary.tokens).index(name)


def add_rows(checkpoint: Checkpoint, prompt: Tensor, unlikely: int) -> Checkpoint:
    """Return the checkpoint with the soft prompt behind its embedding, and an output layer that is not tied.

    Args:
        checkpoint: the model.
        prompt: [n_virtual_tokens, dim].
        unlikely: the token whose row of the output layer is copied for each virtual token.

    Raises:
        AdapterError: when the prompt has another width than the model.
    """
    args = checkpoint.args
    if prompt.dim() != 2 or prompt.shape[1] != args.dim:
        raise AdapterError(
            f"the soft prompt is {list(prompt.shape)}, the model's embeddings are {args.dim} wide: "
            "it was trained for another model"
        )
    args = dataclasses.replace(args, vocab_size=args.vocab_size + prompt.shape[0], tied=False)
    embedding = checkpoint.tensors["tok_embeddings.weight"]
    output = checkpoint.tensors.get("output.weight", embedding)
    row = torch.empty(1, args.dim)
    output.read_into((slice(unlikely, unlikely + 1), slice(0, args.dim)), row)
    longer = {
        "tok_embeddings.weight": _longer(embedding, prompt),
        "output.weight": _longer(output, row.expand(prompt.shape[0], -1)),
    }
    tensors = {
        name: dataclasses.replace(longer[name], spec=spec) if name in longer else checkpoint.tensors[name]
        for name, spec in specs(args).items()
    }
    return dataclasses.replace(checkpoint, args=args, tensors=tensors)


@dataclass(frozen=True, kw_only=True)
class _Longer(SourceTensor):
    """A matrix with further rows at its end.

    Args:
        stored: the matrix.
        rows: those that follow, [n, columns].
    """

    stored: SourceTensor
    rows: Tensor

    def read(self, index: Index) -> Iterator[tuple[Index, Tensor]]:
        """See `SourceTensor.read`."""
        wanted, columns = index
        n_stored = self.stored.spec.shape[0]
        if wanted.start < n_stored:
            yield from self.stored.read((slice(wanted.start, min(wanted.stop, n_stored)), columns))
        first = max(wanted.start, n_stored)
        if first < wanted.stop:
            values = self.rows[first - n_stored : wanted.stop - n_stored, columns]
            start = first - wanted.start
            yield (slice(start, start + values.shape[0]), slice(0, values.shape[1])), values


def _longer(stored: SourceTensor, rows: Tensor) -> _Longer:
    return _Longer(spec=stored.spec, pieces=stored.pieces, dim=stored.dim, stored=stored, rows=rows)
