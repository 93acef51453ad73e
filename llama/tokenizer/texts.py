"""Text files, and windows of a long text that a model reads one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llama.errors import LlamaError


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file.

    Raises:
        LlamaError: when it cannot be read or is not UTF-8, naming the file.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise LlamaError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise LlamaError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None


def windows(tokens: Sequence[int], bos_id: int, length: int) -> list[list[int]]:
    """Return a text's tokens in order, in windows of `length` that begin with BOS; the last window may be shorter.

    Args:
        tokens: of the text, without BOS.
        bos_id: the first token of each window.
        length: tokens of a window, BOS included; 2 at least.
    """
    step = length - 1
    return [[bos_id, *tokens[first : first + step]] for first in range(0, len(tokens), step)]
