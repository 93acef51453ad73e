"""Training records in Alpaca's three fields, read from JSON, JSON Lines, parquet or the Hub, and checked."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

from llama.data.hub import read_hub_records
from llama.data.json_files import Found, kind, place, read_json_records
from llama.env import notice
from llama.errors import DataError

FIELDS = ("instruction", "input", "output")
REQUIRED = ("instruction", "output")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Record:
    """One task and its answer (tatsu-lab/stanford_alpaca).

    Args:
        instruction: the task.
        input: data for the task; may be empty.
        output: the answer.
    """

    instruction: str
    input: str
    output: str


def read_records(dataset: str | os.PathLike[str]) -> list[Record]:
    """Read records and check every one.

    `instruction` and `output` must be text, the first not blank; `input` may be missing or null, which is
    the empty text; other fields are ignored. Records with a blank output have nothing to learn from: they
    are left out, and a notice says how many.

    Args:
        dataset: a .json file (a list of objects) or a .jsonl file (an object a line), parsed here; or a
            .parquet file, a folder or a name on the Hub, of which `datasets` reads the split "train". A
            name that exists here, or looks like a path, is never looked up on the Hub.

    Raises:
        DataError: when the data cannot be read, holds no usable record, or a malformed one. The message names the
            first malformed record by index (and line) and field, and counts all of them.
    """
    name = os.fspath(dataset)
    found = _found(name)
    if not found:
        raise DataError(f"{name} holds no record: write objects with {', '.join(FIELDS)}")
    faults = [(item.place, fault) for item in found if (fault := item.fault or _fault(item.value))]
    if faults:
        where, fault = faults[0]
        bad = "1 is" if len(faults) == 1 else f"{len(faults):,} are"
        them = "it" if len(faults) == 1 else "them"
        raise DataError(f"{name}, {where}: {fault}; of {len(found):,} records {bad} bad: correct or remove {them}")
    return _learnable([_record(item.value) for item in found], name)


def digest(records: Iterable[Record]) -> str:
    """Return the SHA-256 in hex of the records' content and order, which is the same in every kind of file."""
    total = hashlib.sha256()
    for record in records:
        total.update(json.dumps(astuple(record)).encode() + b"\n")
    return total.hexdigest()


def _found(name: str) -> list[Found]:
    if not name.strip():
        raise DataError("no data set is named: pass a .json, .jsonl or .parquet file, a folder or a name on the Hub")
    path = Path(name).expanduser()
    suffix = path.suffix.lower()
    if not os.path.isdir(path):
        if suffix in (".json", ".jsonl"):
            return read_json_records(path)
        if os.path.exists(path) and suffix != ".parquet":
            raise DataError(f"{path} is neither .json nor .jsonl nor .parquet: name it by what it is, or convert it")
        if not os.path.exists(path) and _looks_like_a_path(name):
            raise DataError(f"no data set at {name}: there is no such file or folder")
    local = str(path) if os.path.exists(path) else name
    rows = read_hub_records(local, FIELDS, REQUIRED)
    return [Found(place(number), row) for number, row in enumerate(rows)]


def _looks_like_a_path(name: str) -> bool:
    """True for a name that cannot be of the Hub, whose names are NAME or OWNER/NAME."""
    return name.lower().endswith(".parquet") or name[0] in "./~" or "\\" in name or name.count("/") > 1


def _fault(value: object) -> str | None:
    """Return the fault of a record in words; None for a good record."""
    if not isinstance(value, dict):
        return f"a record is an object, found {kind(value)}"
    for field in FIELDS:
        text = value.get(field)
        if field not in value and field in REQUIRED:
            return f"{field!r} is missing"
        if text is None and field not in REQUIRED:
            continue
        if not isinstance(text, str):
            return f"{field!r} must be text, found {kind(text)}"
        if half := _SURROGATE.search(text):
            return f"{field!r} holds half a character (\\u{ord(half[0]):04x} at {half.start()}), which is no text"
    return None if value["instruction"].strip() else "'instruction' is blank"


def _record(value: dict[str, str | None]) -> Record:
    return Record(value["instruction"] or "", value.get("input") or "", value["output"] or "")


def _learnable(records: list[Record], name: str) -> list[Record]:
    kept = [record for record in records if record.output.strip()]
    if not kept:
        raise DataError(f"{name} holds no usable record: the 'output' of all {len(records):,} is blank")
    if len(kept) < len(records):
        n_blank = len(records) - len(kept)
        notice(f"{name}: left out {n_blank:,} of {len(records):,} records, whose 'output' is blank")
    return kept
