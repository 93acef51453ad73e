"""THE table: every tensor of a Llama, with its names in each world, its axes and its cut.

Axes are named by what runs along them. `vocab`, `q`, `kv` and `ffn` are the ones that a `Partition`
cuts; `dim` and `head` are never cut by us (Meta's Llama 1 and 2 files cut the embedding along `dim`).
Readers, writers, quantizers and plans ask the table, and sizes are sums over its rows: a tensor that another family
has besides is a row here, a field of `ModelArgs` that its row asks for, and its use in the model.

Of a matrix that is quantized two tensors are stored, the integers under its own name and their scales beside them;
see `llama.kernels.formats`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from llama.config import ModelArgs
from llama.errors import QuantizationError
from llama.kernels.formats import GROUP_SIZES, Form
from llama.parallel.partition import Partition
from llama.quantization.scheme import Scheme

CUT_AXES = frozenset({"vocab", "q", "kv", "ffn"})
WEIGHT, SCALES = ".weight", ".scales"


def _always(args: ModelArgs) -> bool:
    return True


@dataclass(frozen=True)
class Row:
    """One line of the table; `{}` in a name stands for the layer.

    Args:
        meta: Meta's name, which is also ours.
        hf: Hugging Face's name.
        gguf: llama.cpp's name; rows are Meta's there, not permuted.
        axes: the axis along each dimension.
        permuted: whether Hugging Face stores the rows of each head with the two halves of every
            RoPE pair apart ("rotate half"), where Meta has them side by side. LLMs-from-scratch does too.
        scratch: the name in rasbt/LLMs-from-scratch (pkg/llms_from_scratch/llama3.py).
        exists: whether a model of some geometry has the tensor.
    """

    meta: str
    hf: str
    gguf: str
    axes: tuple[str, ...]
    permuted: bool
    scratch: str
    exists: Callable[[ModelArgs], bool] = _always

    @property
    def is_matrix(self) -> bool:
        """True for a tensor that multiplies activations, and so may be held as integers."""
        return len(self.axes) == 2


TOP = (
    Row(
        "tok_embeddings.weight",
        "model.embed_tokens.weight",
        "token_embd.weight",
        ("vocab", "dim"),
        False,
        "tok_emb.weight",
    ),
    Row("norm.weight", "model.norm.weight", "output_norm.weight", ("dim",), False, "final_norm.weight"),
    Row("output.weight", "lm_head.weight", "output.weight", ("vocab", "dim"), False, "out_head.weight"),
)
BLOCK = tuple(
    Row(
        f"layers.{{}}.{meta}.weight",
        f"model.layers.{{}}.{hf}.weight",
        f"blk.{{}}.{gguf}.weight",
        axes,
        permuted,
        f"trf_blocks.{{}}.{scratch}.weight",
    )
    for meta, hf, gguf, axes, permuted, scratch in (
        ("attention.wq", "self_attn.q_proj", "attn_q", ("q", "dim"), True, "att.W_query"),
        ("attention.wk", "self_attn.k_proj", "attn_k", ("kv", "dim"), True, "att.W_key"),
        ("attention.wv", "self_attn.v_proj", "attn_v", ("kv", "dim"), False, "att.W_value"),
        ("attention.wo", "self_attn.o_proj", "attn_output", ("dim", "q"), False, "att.out_proj"),
        ("feed_forward.w1", "mlp.gate_proj", "ffn_gate", ("ffn", "dim"), False, "ff.fc1"),
        ("feed_forward.w2", "mlp.down_proj", "ffn_down", ("dim", "ffn"), False, "ff.fc3"),
        ("feed_forward.w3", "mlp.up_proj", "ffn_up", ("ffn", "dim"), False, "ff.fc2"),
        ("attention_norm", "input_layernorm", "attn_norm", ("dim",), False, "norm1"),
        ("ffn_norm", "post_attention_layernorm", "ffn_norm", ("dim",), False, "norm2"),
    )
)
# Tables that are computed, not learnt, and that some files carry along (older LLMs-from-scratch the last six).
IGNORED = ("rope.freqs", "rotary_emb.inv_freq", "att.mask", "att.cos", "att.sin")
IGNORED_WHOLE = frozenset({"mask", "cos", "sin"})


@dataclass(frozen=True)
class Spec:
    """One tensor of one model.

    Args:
        name, hf_name, gguf_name, scratch_name: in each world.
        shape: of the whole, as it is stored.
        axes: the axis along each dimension.
        permuted: see `Row`.
        form: the form of the matrix whose integers or scales these are; None for a tensor of numbers.
        dtype: the stored dtype; None for any dtype of numbers.
        width: columns of the matrix that one stored column stands for.
    """

    name: str
    hf_name: str
    gguf_name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    permuted: bool
    scratch_name: str
    form: Form | None = None
    dtype: torch.dtype | None = None
    width: int = 1

    @property
    def cut_dim(self) -> int | None:
        """The dimension that is cut across ranks; None for a tensor that every rank holds."""
        return next((dim for dim, axis in enumerate(self.axes) if axis in CUT_AXES), None)

    @property
    def whole(self) -> tuple[slice, ...]:
        """The whole tensor, as an index."""
        return tuple(slice(0, size) for size in self.shape)

    def own(self, partition: Partition, rank: int) -> tuple[slice, ...]:
        """Return the part of the whole tensor that `rank` holds.

        Raises:
            QuantizationError: when a cut falls inside a group of columns that share a scale.
        """
        cuts = {
            "vocab": partition.vocab,
            "q": partition.q_rows,
            "kv": partition.kv_rows,
            "ffn": partition.ffn,
        }
        index = list(self.whole)
        if self.cut_dim is not None:
            run = cuts[self.axes[self.cut_dim]][rank]
            index[self.cut_dim] = self._stored_columns(run) if self.cut_dim == 1 else slice(run.start, run.stop)
        return tuple(index)

    def _stored_columns(self, columns: range) -> slice:
        """Return the stored columns that hold these columns of the matrix."""
        block = 1 if self.form is None else self.form.block
        inside = [edge for edge in (columns.start, columns.stop) if edge % block]
        if inside:
            fitting = [str(size) for size in GROUP_SIZES if inside[0] % size == 0]
            other = f"groups of {' or '.join(fitting)}" if fitting else "int8"
            raise QuantizationError(
                f"{self.name} would be cut at column {inside[0]}, inside a group of {block} that shares a scale: "
                f"use fewer ranks, another --tensor_split, or {other}"
            )
        return slice(columns.start // self.width, columns.stop // self.width)


def integers_and_scales(spec: Spec, form: Form) -> tuple[Spec, Spec]:
    """Return the two tensors that hold a matrix [N, K] in a form."""
    n_rows, n_columns = spec.shape
    form.check_columns(n_columns, spec.name)
    packed = (n_rows, n_columns // form.columns_per_byte)
    scales = form.scale_shape(n_rows, n_columns)
    names = {
        field: getattr(spec, field).removesuffix(WEIGHT) + SCALES
        for field in ("name", "hf_name", "gguf_name", "scratch_name")
    }
    return (
        dataclasses.replace(spec, shape=packed, form=form, dtype=form.dtype, width=form.columns_per_byte),
        dataclasses.replace(
            spec, **names, shape=scales, axes=spec.axes[: len(scales)], form=form, dtype=form.scale_dtype,
            width=form.block,
        ),
    )  # fmt: skip


def specs(args: ModelArgs, scheme: Scheme | None = None) -> dict[str, Spec]:
    """Return every tensor of the model by Meta's name; a tied output layer is listed too.

    Args:
        args: the geometry.
        scheme: what is quantized; of each such matrix the integers are listed, then the scales.

    Raises:
        QuantizationError: when groups do not divide a matrix's rows.
    """
    listed = {}
    for row, spec in _rows(args):
        form = scheme.form(spec.name, args) if scheme is not None and row.is_matrix else None
        for part in (spec,) if form is None else integers_and_scales(spec, form):
            listed[part.name] = part
    return listed


def _rows(args: ModelArgs) -> Iterator[tuple[Row, Spec]]:
    """Yield every line that the geometry has, with its tensor of each layer."""
    sizes = {
        "vocab": args.vocab_size,
        "dim": args.dim,
        "q": args.n_heads * args.head_dim,
        "kv": args.n_kv_heads * args.head_dim,
        "ffn": args.ffn_dim,
        "head": args.head_dim,
    }
    outside = ((row, 0) for row in TOP)  # their names take no layer
    inside = ((row, layer) for layer in range(args.n_layers) for row in BLOCK)
    for row, layer in (*outside, *inside):
        if row.exists(args):
            names = (row.meta.format(layer), row.hf.format(layer), row.gguf.format(layer))
            shape = tuple(sizes[axis] for axis in row.axes)
            yield row, Spec(*names, shape, row.axes, row.permuted, row.scratch.format(layer))


def is_ignored(name: str) -> bool:
    """Return whether a stored tensor may be left unread."""
    return name.endswith(IGNORED) or name in IGNORED_WHOLE


# -- sizes -----------------------------------------------------------------------------------------


def parts(args: ModelArgs, scheme: Scheme | None = None) -> tuple[list[Spec], list[Spec]]:
    """Return the tensors of one layer, and those outside the layers that take memory: a tied output layer does not."""
    listed = specs(dataclasses.replace(args, n_layers=1), scheme).values()
    layer = [spec for spec in listed if spec.name.startswith("layers.")]
    outside = [spec for spec in listed if not spec.name.startswith("layers.")]
    return layer, [spec for spec in outside if not (args.tied and spec.name.startswith("output."))]


def n_unique_params(args: ModelArgs) -> int:
    """Return the parameters that are held in memory: a tied output layer is not counted again."""
    layer, outside = parts(args)
    return args.n_layers * _count(layer) + _count(outside)


def n_params(args: ModelArgs) -> int:
    """Return the parameters of a checkpoint's files: embedding and output layer are both counted."""
    return n_unique_params(dataclasses.replace(args, tied=False))


def layer_params(args: ModelArgs) -> int:
    """Return the parameters of one transformer block."""
    return _count(parts(args)[0])


def rank_params(partition: Partition, rank: int) -> int:
    """Return the parameters that `rank` holds; a tied output layer is not counted again."""
    layer, outside = ([own_size(spec, partition, rank) for spec in group] for group in parts(partition.args))
    return partition.args.n_layers * sum(layer) + sum(outside)


def own_size(spec: Spec, partition: Partition, rank: int) -> int:
    """Return the entries of a tensor that `rank` holds."""
    return math.prod(run.stop - run.start for run in spec.own(partition, rank))


def _count(listed: list[Spec]) -> int:
    return sum(math.prod(spec.shape) for spec in listed)
