"""What products with matrices of integers take besides what goes in and comes out: see `llama.kernels.products`.

Shape legend: N rows of a matrix, K columns, M rows of x. All results are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama.kernels.formats import Form
from llama.kernels.products import FEW_ROWS, piece_rows

FLOAT = 4


@dataclass(frozen=True)
class Kernels:
    """What the operators of a device allocate for themselves.

    Args:
        itemsize: bytes of a number of the model's dtype.
        threads: of a CPU rank, each with tiles of its own; 0 on a card.
        fused: whether attention never holds all scores at a time.
        native: whether our own kernels are in use.
    """

    itemsize: int
    threads: int = 0
    fused: bool = True
    native: bool = False


@dataclass(frozen=True)
class Product:
    """A product with this rank's part of one matrix.

    Args:
        form: how the matrix is held; None for numbers, whose products take nothing more.
        n_rows, n_columns: N and K.
        kernels: of the device.
    """

    form: Form | None
    n_rows: int
    n_columns: int
    kernels: Kernels

    @property
    def piece(self) -> int:
        """Numbers that are widened at a time."""
        return min(self.n_rows, piece_rows(self.n_columns)) * self.n_columns

    @property
    def in_pieces(self) -> bool:
        """Whether the matrix is larger than that."""
        return self.piece < self.n_rows * self.n_columns

    def widening(self) -> int:
        """The most that is held while a piece is widened, the widened piece among it."""
        if self.form is None:
            return 0
        numbers, itemsize = self.piece, self.kernels.itemsize
        if self.form.kind == "int8":
            return 2 * FLOAT * numbers
        if self.kernels.native:
            return itemsize * numbers
        # In float32, multiplied by the scales, and those; then in the dtype.
        narrow = itemsize * numbers if itemsize < FLOAT else 0
        return 2 * FLOAT * numbers + FLOAT * numbers // self.form.group_size + narrow

    def forward(self, n_tokens: int, kept: bool = False) -> int:
        """Beyond x [M, K] and y [M, N]; `kept` where autograd follows."""
        if self.form is None:
            return 0
        itemsize = self.kernels.itemsize
        y = n_tokens * self.n_rows * itemsize
        if self.kernels.native and n_tokens <= FEW_ROWS and not kept:
            return n_tokens * (self.n_rows + self.n_columns) * FLOAT if itemsize < FLOAT else 0
        if self.in_pieces:
            last = self.n_rows % (self.piece // self.n_columns) or self.piece // self.n_columns
            # The parts of y are put together in the end.
            return max(self.widening() - n_tokens * last * itemsize, self.piece * itemsize, y)
        return max(self.widening() - y, self.piece * itemsize)

    def backward(self, n_tokens: int) -> int:
        """Beyond the gradients of y [M, N] and of x [M, K]."""
        if self.form is None:
            return 0
        part = n_tokens * self.n_columns * self.kernels.itemsize
        if self.in_pieces:
            return max(self.widening(), part + self.piece * self.kernels.itemsize)
        return max(self.widening() - part, self.piece * self.kernels.itemsize)
