"""The manifest beside a checkpoint of ours: every tensor of every file with its sha256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.files import StoredTensor, read_header
from llama.config import read_json
from llama.errors import CheckpointError

NAME = "manifest.json"
FORMAT = "llama-shards/1"

Digests = Mapping[str, Mapping[str, Any]]


def describe(shape: tuple[int, ...], dtype: torch.dtype, sha256: str) -> dict[str, Any]:
    """One tensor's entry."""
    return {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "sha256": sha256}


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of a folder, or the one beside a single file.

    Args:
        path: the manifest's file.
        content: "source", the files that the shards were made from; "partition", how they were cut; "shards", file
            name to tensor name to `describe`'s entry; and what else it shall hold.
    """
    path.write_text(json.dumps({"format": FORMAT, **content}, indent=1) + "\n", encoding="utf-8")


def is_ours(path: Path) -> bool:
    """Return whether we wrote the folder at `path`, or the file that the manifest at `path` describes."""
    try:
        content = read_json(path / NAME if path.is_dir() else path)
    except CheckpointError:
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def verify(path: Path, progress: Callable[[int], object] = lambda _: None) -> int:
    """Check every tensor of a written checkpoint against its manifest; the number of tensors checked.

    Args:
        path: a folder that `split` or `convert` wrote, or the manifest beside a single file.
        progress: told of the bytes as they are read.

    Raises:
        CheckpointError: no manifest, or a file or tensor that differs: the first is named.
    """
    listed = path / NAME if path.is_dir() else path
    folder = listed.parent
    content = read_json(listed)
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("shards"), dict):
        raise CheckpointError(f"{listed} is not a manifest of ours ({FORMAT})")
    n_checked = 0
    for file, expected in content["shards"].items():
        if Path(file).name != file:
            raise CheckpointError(f"{listed} names a file outside its folder: {file}")
        if not (folder / file).exists():
            raise CheckpointError(f"{folder} lacks {file}, which its manifest names")
        n_checked += _verify_file(folder / file, expected, progress)
    return n_checked


def _verify_file(path: Path, expected: Digests, progress: Callable[[int], object]) -> int:
    stored = read_header(path, integers=True)
    strangers = sorted(stored.keys() ^ expected.keys())
    if strangers:
        raise CheckpointError(f"{path}: {strangers[0]} is in the file or in the manifest, not in both")
    for name, entry in expected.items():
        found = describe(stored[name].shape, stored[name].dtype, _sha256(stored[name], progress))
        different = [key for key in found if found[key] != entry.get(key)]
        if different:
            key = different[0]
            raise CheckpointError(
                f"{path}: {name} differs in {key}: {found[key]} where the manifest has {entry.get(key)}"
            )
    return len(expected)


def _sha256(stored: StoredTensor, progress: Callable[[int], object]) -> str:
    digest = hashlib.sha256()
    for _, _, piece in stored.pieces(tuple(slice(0, size) for size in stored.shape)):
        digest.update(piece.contiguous().view(-1).view(torch.uint8).numpy().data)
        progress(piece.nbytes)
    return digest.hexdigest()
