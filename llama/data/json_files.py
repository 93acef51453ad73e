"""JSON and JSON Lines files as lists of values, each with its place for messages."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.errors import DataError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_WANTED = 'write [{"instruction": ..., "input": ..., "output": ...}, ...]'


@dataclass(frozen=True)
class Found:
    """A value that a file holds in a record's place.

    Args:
        place: of the value in the file, in words.
        value: as json parsed it.
        fault: of a value that could not be parsed, in words.
    """

    place: str
    value: Any
    fault: str | None = None


def read_json_records(path: str | os.PathLike[str]) -> list[Found]:
    """Read a .json file with one list of objects, or a .jsonl file with an object a line.

    A byte order mark is accepted; blank lines of a .jsonl file are skipped. A line that is no JSON does
    not end the reading, but is returned with its fault.

    Raises:
        DataError: the file is missing or unreadable or not UTF-8, and a .json file also where it is no JSON
            or something else than a list.
    """
    path = Path(path)
    content = _content(path)
    mark = len(_BYTE_ORDER_MARK) if content.startswith(_BYTE_ORDER_MARK) else 0
    return _lines(content, mark) if path.suffix.lower() == ".jsonl" else _list(content[mark:], mark, path)


def place(number: int) -> str:
    """Return the words by which messages name a record: its index."""
    return f"record {number} (from 0)"


def kind(value: object) -> str:
    """Return JSON's word for the kind of a value."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"no data set at {path}: there is no such file") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16, byte 0 (0x{content[0]:02x}) begins no UTF-8: save it as UTF-8")
    return content


def _list(content: bytes, offset: int, path: Path) -> list[Found]:
    try:
        values = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        fault = _broken_text(error, offset)
        raise DataError(f"{path}{_place_of_broken_text(content)}: {fault}: save the file as UTF-8") from None
    except RecursionError:
        raise DataError(f"{path} is nested too deeply: {_WANTED}") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): {_or_jsonl(content)}") from None
    if not isinstance(values, list):
        raise DataError(f"{path} holds {kind(values)}{_keys(values)} where a list is expected: {_WANTED}")
    return [Found(place(number), value) for number, value in enumerate(values)]


def _broken_text(error: UnicodeDecodeError, offset: int) -> str:
    return f"byte {offset + error.start:,} (0x{error.object[error.start]:02x}) is not UTF-8"


def _or_jsonl(content: bytes) -> str:
    return "if it holds an object a line, name it .jsonl" if content.lstrip().startswith(b"{") else _WANTED


def _keys(value: object) -> str:
    """Return the first keys of an object, for a person to recognise it."""
    if not isinstance(value, dict) or not value:
        return ""
    keys = [repr(key)[:40] for key in value]
    return f" with {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"


def _place_of_broken_text(content: bytes) -> str:
    """Return the place of the record with bytes that are no UTF-8; "" where the file cannot be parsed."""
    try:
        values = json.loads(content.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return ""
    for number, value in enumerate(values if isinstance(values, list) else []):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return f", {place(number)}"
    return ""


def _lines(content: bytes, offset: int) -> list[Found]:
    found: list[Found] = []
    for number, line in enumerate(content[offset:].split(b"\n"), start=1):
        if line.strip():
            found.append(_line(line, f"line {number}, {place(len(found))}", offset))
        offset += len(line) + 1
    return found


def _line(line: bytes, where: str, offset: int) -> Found:
    try:
        return Found(where, json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return Found(where, None, _broken_text(error, offset))
    except RecursionError:
        return Found(where, None, "nested too deeply")
    except json.JSONDecodeError as error:
        # The library counts lines too, from the start of this one.
        hint = "; a file with one list is named .json" if line.lstrip().startswith(b"[") else ""
        return Found(where, None, f"not JSON ({error.msg} at character {error.colno}{hint})")
    except ValueError as error:
        return Found(where, None, f"not JSON ({error})")
