"""One tensor of a whole model, and its rows in order, a chunk at a time: as they are, or quantized on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.checkpoint.files import Index, StoredTensor
from llama.checkpoint.table import Spec
from llama.kernels.formats import Form
from llama.kernels.products import pack

CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of the whole model, stored in one piece or in several.

    Args:
        spec: its name, shape and axes.
        pieces: what is stored, in order.
        dim: the dimension along which the pieces are laid end to end.
        head_rows: rows of one head where the file has them in Hugging Face's order, else 0.
    """

    spec: Spec
    pieces: tuple[StoredTensor, ...]
    dim: int = 0
    head_rows: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it is stored in."""
        return self.pieces[0].dtype

    def read_into(self, index: Index, out: Tensor) -> None:
        """Copy the part that `index` names into `out`, in Meta's row order and `out`'s dtype."""
        for where, values in self.read(index):
            out[where].copy_(values)

    def read(self, index: Index) -> Iterator[tuple[Index, Tensor]]:
        """The part that `index` names in pieces: where each belongs in the part, and its values.

        Values are good until the next piece is asked for. Where rows are permuted, `index` holds
        whole heads.
        """
        wanted, first = index[self.dim], 0
        for piece in self.pieces:
            last = first + piece.shape[self.dim]
            start, stop = max(wanted.start, first), min(wanted.stop, last)
            if start < stop:
                inner = list(index)
                inner[self.dim] = slice(start - first, stop - first)
                yield from self._read_piece(piece, tuple(inner), start - wanted.start)
            first = last

    def _read_piece(self, piece: StoredTensor, index: Index, shift: int) -> Iterator[tuple[Index, Tensor]]:
        for dim, start, values in piece.pieces(index, max(1, self.head_rows)):
            starts = [0] * values.ndim
            starts[dim] += start
            starts[self.dim] += shift
            where = tuple(slice(s, s + n) for s, n in zip(starts, values.shape, strict=True))
            yield where, self._in_meta_order(values)

    def _in_meta_order(self, values: Tensor) -> Tensor:
        return to_meta_order(values, self.head_rows) if self.head_rows else values


def may_be(dtype: torch.dtype, wanted: torch.dtype | None) -> bool:
    """Return whether a tensor may be stored in `dtype`: the wanted one, or any of numbers where that is None."""
    return dtype.is_floating_point if wanted is None else dtype == wanted


def to_meta_order(rows: Tensor, head_dim: int) -> Tensor:
    """Whole heads of `wq` or `wk`, [heads * D, E], from Hugging Face's [heads, 2, D/2] rows to [heads, D/2, 2]."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def to_hf_order(rows: Tensor, head_dim: int) -> Tensor:
    """Whole heads of `wq` or `wk`, [heads * D, E], from Meta's [heads, D/2, 2] rows to [heads, 2, D/2]."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


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

    The stored values are rounded, in float32, whatever is computed in later; and int8's scale is that of
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
