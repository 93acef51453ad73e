"""Records read by Hugging Face `datasets`: from the Hub, a folder or a parquet file."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

from llama.env import is_speaker
from llama.errors import DataError

SPLIT = "train"


def read_hub_records(dataset: str, fields: tuple[str, ...], required: tuple[str, ...]) -> list[dict[str, Any]]:
    """Read the rows of the "train" split.

    Args:
        dataset: a name on the Hub such as "tatsu-lab/alpaca", a folder, or a .parquet file.
        fields: the columns to read where they exist.
        required: the columns that must be there.

    Raises:
        DataError: the package is missing or cannot read it, or a column is missing.
    """
    library = _library(dataset)
    arguments: dict[str, Any] = {"path": dataset}
    if os.path.isfile(dataset):
        arguments = {"path": "parquet", "data_files": dataset}
    try:
        with _quiet(library):
            table = library.load_dataset(**arguments, split=SPLIT)
            missing = [name for name in required if name not in table.column_names]
            if not missing:
                return table.select_columns([name for name in fields if name in table.column_names]).to_list()
    except Exception as error:  # the library raises whatever its readers and the network raise
        raise DataError(f"Hugging Face datasets cannot read {dataset}: {_line(error)}{_way_out(dataset)}") from None
    raise DataError(
        f"{dataset} has no column {missing[0]!r}, but {', '.join(map(repr, table.column_names))}: "
        f"rename its columns to {', '.join(fields)}"
    )


def _library(dataset: str) -> ModuleType:
    with suppress(ImportError):
        library = importlib.import_module("datasets")
        # Where the package is missing, Python takes a folder called datasets for it.
        if hasattr(library, "load_dataset"):
            return library
    raise DataError(
        f"{dataset} is read with Hugging Face datasets, which is not installed: "
        "pip install 'llama-shards[hf]', or pass a .json or .jsonl file"
    )


@contextmanager
def _quiet(library: ModuleType) -> Iterator[None]:
    """Silence the library, and its progress bars on all ranks but the first, while the context lasts."""
    level, bars = library.logging.get_verbosity(), library.is_progress_bar_enabled()
    library.logging.set_verbosity(library.logging.CRITICAL)
    if not is_speaker():
        library.disable_progress_bars()
    try:
        yield
    finally:
        library.logging.set_verbosity(level)
        if bars:
            library.enable_progress_bars()


def _line(error: Exception) -> str:
    """Return the first line of an error, or its class where it has no text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__


def _way_out(dataset: str) -> str:
    if os.path.exists(dataset):
        return "; write it anew, or pass a .json or .jsonl file"
    return "; no file or folder here has this name either: check the name, the connection and HF_TOKEN"
