"""Vocabularies: tokens with their kinds and merges, for programs with tokenizers of their own.

Every tokenizer of ours returns its vocabulary (`Tokenizer.vocabulary`), and the GGUF export writes it.
"""

from __future__ import annotations

import struct
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

from llama.errors import TokenizerError

UNUSED_SCORE = -10000.0

Token = TypeVar("Token", str, bytes)


class Kind(IntEnum):
    """The kinds of tokens, numbered as in SentencePiece's `ModelProto` and in GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer by id, in one of two families.

    Args:
        family: "spm", SentencePiece's BPE, where the best-scored neighbours merge; or "bpe", byte-level
            with a list of merges.
        tokens: spelt with U+2581 for a blank (spm), or in GPT-2's alphabet of bytes (bpe); special
            tokens in plain text.
        kinds: of each token.
        scores: of each token; empty for bpe.
        merges: "left right", the first to be applied first; empty for spm.
        pattern: for bpe, the rule that cuts text into words: "llama3" or "gpt2".
        space_prefix: true where a blank is put in front of every text.
        unk_id: the unknown token, or -1.
        remarks: cases in which a program that knows only these fields would cut text otherwise.
    """

    family: str
    tokens: Sequence[str]
    kinds: Sequence[Kind]
    scores: Sequence[float] = ()
    merges: Sequence[str] = ()
    pattern: str = ""
    space_prefix: bool = False
    unk_id: int = -1
    remarks: Sequence[str] = ()


# -- merges ----------------------------------------------------------------------------------------


def all_merges(order: Mapping[Token, float], ids: Mapping[Token, int]) -> list[tuple[Token, Token]]:
    """Return every pair of tokens that spells a third, in the order in which pairs merge.

    tiktoken and SentencePiece join whichever neighbours spell the token that comes first. So every way to cut a token
    into two tokens is a merge at the token's place, not only the one that its training took.

    Args:
        order: the place of each token that merges are made of: its rank, or its score negated.
        ids: of the tokens; pairs of one place come in the order of their ids.
    """
    found = [
        (place, ids[left], ids[right], left, right)
        for token, place in order.items()
        for left, right in halves(token, order)
    ]
    found.sort()
    return [(left, right) for *_, left, right in found]


def halves(token: Token, known: Container[Token]) -> Iterator[tuple[Token, Token]]:
    """Yield the ways to cut a token into two known ones."""
    for cut in range(1, len(token)):
        left, right = token[:cut], token[cut:]
        if left in known and right in known:
            yield left, right


# -- byte-level ------------------------------------------------------------------------------------


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's spelling of bytes: printable Latin-1 as it is, the others from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
_SPELLING = {byte: character for character, byte in BYTE_OF.items()}


def spell(token: bytes) -> str:
    """Return a token's bytes in GPT-2's alphabet."""
    return "".join(_SPELLING[byte] for byte in token)


# -- SentencePiece ---------------------------------------------------------------------------------

# Field numbers of sentencepiece_model.proto (google/sentencepiece).
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1, 2, 3
_MODEL_TYPE, _SUFFIX_BLANKS = 3, 24
_CHARSMAP, _DUMMY_PREFIX, _DROP_BLANKS, _ESCAPE_BLANKS = 2, 3, 4, 5
_UNIGRAM, _BPE = 1, 2


def vocabulary_of_proto(proto: bytes, unk_id: int) -> Vocabulary:
    """Read a SentencePiece `ModelProto`, whose settings and piece types the library does not tell.

    Raises:
        TokenizerError: for a model that is no BPE, or has no bytes to fall back on: other programs cut
            text by merging, and abort on a character that they cannot spell.
    """
    fields = list(_fields(proto))
    trainer = dict(_fields(b"".join(bytes(value) for key, value in fields if key == _TRAINER)))
    normalizer = dict(_fields(b"".join(bytes(value) for key, value in fields if key == _NORMALIZER)))
    if trainer.get(_MODEL_TYPE, _UNIGRAM) != _BPE:
        raise TokenizerError("the SentencePiece model is no BPE, as a Llama's is: llama.cpp would cut text otherwise")
    pieces = [dict(_fields(bytes(value))) for key, value in fields if key == _PIECES]
    kinds = [Kind(int(piece.get(_PIECE_TYPE, Kind.NORMAL))) for piece in pieces]
    check_bytes(kinds)
    return Vocabulary(
        family="spm",
        tokens=[bytes(piece.get(_PIECE_TEXT, b"")).decode("utf-8") for piece in pieces],
        kinds=kinds,
        scores=[struct.unpack("<f", bytes(piece.get(_PIECE_SCORE, bytes(4))))[0] for piece in pieces],
        space_prefix=bool(normalizer.get(_DUMMY_PREFIX, 1)),
        unk_id=unk_id,
        remarks=_remarks(trainer, normalizer, kinds),
    )


def check_bytes(kinds: Sequence[Kind]) -> None:
    """Refuse a SentencePiece vocabulary without byte fallback, which llama.cpp cannot do without."""
    n_bytes = sum(kind == Kind.BYTE for kind in kinds)
    if n_bytes != 256:
        raise TokenizerError(f"the tokenizer has {n_bytes} byte tokens, not 256: llama.cpp needs byte fallback")


def _remarks(trainer: Mapping[int, object], normalizer: Mapping[int, object], kinds: Sequence[Kind]) -> list[str]:
    remarks = []
    if normalizer.get(_CHARSMAP):
        remarks.append("the tokenizer rewrites characters (such as NFKC does), llama.cpp does not")
    if normalizer.get(_DROP_BLANKS, 1):
        remarks.append("the tokenizer drops leading, trailing and repeated blanks, llama.cpp keeps them")
    if not normalizer.get(_ESCAPE_BLANKS, 1) or trainer.get(_SUFFIX_BLANKS, 0):
        remarks.append("the tokenizer marks blanks in a way that llama.cpp does not know")
    if Kind.USER_DEFINED in kinds:
        remarks.append("llama.cpp puts a blank behind user-defined tokens")
    return remarks


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of every field of a protobuf message: a whole number, or bytes for anything else."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            size, at = _varint(message, at)
        if size is None or at + size > len(message):
            raise TokenizerError("the SentencePiece model is damaged: download it again")
        yield number, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message):
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise TokenizerError("the SentencePiece model is damaged: download it again")
