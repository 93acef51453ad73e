"""Write a checkpoint in a target layout: a description of its files, carried out by one writer for all of them.

Rows are read once, at full width, and dealt out to the files that own a part of them; reading, writing and checksums
go on at the same time, in the memory of a few tensors' rows.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoint import manifest
from llama.checkpoint.files import Index
from llama.checkpoint.folders import check_space, check_target, partial_file, partial_folder
from llama.checkpoint.rows import quantized_chunks, row_chunks, to_hf_order
from llama.checkpoint.scratch import beside
from llama.checkpoint.source import Checkpoint
from llama.checkpoint.table import SCALES, WEIGHT
from llama.checkpoint.write import PthWriter, SafetensorsWriter, Writer
from llama.env import byte_bar
from llama.kernels.formats import Form

# Of some tensors, by Meta's names, the next rows.
Chunk = Mapping[str, Tensor]
# The name of a matrix, its packed integers and their scales, all of its rows.
Quantized = tuple[str, Tensor, Tensor]


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: a whole one of the model, or a part.

    Args:
        name: in the file.
        source: Meta's name of the tensor whose rows it takes.
        part: of that tensor, as an index.
        dtype: what is stored.
    """

    name: str
    source: str
    part: Index
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """In the file."""
        return tuple(run.stop - run.start for run in self.part)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


# By the files' names, their tensors in the files' order.
Files = Mapping[str, Sequence[Entry]]


@dataclass(frozen=True)
class TargetLayout:
    """A description of the files that a checkpoint becomes.

    Args:
        task: one word for the progress bar.
        files: what is in each file of weights; the ending of a name decides its format.
        partition: for the manifest: how the tensors were cut.
        parameters: the geometry, as a JSON object.
        parameters_file: name of the file that holds the parameters; None for a single file of weights, whose
            manifest stands beside it and holds them too.
        indent: of the parameters' file.
        write_beside: writes the tokenizer and whatever else lies in the folder; called once the weights are whole.
        rotate_half: whether the rows of heads are stored in Hugging Face's order.
        forms: the matrices that are rounded to the nearest as they are read, by Meta's names.
    """

    task: str
    files: Files
    partition: Mapping[str, Any]
    parameters: Mapping[str, Any]
    parameters_file: str | None
    write_beside: Callable[[Path], object]
    indent: int | None = None
    rotate_half: bool = False
    forms: Mapping[str, Form] = field(default_factory=dict)


def save(
    checkpoint: Checkpoint,
    target: Path,
    describe: Callable[[Checkpoint], TargetLayout],
    force: bool = False,
    chosen: Iterable[Quantized] = (),
) -> Path:
    """Write a checkpoint in another layout, under its name only once it is whole.

    Args:
        checkpoint: open, or live: see `llama.checkpoint.live`.
        target: the folder to write, or the file where the layout is a single one.
        describe: the layout of this checkpoint; called once the target is known to be free.
        force: replace what an earlier call wrote.
        chosen: matrices whose roundings were chosen otherwise, written as they come, in any order and each once.

    Returns:
        The target.

    Raises:
        LlamaError: before anything is written, or with everything that was written removed.
    """
    check_target(target, checkpoint.path, force)
    layout = describe(checkpoint)
    check_space(target, total_bytes(layout.files))
    chunks = read_rows(checkpoint, layout.files, layout.rotate_half, layout.forms, chosen)
    content = {"source": describe_source(checkpoint), "partition": layout.partition}
    write = _save_file if layout.parameters_file is None else _save_folder
    write(target, layout, chunks, content)
    return target


def _save_folder(target: Path, layout: TargetLayout, chunks: Iterable[Chunk], content: dict[str, Any]) -> None:
    with partial_folder(target) as folder:
        shards = write_files({name: folder / name for name in layout.files}, layout.files, chunks, layout.task)
        layout.write_beside(folder)
        manifest.write(folder / manifest.NAME, {**content, "shards": shards})
        # Last, since nothing opens as a checkpoint without it.
        assert layout.parameters_file is not None
        text = json.dumps(layout.parameters, indent=layout.indent) + "\n"
        (folder / layout.parameters_file).write_text(text, encoding="utf-8")


def _save_file(target: Path, layout: TargetLayout, chunks: Iterable[Chunk], content: dict[str, Any]) -> None:
    with partial_file(target) as partial:
        shards = write_files({target.name: partial}, layout.files, chunks, layout.task)
        # Parameters of an earlier file must not stand beside this one.
        beside(target).unlink(missing_ok=True)
    with partial_file(beside(target)) as partial:
        manifest.write(partial, {**content, "config": layout.parameters, "shards": shards})
    layout.write_beside(target.parent)


