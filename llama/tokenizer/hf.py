"""Hugging Face `tokenizer.json`, run by the `tokenizers` library.

BOS, EOS and the stop set are not in that file: they come from `tokenizer_config.json`,
`special_tokens_map.json`, `generation_config.json` and `config.json` beside it, whichever are there.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from llama.errors import TokenizerError
from llama.tokenizer.base import LLAMA_3_STOPS, ByteStream, Piece, PieceStream, TextStream, Tokenizer
from llama.tokenizer.vocabulary import BYTE_OF, Vocabulary

# Names to fall back on, by preference.
_BOS_NAMES = ("<|begin_of_text|>", "<s>")
_EOS_NAMES = ("<|end_of_text|>", "</s>", "<|eot_id|>")
_PAD_NAMES = ("<|finetune_right_pad_id|>", "<pad>")

_MARKUP = re.compile(r"<\|.*\|>")
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_UNKNOWN_TEXT = " ⁇ "  # SentencePiece's text for its unknown token


class HfTokenizer(Tokenizer):
    """A tokenizer read from `tokenizer.json` and the configuration files beside it.

    Text is decoded by Meta's rules for the vocabulary's family, so that a checkpoint answers the same
    with any of its tokenizer files: byte-level vocabularies spell their special tokens out,
    SentencePiece's leave control tokens out.

    Args:
        content: the file's content.
        path: the file; its folder is searched for the configuration files.

    Raises:
        TokenizerError: damaged content, a decoder that no Llama has, or no BOS or EOS to be found.
    """

    kind = "hf"

    def __init__(self, content: bytes, path: Path):
        text = content.decode("utf-8-sig")
        try:
            core = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerError(f"{path}: the tokenizers library cannot read it: {_line(error)}") from error
        self._core = core
        vocab = core.get_vocab(with_added_tokens=True)
        self.n_words = max(vocab.values(), default=-1) + 1
        settings = _Settings(path.parent, vocab)
        self.bos_id = _required(settings.token_id("bos", _BOS_NAMES), "BOS", path)
        self.eos_id = _required(settings.token_id("eos", _EOS_NAMES), "EOS", path)
        pad_id = settings.token_id("pad", _PAD_NAMES)
        self.pad_id = -1 if pad_id is None else pad_id
        stops = {vocab[name] for name in LLAMA_3_STOPS if name in vocab}
        self.stop_tokens = frozenset({self.eos_id, *stops, *settings.listed_ids("eos")})

        _take_as_typed(core, {self.bos_id, self.eos_id, *self.stop_tokens})
        added = core.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in added.items() if token.special}
        self._read_decoder(json.loads(text), vocab, path)

    def text_stream(self) -> TextStream:
        """See `Tokenizer.text_stream`."""
        if self._byte_level:
            return ByteStream(lambda token_id: self._bytes.get(self._checked(token_id), b""))
        return PieceStream(lambda token_id: self._pieces.get(self._checked(token_id)), self._strippable)

    def vocabulary(self) -> Vocabulary:
        """See `Tokenizer.vocabulary`."""
        from llama.tokenizer.hf_vocabulary import vocabulary_of_json

        return vocabulary_of_json(json.loads(self._core.to_str()), self._byte_level)

    def _encode(self, text: str) -> list[int]:
        return self._core.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: list[int]) -> str:
        stream = self.text_stream()
        return "".join(stream.push(token_id) for token_id in ids) + stream.flush()

    def _read_decoder(self, spec: dict[str, Any], vocab: dict[str, int], path: Path) -> None:
        """Set up decoding from the file's decoder: byte-level, or SentencePiece's.

        The library's own `decode` is not used: it sees whole sequences only, and one bad byte turns a
        whole run of byte tokens into U+FFFD, so nothing could be streamed.
        """
        steps = {step["type"]: step for step in _decoder_steps(spec.get("decoder"))}
        added = {token["content"] for token in spec.get("added_tokens") or []}
        self._byte_level = "ByteLevel" in steps
        self._strippable = 0
        if self._byte_level:
            self._bytes = {i: _bytes_of(token, token in added) for token, i in vocab.items()}
        elif steps.keys() & {"Metaspace", "ByteFallback", "Replace"}:
            unknown = spec["model"].get("unk_token")
            self._pieces = {i: self._piece(token, token == unknown) for token, i in vocab.items()}
            self._strippable = int(_strips_blank(steps))
        else:
            found = ", ".join(steps) or "none"
            raise TokenizerError(
                f"{path}: decoder {found} is not a Llama's (ByteLevel, or Metaspace or ByteFallback): "
                "pass the tokenizer that came with the weights"
            )

    def _piece(self, token: str, unknown: bool) -> Piece:
        if unknown:
            return _UNKNOWN_TEXT
        if token in self.special_tokens:
            return None
        byte = _BYTE_PIECE.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token


class _Settings:
    """The special tokens named by the configuration files in a folder."""

    def __init__(self, folder: Path, vocab: dict[str, int]):
        self._vocab = vocab
        self._ids = set(vocab.values())
        self._named = [_read_json(folder / n) for n in ("tokenizer_config.json", "special_tokens_map.json")]
        self._numbered = [_read_json(folder / n) for n in ("generation_config.json", "config.json")]

    def token_id(self, role: str, names: tuple[str, ...]) -> int | None:
        """Return the id of the "bos", "eos" or "pad" token, or None where nothing names one."""
        for settings in self._named:
            token = settings.get(f"{role}_token")
            name = token.get("content") if isinstance(token, dict) else token
            if isinstance(name, str) and name in self._vocab:
                return self._vocab[name]
        known = (self._vocab[name] for name in names if name in self._vocab)
        return next(iter([*self.listed_ids(role), *known]), None)

    def listed_ids(self, role: str) -> list[int]:
        """Return the ids that the numbered settings give, one or a list; ids not in use are left out."""
        found: list[int] = []
        for settings in self._numbered:
            value = settings.get(f"{role}_token_id")
            ids = value if isinstance(value, list) else [value]
            found.extend(i for i in ids if isinstance(i, int) and i in self._ids)
        return found


def _take_as_typed(core: tokenizers.Tokenizer, structural: set[int]) -> None:
    """Make the library read every text as plain text and whole."""
    # By default it turns "</s>" in a user's text into EOS.
    core.encode_special_tokens = True
    # That covers tokens flagged special only; some files forget the flag, even for EOS.
    unflagged = [
        tokenizers.AddedToken(token.content, special=True, normalized=False)
        for token_id, token in core.get_added_tokens_decoder().items()
        if not token.special and (token_id in structural or _MARKUP.fullmatch(token.content))
    ]
    core.add_special_tokens(unflagged)
    # Training settings that some files carry along would cut or pad the ids.
    core.no_truncation()
    core.no_padding()


def _decoder_steps(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if decoder and decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _decoder_steps(step)
    elif decoder:
        yield decoder


def _strips_blank(steps: dict[str, dict[str, Any]]) -> bool:
    """True where decoding removes the blank that encoding put in front of a text."""
    if "Metaspace" in steps:
        step = steps["Metaspace"]
        return bool(step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True))
    return bool("Strip" in steps and steps["Strip"].get("start", 0) > 0)


def _bytes_of(token: str, added: bool) -> bytes:
    """Return a byte-level token's bytes; added tokens are spelt in plain text."""
    if added or any(character not in BYTE_OF for character in token):
        return token.encode("utf-8")
    return bytes(BYTE_OF[character] for character in token)


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, an empty one where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: not readable as JSON ({_line(error)}): repair or remove it") from error
    return value if isinstance(value, dict) else {}


def _required(token_id: int | None, role: str, path: Path) -> int:
    if token_id is None:
        raise TokenizerError(f"{path}: nothing says which token is {role}: put its tokenizer_config.json beside it")
    return token_id


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
