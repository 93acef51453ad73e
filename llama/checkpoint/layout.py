"""THE table: every tensor of a Llama, its names in each world, its axes and how it is cut.

Axes are named by what runs along them. `vocab`, `q`, `kv` and `ffn` are the ones that a `Partition`
cuts; `dim` and `head` are never cut by us (Meta's Llama 1 and 2 files cut the embedding along `dim`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llama.config import ModelArgs
from llama.parallel.partition import Partition

CUT_AXES = frozenset({"vocab", "q", "kv", "ffn"})


@dataclass(frozen=True)
class Row:
    """One line of the table; `{}` in a name stands for the layer.

    Args:
        meta: Meta's name, which is also ours.
        hf: Hugging Face's name.
        gguf: llama.cpp's name; rows are Meta's there, not permuted.
        axes: what runs along each dimension.
        permuted: whether Hugging Face stores the rows of each head with the two halves of every
            RoPE pair apart ("rotate half"), where Meta has them side by side. LLMs-from-scratch does too.
        scratch: the name in rasbt/LLMs-from-scratch (pkg/llms_from_scratch/llama3.py).
    """

    meta: str
    hf: str
    gguf: str
    axes: tuple[str, ...]
    permuted: bool
    scratch: str


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
    """One tensor of one model: its names, whole shape and axes."""

    name: str
    hf_name: str
    gguf_name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    permuted: bool
    scratch_name: str

    @property
    def cut_dim(self) -> int | None:
        """The dimension that is cut across ranks; None for a tensor that every rank holds."""
        return next((dim for dim, axis in enumerate(self.axes) if axis in CUT_AXES), None)

    def own(self, partition: Partition, rank: int) -> tuple[slice, ...]:
        """The part of the whole tensor that `rank` holds."""
        cuts = {
            "vocab": partition.vocab,
            "q": partition.q_rows,
            "kv": partition.kv_rows,
            "ffn": partition.ffn,
        }
        index = []
        for axis, size in zip(self.axes, self.shape, strict=True):
            run = cuts[axis][rank] if axis in CUT_AXES else range(size)
            index.append(slice(run.start, run.stop))
        return tuple(index)


def specs(args: ModelArgs) -> dict[str, Spec]:
    """Every tensor of the model by Meta's name; a tied output layer is listed too."""
    sizes = {
        "vocab": args.vocab_size,
        "dim": args.dim,
        "q": args.n_heads * args.head_dim,
        "kv": args.n_kv_heads * args.head_dim,
        "ffn": args.ffn_dim,
    }
    return {
        row.meta.format(layer): Spec(
            row.meta.format(layer),
            row.hf.format(layer),
            row.gguf.format(layer),
            tuple(sizes[axis] for axis in row.axes),
            row.axes,
            row.permuted,
            row.scratch.format(layer),
        )
        for row, layer in _rows(args.n_layers)
    }


def _rows(n_layers: int) -> Iterator[tuple[Row, int]]:
    """Every line of the table with its layer; those of no layer with 0, which their names do not take."""
    for row in TOP:
        yield row, 0
    for layer in range(n_layers):
        for row in BLOCK:
            yield row, layer


def is_ignored(name: str) -> bool:
    """Whether a stored tensor is one that may be left unread."""
    return name.endswith(IGNORED) or name in IGNORED_WHOLE