def describe_source(checkpoint: Checkpoint) -> dict[str, Any]:
    """The files that a checkpoint was made from, for its manifest."""
    files = {"name": checkpoint.path.resolve().name, "format": checkpoint.format, "n_files": checkpoint.n_shards}
    return files if checkpoint.adapter is None else {**files, "adapter": checkpoint.adapter}


def total_bytes(files: Files) -> int:
    """Bytes of all tensors of all files."""
    return sum(entry.nbytes for entries in files.values() for entry in entries)


# -- rows ------------------------------------------------------------------------------------------


def read_rows(
    checkpoint: Checkpoint,
    files: Files,
    rotate_half: bool = False,
    forms: Mapping[str, Form] | None = None,
    chosen: Iterable[Quantized] = (),
) -> Iterator[Chunk]:
    """The rows of every tensor that the files need, each tensor's in order, as they are stored.

    Args:
        checkpoint: what is read.
        files: its target; the order of the tensors is theirs, behind those that were chosen.
        rotate_half, forms: see `TargetLayout`.
        chosen: see `save`.
    """
    done = set()
    for name, packed, scales in chosen:
        yield {name: packed, scales_of(name): scales}
        done.add(name)
    dtypes = {entry.source: entry.dtype for entries in files.values() for entry in entries}
    for name, dtype in dtypes.items():
        if name in done or name not in checkpoint.tensors:
            continue  # scales come with their integers
        tensor, form = checkpoint.tensors[name], (forms or {}).get(name)
        if form is not None:
            for _, packed, scales in quantized_chunks(tensor, form):
                yield {name: packed, scales_of(name): scales}
            continue
        head_rows = checkpoint.args.head_dim if rotate_half and tensor.spec.permuted else 0
        for _, rows in row_chunks(tensor, dtype, max(1, head_rows)):
            yield {name: to_hf_order(rows, head_rows) if head_rows else rows}


def scales_of(name: str) -> str:
    """The scales' name of a quantized matrix."""
    return name.removesuffix(WEIGHT) + SCALES


# -- files -----------------------------------------------------------------------------------------


def write_files(
    paths: Mapping[str, Path], files: Files, chunks: Iterable[Chunk], task: str
) -> dict[str, dict[str, Any]]:
    """Fill files with tensors; of every file, each tensor's entry of the manifest.

    Args:
        paths: where each file is written.
        files: what each holds.
        chunks: the rows of the tensors, each tensor's in order and in the dtype that is stored.
        task: one word for the progress bar.
    """
    with ExitStack() as stack:
        workers = stack.enter_context(ThreadPoolExecutor(4, thread_name_prefix="save"))
        writers: dict[str, Writer] = {}
        for file, entries in files.items():
            kind = SafetensorsWriter if file.endswith(".safetensors") else PthWriter
            writers[file] = kind(paths[file], {entry.name: (entry.shape, entry.dtype) for entry in entries}, workers)
            stack.callback(writers[file].close)
        bar = stack.enter_context(byte_bar(total_bytes(files), task))
        _deal_out(chunks, files, writers, bar)
        digests = {file: writer.finish() for file, writer in writers.items()}
    described = {}
    for file, entries in files.items():
        named = {entry.name: entry for entry in entries}
        described[file] = {
            name: manifest.describe(named[name].shape, named[name].dtype, sha256)
            for name, sha256 in digests[file].items()
        }
    return described


def _deal_out(chunks: Iterable[Chunk], files: Files, writers: Mapping[str, Writer], bar: Any) -> None:
    """Write rows to the entries that own a part of them, reading ahead by one chunk."""
    places: dict[str, list[tuple[Entry, Writer]]] = {}
    for file, entries in files.items():
        for entry in entries:
            places.setdefault(entry.source, []).append((entry, writers[file]))
    written, under_way = Counter[str](), list[Future[Any]]()
    for chunk in chunks:
        _wait(under_way)
        under_way = []
        for name, rows in chunk.items():
            for entry, writer in places[name]:
                own = rows[_overlap(entry.part, written[name], len(rows))]
                if own.numel():
                    under_way += writer.append(entry.name, own)
                    bar.update(own.nbytes)
            written[name] += len(rows)
    _wait(under_way)


def _wait(under_way: Iterable[Future[Any]]) -> None:
    """Wait for the writers' tasks; their errors are raised here."""
    for future in under_way:
        future.result()


def _overlap(part: Index, first: int, n_rows: int) -> Index:
    """The rows and columns of a part that lie in a chunk of rows, as an index into the chunk."""
    start, stop = (min(max(edge - first, 0), n_rows) for edge in (part[0].start, part[0].stop))
    return slice(start, stop), *part[1:]
