"""Weights as Hugging Face stores them: safetensors, in one file or in several under an index."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llama.checkpoint import manifest
from llama.checkpoint.rows import row_chunks
from llama.checkpoint.source import Checkpoint
from llama.checkpoint.split import wait
from llama.checkpoint.table import Spec
from llama.checkpoint.write import SafetensorsWriter, Writer
from llama.env import is_speaker

STEM = "model"
# Below this a progress bar would only flicker.
PROGRESS_BYTES = 256 << 20

# The rows of one tensor in order, in pieces, each in memory of its own.
Rows = Callable[[Spec], Iterator[Tensor]]
# Tensors to store, with what they are stored in.
Stored = Iterable[tuple[Spec, torch.dtype]]


@dataclass(frozen=True)
class Place:
    """Where one tensor goes: a name in a file that is being written."""

    spec: Spec
    dtype: torch.dtype
    writer: Writer
    name: str


def to_hf_order(rows: Tensor, head_dim: int) -> Tensor:
    """Whole heads of `wq` or `wk`, [heads * D, E], from Meta's [heads, D/2, 2] rows to [heads, 2, D/2]."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def checkpoint_rows(checkpoint: Checkpoint) -> Rows:
    """The values of an open checkpoint, in Hugging Face's row order."""
    head_dim = checkpoint.args.head_dim

    def rows(spec: Spec) -> Iterator[Tensor]:
        tensor = checkpoint.tensors[spec.name]
        for _, values in row_chunks(tensor, tensor.dtype, head_dim if spec.permuted else 1):
            yield to_hf_order(values, head_dim) if spec.permuted else values

    return rows


def pour(places: Iterable[Place], rows: Rows, what: str) -> None:
    """Write every tensor to its place, piece by piece, reading ahead by one."""
    places = list(places)
    total = sum(tensor_bytes(place.spec, place.dtype) for place in places)
    quiet = not is_speaker() or total < PROGRESS_BYTES
    with tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=quiet) as bar:
        for place in places:
            under_way: list[Future[Any]] = []
            for piece in rows(place.spec):
                values = piece.to(place.dtype).contiguous()
                wait(under_way)
                under_way = place.writer.append(place.name, values)
                bar.update(values.nbytes)
            wait(under_way)


def write_weights(folder: Path, stored: Stored, rows: Rows, max_shard_bytes: int | None = None) -> dict[str, Any]:
    """Write `model.safetensors`, or `model-00001-of-0000N.safetensors` and their index.

    Args:
        folder: where; it exists.
        stored: the tensors in order, with the dtype to store.
        rows: gives the values of each, in Hugging Face's row order.
        max_shard_bytes: a file holds no more, but for a tensor that is larger; None for one file.

    Returns:
        File to tensor to its entry in a manifest.
    """
    groups = _group(stored, max_shard_bytes)
    names = _file_names(len(groups))
    with ExitStack() as stack:
        workers = stack.enter_context(ThreadPoolExecutor(3, thread_name_prefix="convert"))
        writers, places = [], []
        for name, group in zip(names, groups, strict=True):
            layout = {spec.hf_name: (spec.shape, dtype) for spec, dtype in group}
            writer = SafetensorsWriter(folder / name, layout, workers)
            stack.callback(writer.close)
            writers.append(writer)
            places += [Place(spec, dtype, writer, spec.hf_name) for spec, dtype in group]
        pour(places, rows, "converting")
        digests = [writer.finish() for writer in writers]
    if len(groups) > 1:
        _write_index(folder, names, groups)
    return {name: describe(group, digest) for name, group, digest in zip(names, groups, digests, strict=True)}


def describe(group: Stored, digest: Mapping[str, str], name_of: Callable[[Spec], str] | None = None) -> dict[str, Any]:
    """The manifest's entries of one file: tensors by the names they have there, Hugging Face's unless told."""
    named = {name_of(spec) if name_of else spec.hf_name: (spec.shape, dtype) for spec, dtype in group}
    return {name: manifest.describe(*named[name], sha256) for name, sha256 in digest.items()}


def tensor_bytes(spec: Spec, dtype: torch.dtype) -> int:
    """Bytes that a tensor takes in a file."""
    return math.prod(spec.shape) * dtype.itemsize


def _group(stored: Stored, max_shard_bytes: int | None) -> list[list[tuple[Spec, torch.dtype]]]:
    """The tensors of each file, in order: a new one begins where the next would make it too large."""
    groups: list[list[tuple[Spec, torch.dtype]]] = [[]]
    size = 0
    for spec, dtype in stored:
        n_bytes = tensor_bytes(spec, dtype)
        if max_shard_bytes is not None and groups[-1] and size + n_bytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append((spec, dtype))
        size += n_bytes
    return groups


def _file_names(n: int) -> list[str]:
    if n == 1:
        return [f"{STEM}.safetensors"]
    return [f"{STEM}-{number:05d}-of-{n:05d}.safetensors" for number in range(1, n + 1)]


def _write_index(folder: Path, names: list[str], groups: list[list[tuple[Spec, torch.dtype]]]) -> None:
    total = sum(tensor_bytes(spec, dtype) for group in groups for spec, dtype in group)
    weight_map = {spec.hf_name: name for name, group in zip(names, groups, strict=True) for spec, _ in group}
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
