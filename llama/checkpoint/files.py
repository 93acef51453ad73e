"""Tensors in files, read by byte offset: only what is asked for, and never more than a piece at a time.

Nothing stays mapped: pages of a mapped file count as the process's memory, so weights would be
counted twice while they are loaded.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from llama.errors import CheckpointError

PIECE_BYTES = 16 << 20
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
PACKED_DTYPES = (torch.int8, torch.uint8)  # see `llama.kernels.formats`
AGAIN = ": copy or download it again"
MAX_HEADER_BYTES = 100 << 20  # the safetensors library's own limit

Index = tuple[slice, ...]
Dtypes = Collection[torch.dtype]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: a strided view of the file's bytes.

    Args:
        path: the file.
        dtype, shape: of the tensor.
        strides: in elements, as in torch; views that were saved with their whole storage have
            strides of their own.
        offset: byte of the file at which element (0, ..., 0) stands.
        value: the tensor itself, for the old file format that cannot be read in pieces.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    value: Tensor | None = None

    def pieces(self, index: Index, multiple: int = 1) -> Iterator[tuple[int, int, Tensor]]:
        """Read the part that `index` names, piece by piece.

        Args:
            index: one slice a dimension, with start and stop.
            multiple: pieces that are cut along the first dimension hold a multiple of so many rows.

        Yields:
            (dimension, start, piece): the piece belongs at `start` of `dimension` of the part, and
            is good until the next one is asked for.

        Raises:
            CheckpointError: when the file ends early.
        """
        if self.value is not None:
            yield 0, 0, self.value[index]
            return
        sizes = [part.stop - part.start for part in index]
        start = sum(part.start * stride for part, stride in zip(index, self.strides, strict=True))
        if not sizes or 0 in sizes:
            return
        # Pieces are runs along the dimension whose steps are the largest: the least is read twice.
        dim = max(range(len(sizes)), key=lambda d: (self.strides[d], -d))
        run = self._run_length(sizes, dim, multiple if dim == 0 else 1)
        with self.path.open("rb", buffering=0) as file:
            for first in range(0, sizes[dim], run):
                count = min(run, sizes[dim] - first)
                shape = [*sizes[:dim], count, *sizes[dim + 1 :]]
                yield dim, first, self._read(file, start + first * self.strides[dim], shape)

    def _run_length(self, sizes: list[int], dim: int, multiple: int) -> int:
        step = max(1, self.strides[dim]) * self.dtype.itemsize
        run = max(1, PIECE_BYTES // step)
        return min(sizes[dim], max(multiple, run // multiple * multiple))

    def _read(self, file: BinaryIO, start: int, shape: list[int]) -> Tensor:
        span = 1 + sum((size - 1) * stride for size, stride in zip(shape, self.strides, strict=True))
        buffer = bytearray(span * self.dtype.itemsize)
        file.seek(self.offset + start * self.dtype.itemsize)
        view, done = memoryview(buffer), 0
        while done < len(buffer):
            count = file.readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(f"{self.path} ended early: it was cut off or changed while being read")
            done += count
        return torch.frombuffer(buffer, dtype=self.dtype).as_strided(shape, self.strides)


def read_header(
    path: Path, is_ignored: Callable[[str], bool] = lambda _: False, integers: bool = False
) -> dict[str, StoredTensor]:
    """Return the tensors of a `.pth`, `.bin` or `.safetensors` file by name; no weights are read.

    Args:
        path: the file.
        is_ignored: names to leave out, whatever their dtype.
        integers: whether a `.pth` may hold int8 and uint8, as those of quantized models do.

    Raises:
        CheckpointError: for a file that is missing, damaged, not a checkpoint, or holds code.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(8)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    if not magic:
        raise CheckpointError(f"{path} is empty")
    if magic.startswith(b"version"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: run 'git lfs pull' where it came from")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, is_ignored)
    dtypes = (*SAFETENSORS_DTYPES.values(), *(PACKED_DTYPES if integers else ()))
    read = _read_zip if magic.startswith(b"PK") else _read_legacy
    return read(path, is_ignored, dtypes)


# -- torch.save ------------------------------------------------------------------------------------


def _torch_load(path: Path, mmap: bool) -> Mapping[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "global" in str(error):
            raise CheckpointError(
                f"{path} holds more than tensors ({_refused_global(error)}): loading it could run code, so it "
                "is refused; ask its author for a file of plain tensors"
            ) from None
        raise CheckpointError(f"{path} is damaged or not a PyTorch checkpoint") from None
    except Exception:  # damaged bytes make torch's reader fail in any way, and say so in its own terms
        raise CheckpointError(f"{path} is damaged or cut off{AGAIN}") from None
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not named tensors")
    strangers = [str(name) for name, value in state.items() if not _is_plain(value)]
    if strangers:
        raise CheckpointError(f"{path} holds entries that are no plain tensors: {', '.join(strangers[:5])}")
    return state


def _is_plain(value: object) -> bool:
    """Return whether a tensor's values lie in a storage: it is not sparse, and not without data ("meta")."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def _refused_global(error: Exception) -> str:
    found = re.search(r"(?:GLOBAL|global) ([\w.]*\w)", str(error))
    return found[1] if found else "an unknown object"


def _read_zip(path: Path, is_ignored: Callable[[str], bool], dtypes: Dtypes) -> dict[str, StoredTensor]:
    state = _torch_load(path, mmap=True)
    base = _mapping_base(path, state)
    stored = {}
    for name, tensor in state.items():
        if is_ignored(str(name)):
            continue
        _check_dtype(path, name, tensor.dtype, dtypes)
        offset = tensor.data_ptr() - base if tensor.numel() else 0
        stored[name] = StoredTensor(path, tensor.dtype, tuple(tensor.shape), tensor.stride(), offset)
    return stored


def _mapping_base(path: Path, state: Mapping[str, Tensor]) -> int:
    """Address at which torch mapped the file, so that addresses tell byte offsets.

    Every storage is one record of the archive: the base is where all storages fall on records of
    their own size.
    """
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in state.values()
        if tensor.untyped_storage().nbytes()
    }
    if not storages:
        return 0
    records = _storage_records(path)
    first = min(storages)
    for offset, size in sorted(records.items()):
        base = first - offset
        if size == storages[first] and all(records.get(p - base) == n for p, n in storages.items()):
            return base
    raise CheckpointError(f"{path} is damaged: its tensors do not lie where its directory says")


def _storage_records(path: Path) -> dict[int, int]:
    """Return byte offset and size of every storage in the archive that torch.save writes: `NAME/data/KEY`."""
    sizes = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for record in archive.infolist():
                if not record.filename.partition("/")[2].startswith("data/"):
                    continue
                # The data follows the local header, whose name and extra field have their own lengths.
                file.seek(record.header_offset + 26)
                name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
                sizes[record.header_offset + 30 + name_bytes + extra_bytes] = record.file_size
    except (zipfile.BadZipFile, struct.error, NotImplementedError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut off ({error}){AGAIN}") from None
    return sizes


def _read_legacy(path: Path, is_ignored: Callable[[str], bool], dtypes: Dtypes) -> dict[str, StoredTensor]:
    """Read a file written before torch 1.6, one pickle stream, whole."""
    stored = {}
    for name, tensor in _torch_load(path, mmap=False).items():
        if is_ignored(str(name)):
            continue
        _check_dtype(path, name, tensor.dtype, dtypes)
        stored[name] = StoredTensor(path, tensor.dtype, tuple(tensor.shape), tensor.stride(), 0, tensor)
    return stored


def _check_dtype(path: Path, name: str, dtype: torch.dtype, dtypes: Dtypes) -> None:
    if dtype not in dtypes:
        raise CheckpointError(
            f"{path}: {name} is stored as {str(dtype).removeprefix('torch.')}; "
            "only float32, float16, bfloat16 and float64 weights are read"
        )


# -- safetensors -----------------------------------------------------------------------------------


def _read_safetensors(path: Path, is_ignored: Callable[[str], bool]) -> dict[str, StoredTensor]:
    """Parse the header ourselves: the library maps the file and does not tell offsets.

    Format: https://huggingface.co/docs/safetensors (8 bytes little-endian length, JSON, data).
    """
    size = os.path.getsize(path)
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{path} is damaged or cut off (no safetensors header){AGAIN}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        return {
            name: _safetensor(path, name, entry, 8 + length, size)
            for name, entry in header.items()
            if not is_ignored(name)
        }
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged: its safetensors header cannot be read") from None


def _safetensor(path: Path, name: str, entry: Mapping[str, Any], data: int, size: int) -> StoredTensor:
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        raise CheckpointError(
            f"{path}: {name} is stored as {entry['dtype']}; only F32, F16, BF16 and F64 weights are read"
        )
    dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise CheckpointError(f"{path} is damaged: {name} has an impossible shape or place")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{path} is damaged: {name} has {end - begin} bytes for shape {list(shape)}")
    if data + end > size:
        raise CheckpointError(f"{path} is cut off: {name} ends at byte {data + end} of {size}")
    strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return StoredTensor(path, dtype, shape, strides, data + begin)
