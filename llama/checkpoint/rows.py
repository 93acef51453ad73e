"""The rows of a stored matrix in order, a chunk at a time: as they are, or quantized as they are read."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llama.checkpoint.files import Index
from llama.checkpoint.source import SourceTensor
from llama.kernels.formats import Form
from llama.kernels.products import pack

CHUNK_BYTES = 16 << 20


def row_chunks(
    tensor: SourceTensor, dtype: torch.dtype, multiple: int = 1, part: Index | None = None
) -> Iterator[tuple[int, Tensor]]:
    """The tensor's rows in order: (first row, rows), each chunk in memory of its own.

    Args:
        tensor: of a checkpoint.
        dtype: what to convert to.
        multiple: chunks hold a multiple of so many rows; of whole heads anyway where the file permutes them.
        part: which rows, and which columns of them; None for all. Rows are counted from the first of them.
    """
    rows, *others = tensor.spec.whole if part is None else part
    shape = [run.stop - run.start for run in others]
    step = max(1, CHUNK_BYTES // (torch.Size(shape).numel() * dtype.itemsize))
    multiple = max(multiple, tensor.head_rows)
    step = max(1, step // multiple) * multiple
    for first in range(rows.start, rows.stop, step):
        last = min(first + step, rows.stop)
        values = torch.empty(last - first, *shape, dtype=dtype)
        tensor.read_into((slice(first, last), *others), values)
        yield first - rows.start, values


def quantized_chunks(
    tensor: SourceTensor, form: Form, part: Index | None = None, device: torch.device | str = "cpu"
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A part of a matrix, rounded to the nearest as it is read: (rows of the part, packed integers, scales).

    What is rounded are the stored values, in float32, whatever is computed in later; and int8's scale is that of
    the whole row, whichever columns are wanted: so the integers are the same at every world size.

    Args:
        tensor: a matrix of numbers.
        form: how it is going to be held.
        part: rows and columns, in whole groups; None for all.
        device: where the rounding is done.
    """
    rows, columns = tensor.spec.whole if part is None else part
    by_row = form.kind == "int8"
    whole_rows = (rows, tensor.spec.whole[1])
    for first, values in row_chunks(tensor, torch.float32, part=whole_rows if by_row else (rows, columns)):
        packed, scales = pack(values.to(device), form, columns if by_row else slice(None))
        yield slice(first, first + len(values)), packed, scales
