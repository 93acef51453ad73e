"""Memory of generation beyond weights and cache: the tensors of the model's own steps, added up.

Tensors are counted where the code holds them: a variable of a frame that waits for its callee is
still memory. So this file follows `llama.model`, `llama.ops` and `llama.generation` line by line,
and a test counts what a run allocates.

Shape legend: N tokens of a pass, B rows, T tokens a row, S entries seen, E dim, Q and K the widths of
this rank's queries and keys, F its FFN columns, V' its part of the vocabulary. All results are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llama.cache import PREFILL_TOKENS
from llama.kernels.formats import Form
from llama.kernels.products import FEW_ROWS, piece_rows
from llama.parallel.partition import Partition
from llama.quantization.scheme import OUTPUT, Scheme

FLOAT, INDEX = 4, 8  # bytes of float32 and int64
# torch's CPU attention works in tiles: queries a tile by the number of queries, and keys a tile.
QUERY_TILES = ((768, 256), (192, 64), (0, 32))
KEY_TILE = 512


@dataclass(frozen=True)
class Workload:
    """Sequences that are generated at a time.

    Args:
        n_prompts: sequences at a time.
        length: tokens of each, prompt and completion together.
        prefix: virtual tokens that stand before each of them.
    """

    n_prompts: int = 1
    length: int = 512
    prefix: int = 0

    program: ClassVar[str] = "example.py"

    def words(self) -> str:
        """Return such as "2 prompts of 512 tokens"."""
        prompts = "1 prompt" if self.n_prompts == 1 else f"{self.n_prompts} prompts"
        return f"{prompts} of {self.length} tokens"

    def flags(self) -> dict[str, object]:
        """Return the program's flags by name: None for a flag that is left out, True for one without a value."""
        return {"max_seq_len": self.length, "max_batch_size": self.n_prompts}

    @property
    def n_rows(self) -> int:
        """Prompts of full length that the engine prefills in one pass; see `Engine._next_group`."""
        return min(self.n_prompts, max(1, PREFILL_TOKENS // self.length))

    def passes(self) -> list[tuple[int, int]]:
        """Return the prefill passes that may be the fullest, as columns (start, stop) of the prompts."""
        full = self.length // PREFILL_TOKENS * PREFILL_TOKENS
        starts = {0, max(0, full - PREFILL_TOKENS), full}
        runs = [(start, min(start + PREFILL_TOKENS, self.length)) for start in sorted(starts)]
        return [(start, stop) for start, stop in runs if start < stop]


# -- operators ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernels:
    """The operators of a device, by which they allocate scratch memory.

    Args:
        itemsize: bytes of a number of the model's dtype.
        threads: of a CPU rank, each with tiles of its own; 0 on a card.
        fused: attention never holds all scores at a time.
        native: our own kernels are in use.
    """

    itemsize: int
    threads: int = 0
    fused: bool = True
    native: bool = False


@dataclass(frozen=True)
class Product:
    """A product with this rank's part of one matrix.

    Args:
        form: of a matrix of integers; None for a matrix of numbers, whose products take no scratch memory.
        n_rows, n_columns: N and K.
        kernels: of the device.
    """

    form: Form | None
    n_rows: int
    n_columns: int
    kernels: Kernels

    @property
    def piece(self) -> int:
        """Numbers of a piece, which is widened at a time."""
        return min(self.n_rows, piece_rows(self.n_columns)) * self.n_columns

    @property
    def in_pieces(self) -> bool:
        """True for a matrix larger than one piece."""
        return self.piece < self.n_rows * self.n_columns

    def widening(self) -> int:
        """Return the peak while a piece is widened, the widened piece included."""
        if self.form is None:
            return 0
        numbers, itemsize = self.piece, self.kernels.itemsize
        if self.form.kind == "int8":
            return 2 * FLOAT * numbers
        if self.kernels.native:
            return itemsize * numbers
        # Float32 numbers before and after their scales, the scales themselves, and the numbers in the dtype.
        narrow = itemsize * numbers if itemsize < FLOAT else 0
        return 2 * FLOAT * numbers + FLOAT * numbers // self.form.group_size + narrow

    def forward(self, n_tokens: int, kept: bool = False) -> int:
        """Return the scratch memory beside x [M, K] and y [M, N]; `kept` where autograd follows."""
        if self.form is None:
            return 0
        itemsize = self.kernels.itemsize
        y = n_tokens * self.n_rows * itemsize
        if self.kernels.native and n_tokens <= FEW_ROWS and not kept:
            return n_tokens * (self.n_rows + self.n_columns) * FLOAT if itemsize < FLOAT else 0
        if self.in_pieces:
            last = self.n_rows % (self.piece // self.n_columns) or self.piece // self.n_columns
            # The parts of y are concatenated in the end.
            return max(self.widening() - n_tokens * last * itemsize, self.piece * itemsize, y)
        return max(self.widening() - y, self.piece * itemsize)

    def backward(self, n_tokens: int) -> int:
        """Return the scratch memory beside the gradients of y [M, N] and of x [M, K]."""
        if self.form is None:
            return 0
        part = n_tokens * self.n_columns * self.kernels.itemsize
        if self.in_pieces:
            return max(self.widening(), part + self.piece * self.kernels.itemsize)
        return max(self.widening() - part, self.piece * self.kernels.itemsize)


# -- a pass ----------------------------------------------------------------------------------------


def activation_bytes(
    partition: Partition, rank: int, work: Workload, kernels: Kernels, scheme: Scheme | None = None
) -> int:
    """Return the peak of a run on `rank`: of a prefill pass of full prompts, or of choosing tokens."""
    passes = [
        _Pass(partition, rank, work.n_rows, start, stop, kernels, work.prefix, scheme) for start, stop in work.passes()
    ]
    args = partition.args
    form = None if scheme is None else scheme.form(OUTPUT, args)
    output = Product(form, len(partition.vocab[rank]), args.dim, kernels)
    # The last pass's output is held while the first tokens are chosen.
    first = passes[-1].stream + choosing_bytes(work.n_rows, output)
    later = choosing_bytes(work.n_prompts, output)
    # A soft prompt is run alone, before any request.
    alone = [_Pass(partition, rank, 1, 0, work.prefix, kernels, 0, scheme)] if work.prefix else []
    return max(first, later, *(one.peak() for one in [*passes, *alone]))


def choosing_bytes(n_rows: int, output: Product) -> int:
    """Return the peak of choosing tokens: logits [B, V'] and the tensors of sampling within a nucleus."""
    vocab, itemsize = output.n_rows, output.kernels.itemsize
    logits = n_rows * vocab * FLOAT
    narrow = n_rows * vocab * itemsize if itemsize < FLOAT else 0
    # Logits, divided by the temperature, both stacked (2), and the stack's exponentials (2).
    product = n_rows * vocab * itemsize + output.forward(n_rows)
    return max(product, narrow + logits, 6 * logits) + vocab * INDEX


class _Pass:
    """A forward pass of B rows over the columns from `start` to `stop` of their prompts, on one rank."""

    def __init__(
        self,
        partition: Partition,
        rank: int,
        n_rows: int,
        start: int,
        stop: int,
        kernels: Kernels,
        prefix: int = 0,
        scheme: Scheme | None = None,
    ) -> None:
        args = partition.args
        self.n_rows, self.n_columns, self.n_seen, self.kernels = n_rows, stop - start, prefix + stop, kernels
        self.second = start > 0  # the output of an earlier pass is still held
        self.later = prefix + start > 0  # the pass sees the cache through a mask
        self.n_tokens = n_rows * self.n_columns
        self.head_dim = args.head_dim
        self.n_heads = len(partition.heads[rank])
        self.reduces = partition.world_size > 1
        width = self.n_tokens * kernels.itemsize
        self.stream = args.dim * width  # [N, E]
        self.query = len(partition.q_rows[rank]) * width  # [N, Q]
        self.key = len(partition.kv_rows[rank]) * width  # [N, K]
        self.ffn = len(partition.ffn[rank]) * width  # [N, F]
        self.form = None if scheme is None else scheme.linears

    def peak(self) -> int:
        """Return the tensors that the pass holds throughout, and the peak of a block."""
        return self._throughout() + max(self._attention_half(), self._ffn_half())

    def _throughout(self) -> int:
        table = self.n_tokens * self.head_dim * FLOAT  # cosines and sines, half a head each
        held = table + 2 * self.n_tokens * INDEX
        if self.later:
            held += self.n_tokens * self.n_seen  # the mask
        if self.second:
            held += PREFILL_TOKENS * self.stream // self.n_columns  # the earlier pass's output
        return held

    def _wide(self, nbytes: int) -> int:
        """Return a tensor's bytes in float32."""
        return nbytes * FLOAT // self.kernels.itemsize

    def _copy(self, nbytes: int) -> int:
        """Return the bytes of a float32 copy, which only 16-bit tensors need."""
        return self._wide(nbytes) if self.kernels.itemsize < FLOAT else 0

    def _norm(self) -> int:
        """RMSNorm of the stream: a float32 copy, normed, back in the dtype, times the weight; or one kernel."""
        if self.kernels.native:
            return self.stream
        narrowed = self.stream if self.kernels.itemsize < FLOAT else 0
        return self._copy(self.stream) + self._wide(self.stream) + narrowed + self.stream

    def _rope(self, projected: int) -> int:
        """RoPE of a projection: its float32 copy, rotated, and back in the dtype; or one kernel."""
        if self.kernels.native:
            return 2 * projected
        narrowed = projected if self.kernels.itemsize < FLOAT else 0
        return projected + self._copy(projected) + self._wide(projected) + narrowed

    def _product(self, entering: int, leaving: int) -> int:
        """A linear's scratch memory; its input [N, K] and output [N, N'] have so many bytes."""
        width = self.n_tokens * self.kernels.itemsize
        product = Product(self.form, leaving // width, entering // width, self.kernels)
        return product.forward(self.n_tokens)

    def _attention_half(self) -> int:
        """The peak of a block's attention, from the block's input to the sum over the ranks."""
        stream, query, key = self.stream, self.query, self.key
        inside = max(
            query + self._product(stream, query),
            self._rope(query),
            query + key + self._product(stream, key),
            query + self._rope(key),
            query + 2 * key + self._product(stream, key),
            query + 2 * key + self._attend(),
            # q, k and v wait in their frame while the heads' output is projected.
            2 * query + 2 * key + stream + max(self._product(query, stream), stream * self.reduces),
        )
        return stream + max(self._norm(), stream + inside)

    def _ffn_half(self) -> int:
        """The peak of a block's FFN, where the block's input, its sum and the first norm's output are still held."""
        stream, ffn = self.stream, self.ffn
        inside = max(
            2 * ffn + self._product(stream, ffn),
            ffn + stream + max(self._product(ffn, stream), stream * self.reduces),
        )
        return 3 * stream + max(self._norm(), stream + inside)

    def _attend(self) -> int:
        """The output and inner tensors of scaled_dot_product_attention."""
        mask = self.n_tokens * self.n_seen * self.kernels.itemsize if self.later else 0
        if not self.kernels.fused:
            scores = self.n_rows * self.n_heads * self.n_columns * self.n_seen * self.kernels.itemsize
            # Scores before and after the softmax; scaled queries and keys, keys and values repeated for each
            # head; the causal mask as bool and, in between, twice as numbers.
            causal = 0 if self.later else self.n_columns * self.n_seen * (2 + 2 * FLOAT)
            return mask + causal + 2 * scores + 6 * self.query
        sums = self.n_tokens * self.n_heads * FLOAT
        return self.query + sums + mask + self._tiles()

    def _tiles(self) -> int:
        """The tiles of a CPU's attention, of each thread."""
        if not self.kernels.threads:
            return 0
        queries = next(size for least, size in QUERY_TILES if self.n_columns >= least)
        queries, keys = min(queries, self.n_columns), min(KEY_TILE, self.n_seen)
        tile = queries * (keys + 2 + self.head_dim) * FLOAT
        packed = 0
        if self.kernels.itemsize < FLOAT:
            tile += (queries + self.head_dim) * keys * self.kernels.itemsize
            # Keys and values in the order of the matrix units.
            packed = 2 * self.key * self.n_seen // self.n_columns
        return self.kernels.threads * tile + packed
