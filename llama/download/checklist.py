"""Meta's checklists: the output of `md5sum` for files that lie beside the list."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from llama.errors import CheckpointError

NAMES = ("checklist.chk", "tokenizer_checklist.chk")
BLOCK_BYTES = 1 << 20
# An asterisk before the name marks a file read as binary; it changes nothing here.
_LINE = re.compile(r"([0-9a-fA-F]{32}) [ *](\S.*)")

Progress = Callable[[int], object]


def parse(text: str, where: str) -> dict[str, str]:
    """Return the md5 of each file that a checklist names.

    Args:
        text: the list's content.
        where: the list's name in errors.

    Raises:
        CheckpointError: for a text that is no such list, or a file name outside the list's folder.
    """
    sums = {}
    for line in filter(None, map(str.rstrip, text.splitlines())):
        found = _LINE.fullmatch(line)
        if found is None:
            raise CheckpointError(f"{where} is no list of md5 sums: {line[:60]!r} is not 'HEX  NAME'")
        digest, name = found.groups()
        if PurePosixPath(name).is_absolute() or ".." in name.split("/") or "\\" in name:
            raise CheckpointError(f"{where} names a file outside its folder: {name}")
        sums[name] = digest.lower()
    if not sums:
        raise CheckpointError(f"{where} names no files")
    return sums


def md5(path: Path, progress: Progress = lambda _: None) -> str:
    """Return the md5 of a file, in hexadecimal.

    Raises:
        CheckpointError: when the file cannot be read.
    """
    # Meta's lists hold md5, which finds damage but no forgery.
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
                progress(len(block))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    return digest.hexdigest()


def verify(folder: Path, progress: Progress = lambda _: None) -> int:
    """Check the files of a folder against the checklists in it; return the number of files checked.

    Args:
        folder: with checklist.chk, tokenizer_checklist.chk or both.
        progress: told of the bytes as they are read.

    Raises:
        CheckpointError: for no checklist, or a file that is missing or differs: the first is named.
    """
    if not folder.is_dir():
        raise CheckpointError(f"nothing to check at {folder}: there is no such folder")
    lists = [folder / name for name in NAMES if (folder / name).is_file()]
    if not lists:
        raise CheckpointError(f"{folder} holds neither of {' and '.join(NAMES)}: there is nothing to check against")
    sums = [(path, name, digest) for path in lists for name, digest in _read(path).items()]
    for path, name, _ in sums:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks {name}, which {path.name} names")
    for path, name, digest in sums:
        found = md5(folder / name, progress)
        if found != digest:
            raise CheckpointError(f"{folder / name} differs: its md5 is {found} where {path.name} has {digest}")
    return len(sums)


def total_bytes(folder: Path) -> int:
    """Return the bytes that `verify` will read: of the files that the checklists name and that exist."""
    lists = [folder / name for name in NAMES if (folder / name).is_file()]
    files = [folder / name for path in lists for name in _read(path)]
    return sum(file.stat().st_size for file in files if file.is_file())


def _read(path: Path) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is no list of md5 sums: it is not text") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    return parse(text, str(path))
