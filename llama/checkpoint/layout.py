"""THE table: every tensor of a Llama, its names in each world, its axes and how it is cut.

Axes are named by what runs along them. `vocab`, `q`, `kv` and `ffn` are the ones that a `Partition`
cuts; `dim` and `head` are never cut by us (Meta's Llama 1 and 2 files cut the embedding along `dim`).
"""

from __future__ import annotations

import dataclasses
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
            RoPE pair apart ("rotate half"), where Meta has them side by side.
    """

    meta: str
    hf: str
    gguf: str
    axes: tuple[str, ...]
    permuted: bool = False


TOP = (
    Row("tok_embeddings.weight", "model.embed_tokens.weight", "token_embd.weight", ("vocab", "dim")),
    Row("norm.weight", "model.norm.weight", "output_norm.weight", ("dim",)),
    Row("output.weight", "lm_head.weight", "output.weight", ("vocab", "dim")),
)
BLOCK = tuple(
    Row(f"layers.{{}}.{meta}.weight", f"model.layers.{{}}.{hf}.weight", f"blk.{{}}.{gguf}.weight", axes, permuted)
    for meta, hf, gguf, axes, permuted in (
        ("attention.wq", "self_attn.q_proj", "attn_q", ("q", "dim"), True),
        ("attention.wk", "self_attn.k_proj", "attn_k", ("kv", "dim"), True),
        ("attention.wv", "self_attn.v_proj", "attn_v", ("kv", "dim"), False),
        ("attention.wo", "self_attn.o_proj", "attn_output", ("dim", "q"), False),
        ("feed_forward.w1", "mlp.gate_proj", "ffn_gate", ("ffn", "dim"), False),
        ("feed_forward.w2", "mlp.down_proj", "ffn_down", ("dim", "ffn"), False),
        ("feed_forward.w3", "mlp.up_proj", "ffn_up", ("ffn", "dim"), False),
        ("attention_norm", "input_layernorm", "attn_norm", ("dim",), False),
        ("ffn_norm", "post_attention_layernorm", "ffn_norm", ("dim",), False),
    )
)
# Tables that are computed, not learnt, and that some files carry along.
IGNORED = ("rope.freqs", "rotary_emb.inv_freq")


@dataclass(frozen=True)
class Spec:
    """One tensor of one model: its names, whole shape and axes."""

    name: str
    hf_name: str
    gguf_name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    permuted: bool

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
        row.meta: Spec(row.meta, row.hf, row.gguf, tuple(sizes[axis] for axis in row.axes), row.axes, row.permuted)
        for row in _named_rows(args.n_layers)
    }


def _named_rows(n_layers: int) -> Iterator[Row]:
    """The table's rows for a model, with the layers' numbers filled in."""
    yield from TOP
    for layer in range(n_layers):
        for row in BLOCK:
            names = {world: getattr(row, world).format(layer) for world in ("meta", "hf", "gguf")}
            yield dataclasses.replace(row, **names)


def is_ignored(name: str) -> bool:
    """Whether a stored tensor is one that may be left unread."""
    return name.endswith(IGNORED)
