"""Tokenizers of every Llama, told apart by the content of a file, never by its name."""

import json
import os
import re
from pathlib import Path

from llama.errors import TokenizerError
from llama.tokenizer.base import TextStream, Tokenizer

__all__ = ["TextStream", "Tokenizer", "find_tokenizer", "load_tokenizer", "locate_tokenizer"]

# Where a folder keeps its tokenizer, by preference; the last is Llama 3's repository on Hugging Face.
CANDIDATES = ("tokenizer.model", "tokenizer.json", "original/tokenizer.model")

# The largest known (Llama 3's tokenizer.json) has 17 MB; more than this is somebody's weights.
MAX_BYTES = 256 * 1024**2

_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
# A ModelProto opens with field 1, a piece, of one or two length bytes, whose own field 1 is its text.
_MODEL_PROTO = re.compile(rb"\n(?:[\x01-\x7f]|[\x80-\xff][\x01-\x7f])\n")


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a tokenizer: SentencePiece, Llama 3's tiktoken ranks, or Hugging Face's `tokenizer.json`.

    Args:
        path: the file, whatever its name, or a folder with `tokenizer.model`, `tokenizer.json` or
            `original/tokenizer.model`, looked for in this order.

    Raises:
        TokenizerError: for no file, or one that is empty, damaged, or of none of the three kinds.
    """
    file = locate_tokenizer(Path(path))
    content = _read(file)
    _refuse_lookalikes(content, file)
    # The libraries are heavy, and a session needs one of the three.
    if content.lstrip().startswith((b"{", b"\xef\xbb\xbf{")) and _is_hf(content, file):
        from llama.tokenizer.hf import HfTokenizer

        return HfTokenizer(content, file)
    if _RANK_LINE.match(content):
        from llama.tokenizer.bpe import TiktokenTokenizer

        return TiktokenTokenizer(content, str(file))
    if _MODEL_PROTO.match(content):
        from llama.tokenizer.spm import SentencePieceTokenizer

        return SentencePieceTokenizer(content, str(file))
    raise TokenizerError(
        f"{file} is no tokenizer: neither a SentencePiece model, nor tiktoken ranks, nor a Hugging Face "
        "tokenizer.json; pass the one that came with the weights"
    )


def find_tokenizer(ckpt_dir: str | os.PathLike[str], tokenizer_path: str | os.PathLike[str] | None = None) -> Path:
    """Return the tokenizer's file or folder: the path that was named, else beside the weights or one folder up.

    Args:
        ckpt_dir: the checkpoint's folder, or its file where it is a single one.
        tokenizer_path: the path that was named; None to look for one.

    Raises:
        TokenizerError: when there is none.
    """
    if tokenizer_path is not None:
        return Path(tokenizer_path)
    beside = Path(ckpt_dir).resolve()
    beside = beside.parent if beside.is_file() else beside
    for folder in (beside, beside.parent):
        if any((folder / name).exists() for name in CANDIDATES):
            return folder
    raise TokenizerError(
        f"no tokenizer.model or tokenizer.json in {beside} or the folder above it: name it with --tokenizer_path"
    )


def locate_tokenizer(path: Path) -> Path:
    """Return the tokenizer's file: the path itself, or a file of the folder at `path`.

    Raises:
        TokenizerError: when a folder has none.
    """
    if not path.is_dir():
        return path
    for name in CANDIDATES:
        if (path / name).is_file():
            return path / name
    raise TokenizerError(f"no tokenizer in {path}: looked for {', '.join(CANDIDATES)}")


def _read(file: Path) -> bytes:
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise TokenizerError(
                f"{file} is no tokenizer: {size:,} bytes, where the largest have {MAX_BYTES:,} at most; "
                "pass tokenizer.model or tokenizer.json"
            )
        content = file.read_bytes()
    except FileNotFoundError:
        raise TokenizerError(f"no tokenizer at {file}: there is no such file or folder") from None
    except OSError as error:
        raise TokenizerError(f"cannot read the tokenizer {file}: {error.strerror}") from error
    if not content:
        raise TokenizerError(f"{file} is empty: download the tokenizer again")
    return content


def _is_hf(content: bytes, file: Path) -> bool:
    """True for the content of a `tokenizer.json`; False for a protobuf that begins like JSON."""
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return False  # a protobuf may start with any byte
    except ValueError as error:
        raise TokenizerError(
            f"{file} starts like JSON but is damaged or cut short ({error}): download it again"
        ) from error
    if not isinstance(value.get("model"), dict):
        raise TokenizerError(f"{file} is JSON without a 'model', so no tokenizer: pass tokenizer.json itself")
    return True


def _refuse_lookalikes(content: bytes, file: Path) -> None:
    """Refuse files that failed downloads leave in a tokenizer's place, with the way out."""
    head = content[:512].lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        raise TokenizerError(
            f"{file} is a Git LFS pointer, the tokenizer itself was not downloaded: run 'git lfs pull' there"
        )
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise TokenizerError(
            f"{file} is a web page (HTML), its download went wrong: log in where it came from and try again"
        )
