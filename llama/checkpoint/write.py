"""Write a `.pth` or `.safetensors` piece by piece: laid out first, filled in afterwards, never held in memory.

Of a `.pth`, `torch.save` under `skip_data` writes the archive's directory and leaves the tensors' bytes out; they
are then written where the directory says. Checksums of the archive, which torch ignores and zip tools
do not, are put right at the end, so that the file is the one torch.save would have written.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import skip_data

from llama.checkpoint.files import SAFETENSORS_DTYPES, read_header

CENTRAL_HEADER = struct.Struct("<4s6H3I5H2I")  # APPNOTE.TXT 4.3.12
CENTRAL_CRC_AT = 16
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
DESCRIPTOR_SIGNATURE = b"PK\x07\x08"  # APPNOTE.TXT 4.3.9: signature, CRC, sizes


@dataclass
class _Progress:
    """The part of one tensor that is written, and its checksums so far."""

    offset: int
    nbytes: int
    written: int = 0
    crc: int = 0
    sha256: Any = field(default_factory=hashlib.sha256)

    def update_crc(self, data: memoryview) -> None:
        self.crc = zlib.crc32(data, self.crc)


Contents = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class Writer:
    """A file whose tensors are appended to in row-major order, each on its own.

    Args:
        path: the file to write.
        tensors: name to (shape, dtype), in the order in which the file lists them.
        workers: threads that write and take checksums; none of these holds the interpreter's lock.
    """

    def __init__(self, path: Path, tensors: Contents, workers: Executor) -> None:
        self.path = path
        self._workers = workers
        self._lay_out(tensors)
        self._tensors = {
            name: _Progress(stored.offset, torch.Size(stored.shape).numel() * stored.dtype.itemsize)
            for name, stored in read_header(path, integers=True).items()
        }
        self._descriptor = os.open(path, os.O_RDWR)

    def _lay_out(self, tensors: Contents) -> None:
        """Write the file, its tensors' bytes left out but for their room."""
        raise NotImplementedError

    def append(self, name: str, values: Tensor) -> list[Future[Any]]:
        """Write the next values of a tensor, in row-major order and in the dtype announced.

        Returns:
            What is under way: `values` must stay as it is, and the tensor's next append must wait, until
            all of it is done.
        """
        progress = self._tensors[name]
        data = values.contiguous().view(-1).view(torch.uint8).numpy().data
        at = progress.offset + progress.written
        progress.written += len(data)
        return [
            self._workers.submit(_write_at, self._descriptor, data, at),
            *(self._workers.submit(update, data) for update in self._checksums(progress)),
        ]

    def _checksums(self, progress: _Progress) -> list[Callable[[memoryview], object]]:
        """The functions that take in every byte of a tensor."""
        return [progress.sha256.update]

    def finish(self) -> dict[str, str]:
        """Close the file, which must be whole, and return each tensor's sha256."""
        unfinished = [name for name, p in self._tensors.items() if p.written != p.nbytes]
        if unfinished:
            raise RuntimeError(f"{self.path}: not all of {unfinished[0]} was written")
        self._seal()
        self.close()
        return {name: progress.sha256.hexdigest() for name, progress in self._tensors.items()}

    def _seal(self) -> None:
        """Write the fields that depend on the whole content."""

    def close(self) -> None:
        """Close the file, finished or not."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class PthWriter(Writer):
    """See `Writer`; the file is the one that torch.save would have written."""

    def _lay_out(self, tensors: Contents) -> None:
        # Pages of an untouched torch.empty are never backed by memory.
        with skip_data():
            torch.save({name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}, self.path)

    def _checksums(self, progress: _Progress) -> list[Callable[[memoryview], object]]:
        return [progress.sha256.update, progress.update_crc]

    def _seal(self) -> None:
        by_offset = {p.offset: p for p in self._tensors.values() if p.nbytes}
        _patch_checksums(self.path, self._descriptor, by_offset)


class SafetensorsWriter(Writer):
    """See `Writer`; the format is https://huggingface.co/docs/safetensors: length of the header, header, data."""

    def _lay_out(self, tensors: Contents) -> None:
        # transformers asks for the format that the tensors were saved from.
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (shape, dtype) in tensors.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the data is aligned
        with self.path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _patch_checksums(path: Path, descriptor: int, by_offset: Mapping[int, _Progress]) -> None:
    """Write each record's CRC-32 into the archive's directory and behind the record's data."""
    with zipfile.ZipFile(path) as archive:
        records, at = archive.infolist(), archive.start_dir
    for record in records:
        header = CENTRAL_HEADER.unpack(os.pread(descriptor, CENTRAL_HEADER.size, at))
        progress = by_offset.get(_data_offset(descriptor, record.header_offset))
        if progress is not None:
            crc = struct.pack("<I", progress.crc)
            os.pwrite(descriptor, crc, at + CENTRAL_CRC_AT)
            end = progress.offset + progress.nbytes
            if os.pread(descriptor, 4, end) == DESCRIPTOR_SIGNATURE:
                os.pwrite(descriptor, crc, end + 4)
        name_bytes, extra_bytes, comment_bytes = header[10:13]
        at += CENTRAL_HEADER.size + name_bytes + extra_bytes + comment_bytes


def _data_offset(descriptor: int, header_offset: int) -> int:
    name_bytes, extra_bytes = struct.unpack("<HH", os.pread(descriptor, 4, header_offset + 26))
    return header_offset + 30 + name_bytes + extra_bytes
