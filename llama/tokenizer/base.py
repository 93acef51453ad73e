"""The interface of all tokenizers, and streams that decode token by token.

The three kinds (`spm`, `bpe`, `hf`) encode text in different ways, and decode in one of two: ids become raw bytes that
are joined and read as UTF-8 (`ByteStream`), or pieces with SentencePiece's rules for leading blanks and byte fallback
(`PieceStream`).
"""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from llama.errors import TokenizerError
from llama.tokenizer.vocabulary import Vocabulary

SPACE_MARK = "▁"  # U+2581, SentencePiece's spelling of a blank

# A vocabulary that has these ends generation at each of them. Hugging Face's EOS of a Llama 3 chat model is <|eot_id|>
# alone, which would let a base model's continuation run past <|end_of_text|>.
LLAMA_3_STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")

# A vocabulary entry as `PieceStream` reads it: text with blanks as SPACE_MARK; one raw byte (byte
# fallback); or None for a control token, which is silent.
Piece = str | bytes | None


class TextStream(ABC):
    """The text of a sequence of ids, token by token.

    The texts that `push` and `flush` return, joined, are `Tokenizer.decode` of all the ids pushed. A character whose
    bytes are spread over several tokens is held back until it is whole. A `push` costs the same however many ids were
    pushed before.
    """

    @abstractmethod
    def push(self, token_id: int) -> str:
        """Decode the next id; return the text that no later id can change, which may be empty."""

    @abstractmethod
    def flush(self) -> str:
        """Return the text held back, an unfinished character as U+FFFD. No id may be pushed afterwards."""


class Tokenizer(ABC):
    """A tokenizer: text to ids and back, and the special tokens of its vocabulary.

    Attributes:
        kind: "sentencepiece", "tiktoken" or "hf".
        n_words: size of the vocabulary, special tokens included; ids are in `range(n_words)`.
        bos_id: id that opens a text.
        eos_id: id that closes a text.
        pad_id: id that fills up a batch, or -1 where the vocabulary has none.
        stop_tokens: every id at which generation ends.
        special_tokens: name to id. None of them is ever produced from text.
    """

    kind: str
    n_words: int
    bos_id: int
    eos_id: int
    pad_id: int
    stop_tokens: frozenset[int]
    special_tokens: dict[str, int]

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        """Return the ids of `text`, with BOS before and EOS after it where asked.

        Text that spells a special token is text: no input can produce a special token's id. Lone
        surrogates, which JSON can smuggle into a str and UTF-8 cannot express, become U+FFFD.

        Raises:
            TypeError: `text` is not a str.
        """
        if not isinstance(text, str):
            raise TypeError(f"encode takes a str, found {type(text).__name__}")
        ids = self._encode(_well_formed(text))
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD.

        SentencePiece's control tokens are silent, Llama 3's special tokens are spelt out, each as in
        Meta's code.

        Raises:
            TokenizerError: an id is outside the vocabulary.
        """
        return self._decode([self._checked(token_id) for token_id in ids])

    def token_text(self, token_id: int) -> str:
        """Return the text of one token alone, as in Meta's `tokens` lists.

        A SentencePiece word loses its leading blank here, and a part of a character is U+FFFD.

        Raises:
            TokenizerError: the id is outside the vocabulary.
        """
        return self.decode([token_id])

    @abstractmethod
    def text_stream(self) -> TextStream:
        """Return a new stream that decodes ids as they come."""

    @abstractmethod
    def vocabulary(self) -> Vocabulary:
        """Return all tokens with their kinds and merges, for programs with tokenizers of their own.

        Raises:
            TokenizerError: this tokenizer cuts text in a way that llama.cpp's kinds cannot express.
        """

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Encode well-formed text as plain text."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Decode ids that are known to be in the vocabulary."""

    def _checked(self, token_id: int) -> int:
        token_id = int(token_id)  # also the integer scalars of numpy and torch
        if not 0 <= token_id < self.n_words:
            raise TokenizerError(
                f"token id {token_id} is outside the vocabulary of {self.n_words:,} tokens: "
                "this tokenizer does not belong to the model that produced it"
            )
        return token_id


class ByteStream(TextStream):
    """A stream over tokens that are byte strings: joined, then read as UTF-8 with replacement."""

    def __init__(self, token_bytes: Callable[[int], bytes]):
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """See `TextStream.push`."""
        return self._utf8.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        """See `TextStream.flush`."""
        return self._utf8.decode(b"", final=True)


class PieceStream(TextStream):
    """A stream over SentencePiece pieces, equal to `SentencePieceProcessor.decode`.

    Args:
        pieces: id to its piece; a SPACE_MARK in the text is a blank.
        strippable: pieces that may lose one leading blank before the first text appears: 1 where
            encoding adds a blank in front (the Llamas), 0 where it does not, -1 for no limit.
    """

    def __init__(self, pieces: Callable[[int], Piece], strippable: int):
        self._pieces = pieces
        self._strippable = strippable
        self._tail = b""  # bytes of a character that is not whole yet; never more than 3

    def push(self, token_id: int) -> str:
        """See `TextStream.push`."""
        piece = self._pieces(token_id)
        if isinstance(piece, bytes):
            self._tail += piece
            text = self._take_characters(final=False)
        else:
            # Any other piece, even a silent one, ends a run of bytes.
            text = self.flush()
            if text:
                self._strippable = 0
            text += self._text_of(piece or "")
        if text:
            self._strippable = 0
        return text

    def flush(self) -> str:
        """See `TextStream.flush`."""
        return self._take_characters(final=True)

    def _text_of(self, piece: str) -> str:
        if self._strippable and piece.startswith(SPACE_MARK):
            self._strippable -= 1
            piece = piece[1:]
        return piece.replace(SPACE_MARK, " ")

    def _take_characters(self, final: bool) -> str:
        """Remove from the tail, and return, the characters that no further byte can change; with `final` all."""
        text = ""
        while self._tail:
            need = _sequence_length(self._tail[0])
            unfinished = len(self._tail) < need and all(0x80 <= byte <= 0xBF for byte in self._tail[1:])
            if unfinished and not final:
                break
            try:
                text += self._tail[:need].decode("utf-8")
            except UnicodeDecodeError:
                text, need = text + "\ufffd", 1  # SentencePiece writes one for every byte that fits nowhere
            self._tail = self._tail[need:]
        return text


def _sequence_length(lead: int) -> int:
    """Return the bytes of the UTF-8 character that starts with `lead`; 1 if no character starts so."""
    if 0xC2 <= lead <= 0xDF:
        return 2
    if 0xE0 <= lead <= 0xEF:
        return 3
    if 0xF0 <= lead <= 0xF4:
        return 4
    return 1


def _well_formed(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        # Pairs of surrogates are joined, lone ones replaced.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
