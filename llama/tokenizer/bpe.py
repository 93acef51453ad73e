"""Llama 3 to 3.3: byte-pair ranks, run by tiktoken, with 256 special tokens behind them.

Split pattern, special tokens and limits are facts of the format, as in meta-llama/llama-models,
models/llama3/tokenizer.py.
"""

import base64
import binascii
import itertools
import re
from collections.abc import Iterator

import tiktoken

from llama.errors import TokenizerError
from llama.tokenizer.base import LLAMA_3_STOPS, ByteStream, TextStream, Tokenizer
from llama.tokenizer.vocabulary import Kind, Vocabulary, all_merges, spell

SPLIT_PATTERN = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English clitics
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word with at most one sign before it
        r"\p{N}{1,3}",  # digits by threes
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # signs
        r"\s*[\r\n]+",  # line ends
        r"\s+(?!\S)",  # blanks, all but the one before a word
        r"\s+",
    ]
)

N_SPECIAL = 256
_NAMED = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
]
# In the order of their ids, which start where the ranks end.
SPECIAL_TOKENS = [*_NAMED, *(f"<|reserved_special_token_{i + 2}|>" for i in range(N_SPECIAL - len(_NAMED)))]

# tiktoken's regex engine panics on longer texts and on longer runs, so Meta cuts them here. The place of a cut
# decides the ids, hence the same numbers and the same order: blocks first, runs within a block.
MAX_BLOCK_CHARS = 400_000
MAX_RUN_CHARS = 25_000
_RUN = re.compile(r"\s+|\S+")


class TiktokenTokenizer(Tokenizer):
    """A tokenizer read from tiktoken rank lines, `<base64 of the token> <rank>`.

    Any number of ranks works; the special tokens take the ids that follow the last of them.

    Args:
        content: the file's content.
        origin: the file's name, for messages.

    Raises:
        TokenizerError: a line is malformed, ranks are missing, or a single byte has no rank.
    """

    kind = "tiktoken"

    def __init__(self, content: bytes, origin: str):
        self._ranks = ranks = read_ranks(content, origin)
        self.special_tokens = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            name=origin,
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self.special_tokens,
        )
        self.n_words = len(ranks) + N_SPECIAL
        self.bos_id = self.special_tokens["<|begin_of_text|>"]
        self.eos_id = self.special_tokens["<|end_of_text|>"]
        self.pad_id = self.special_tokens["<|finetune_right_pad_id|>"]
        self.stop_tokens = frozenset(self.special_tokens[name] for name in LLAMA_3_STOPS)

    def text_stream(self) -> TextStream:
        """See `Tokenizer.text_stream`."""
        token_bytes = self._encoding.decode_single_token_bytes
        return ByteStream(lambda token_id: token_bytes(self._checked(token_id)))

    def vocabulary(self) -> Vocabulary:
        """See `Tokenizer.vocabulary`."""
        plain = [spell(token) for token in sorted(self._ranks, key=self._ranks.__getitem__)]
        return Vocabulary(
            family="bpe",
            tokens=[*plain, *self.special_tokens],
            kinds=[Kind.NORMAL] * len(plain) + [Kind.CONTROL] * len(self.special_tokens),
            merges=[f"{spell(left)} {spell(right)}" for left, right in all_merges(self._ranks, self._ranks)],
            pattern="llama3",
        )

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in split_long(text):
            ids.extend(self._encoding.encode_ordinary(piece))
        return ids

    def _decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids)


def split_long(text: str) -> Iterator[str]:
    """Yield `text` in pieces that tiktoken can take, cut where Meta's code cuts.

    A piece has at most 400,000 characters, none of its runs of blanks or of non-blanks more than 25,000.
    """
    for start in range(0, len(text), MAX_BLOCK_CHARS):
        block = text[start : start + MAX_BLOCK_CHARS]
        cuts = [0]
        if len(block) > MAX_RUN_CHARS:
            for run in _RUN.finditer(block):
                cuts.extend(range(run.start() + MAX_RUN_CHARS, run.end(), MAX_RUN_CHARS))
        cuts.append(len(block))
        for low, high in itertools.pairwise(cuts):
            yield block[low:high]


def read_ranks(content: bytes, origin: str) -> dict[bytes, int]:
    """Return token bytes to rank; ranks are 0, 1, ... without a gap, as ids must be."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(
                f"{origin}, line {number}: not a tiktoken rank ('<base64> <number>'); "
                "the file is damaged or cut short: download it again"
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(
            f"{origin}: {len(ranks):,} tiktoken ranks that are not 0 to {len(ranks) - 1:,}, each once; "
            "the file is damaged: download it again"
        )
    # Without a rank for every byte some texts cannot be encoded, and tiktoken panics on them.
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise TokenizerError(
            f"{origin}: {len(missing)} of the 256 single bytes have no tiktoken rank (first: "
            f"0x{missing[0]:02X}); the file is damaged: download it again"
        )
    return ranks
