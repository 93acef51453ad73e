"""SentencePiece models: Llama 1 and 2, and vocabularies extended from them."""

import sentencepiece

from llama.errors import TokenizerError
from llama.tokenizer.base import SPACE_MARK, Piece, PieceStream, TextStream, Tokenizer
from llama.tokenizer.vocabulary import Vocabulary, vocabulary_of_proto


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer read from a SentencePiece `ModelProto`.

    Args:
        proto: the file's content.
        origin: the file's name, for messages.

    Raises:
        TokenizerError: the content is damaged, or the vocabulary lacks BOS or EOS.
    """

    kind = "sentencepiece"

    def __init__(self, proto: bytes, origin: str):
        self._processor = _processor(proto, origin)
        sp = self._processor
        self.n_words = sp.get_piece_size()
        self.bos_id, self.eos_id, self.pad_id = sp.bos_id(), sp.eos_id(), sp.pad_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise TokenizerError(
                f"{origin}: a Llama needs BOS and EOS, this SentencePiece model has bos_id {self.bos_id} "
                f"and eos_id {self.eos_id}: train it with both"
            )
        self.stop_tokens = frozenset({self.eos_id})
        self._pieces = [self._piece(token_id) for token_id in range(self.n_words)]
        self.special_tokens = {
            sp.id_to_piece(i): i for i in range(self.n_words) if sp.is_control(i) or sp.is_unknown(i)
        }
        self._strippable = self._count_strippable()

    def text_stream(self) -> TextStream:
        """See `Tokenizer.text_stream`."""
        return PieceStream(lambda token_id: self._pieces[self._checked(token_id)], self._strippable)

    def vocabulary(self) -> Vocabulary:
        """See `Tokenizer.vocabulary`."""
        return vocabulary_of_proto(self._processor.serialized_model_proto(), self._processor.unk_id())

    def _encode(self, text: str) -> list[int]:
        return self._processor.encode(text, out_type=int)

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids) if ids else ""

    def _piece(self, token_id: int) -> Piece:
        sp = self._processor
        if sp.is_control(token_id):
            return None
        if sp.is_unknown(token_id):
            return sp.decode([token_id])  # the model's own sign for it, " ⁇ "
        piece = sp.id_to_piece(token_id)
        return bytes([int(piece[3:5], 16)]) if sp.is_byte(token_id) else piece  # "<0x0A>"

    def _count_strippable(self) -> int:
        """Return the number of leading blanks that decoding drops, by trying: the model's settings have no accessor."""
        blank = self._processor.piece_to_id(SPACE_MARK)
        if self._processor.is_unknown(blank):
            return 1
        kept = len(self._processor.decode([blank, blank]))
        return {0: -1, 2: 0}.get(kept, 1)


def _processor(proto: bytes, origin: str) -> sentencepiece.SentencePieceProcessor:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    except RuntimeError as error:
        raise TokenizerError(
            f"{origin} starts like a SentencePiece model but is damaged or cut short "
            f"({len(proto):,} bytes): download it again"
        ) from error
    return processor
