"""Text files, and a long text as windows that a model reads one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llama.errors import LlamaError


def read_text(path: Path) -> str:
    """A UTF-8 file's text, or a `LlamaError` that names the file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise LlamaError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise LlamaError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None


def windows(tokens: Sequence[int], bos_id: int, length: int) -> list[list[int]]:
    """A text's tokens in order, in windows of `length` that begin with BOS; the last one may be shorter.

    Args:
        tokens: of the text, without BOS.
        bos_id: what each window begins with.
        length: tokens of a window, BOS among them; 2 at least.
    """
    step = length - 1
    return [[bos_id, *tokens[first : first + step]] for first in range(0, len(tokens), step)]
