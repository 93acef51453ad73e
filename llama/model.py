"""The Llama: one `Transformer` for training, prefill and decode, cut across ranks.

Weights have Meta's layout and Meta's names. A rank computes with its own heads and FFN columns; one all-reduce after
attention and one after the FFN sum the ranks' parts of the residual stream.

Shape legend: B batch, T tokens, S tokens seen, E dim, H query heads and K KV heads of this rank, D head_dim, V' this
rank's part of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llama.attention import Context, attend
from llama.cache import KVCache
from llama.config import ModelArgs
from llama.ops import Table, rms_norm, rotate, swiglu, widened
from llama.parallel import groups
from llama.parallel.collectives import copy_to_ranks
from llama.parallel.groups import Ranks
from llama.parallel.layers import ColumnParallelLinear, Device, RowParallelLinear, VocabParallelEmbedding
from llama.parallel.partition import Partition
from llama.rope import rope_frequencies, rope_table


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] to [..., E]."""
        return rms_norm(x, self.weight, self.eps)


@dataclass(frozen=True)
class _Build:
    """A maker of this rank's layers; `where` holds their device and dtype."""

    partition: Partition
    ranks: Ranks
    where: dict[str, Any]

    def column(self, n_in: int, n_out: int, cuts: tuple[range, ...]) -> ColumnParallelLinear:
        # The block copies the input to the ranks once for all of its column-parallel linears.
        return ColumnParallelLinear(
            n_in, n_out, bias=False, gather_output=False, copy_input=False, cuts=cuts, ranks=self.ranks, **self.where
        )

    def row(self, n_in: int, n_out: int, cuts: tuple[range, ...]) -> RowParallelLinear:
        return RowParallelLinear(
            n_in, n_out, bias=False, input_is_parallel=True, cuts=cuts, ranks=self.ranks, **self.where
        )

    def norm(self) -> RMSNorm:
        return RMSNorm(self.partition.args.dim, self.partition.args.norm_eps, **self.where)


class Attention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245) over this rank's heads."""

    def __init__(self, layer: int, build: _Build) -> None:
        super().__init__()
        partition, args = build.partition, build.partition.args
        q_width, kv_width = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        self.layer, self.head_dim = layer, args.head_dim
        self.wq = build.column(args.dim, q_width, partition.q_rows)
        self.wk = build.column(args.dim, kv_width, partition.kv_rows)
        self.wv = build.column(args.dim, kv_width, partition.kv_rows)
        self.wo = build.row(q_width, args.dim, partition.q_rows)

    def forward(self, x: Tensor, table: Table, positions: Tensor, cache: Context | None, mask: Tensor | None) -> Tensor:
        """[B, T, E] to [B, T, E]; see `Transformer.forward`."""
        heads = (-1, self.head_dim)
        q = rotate(self.wq(x).unflatten(-1, heads), table)  # [B, T, H, D]
        k = rotate(self.wk(x).unflatten(-1, heads), table)  # [B, T, K, D]
        v = self.wv(x).unflatten(-1, heads)
        if cache is None:
            return self.wo(attend(q, k.transpose(1, 2), v.transpose(1, 2), mask))
        return self.wo(cache.attend(self.layer, q, k, v, positions, mask))


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202) over this rank's columns."""

    def __init__(self, build: _Build) -> None:
        super().__init__()
        partition, args = build.partition, build.partition.args
        self.w1 = build.column(args.dim, args.ffn_dim, partition.ffn)
        self.w2 = build.row(args.ffn_dim, args.dim, partition.ffn)
        self.w3 = build.column(args.dim, args.ffn_dim, partition.ffn)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, E] to [B, T, E]."""
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class TransformerBlock(nn.Module):
    """Attention and FFN, each behind a norm and added to the residual stream [B, T, E]."""

    def __init__(self, layer: int, build: _Build) -> None:
        super().__init__()
        self.ranks = build.ranks
        self.attention = Attention(layer, build)
        self.feed_forward = FeedForward(build)
        self.attention_norm = build.norm()
        self.ffn_norm = build.norm()

    def forward(self, x: Tensor, table: Table, positions: Tensor, cache: Context | None, mask: Tensor | None) -> Tensor:
        """[B, T, E] to [B, T, E]; see `Transformer.forward`."""
        normed = copy_to_ranks(self.attention_norm(x), self.ranks)
        x = x + self.attention(normed, table, positions, cache, mask)
        return x + self.feed_forward(copy_to_ranks(self.ffn_norm(x), self.ranks))


class Transformer(nn.Module):
    """This rank's shard of a Llama; weights are uninitialised until they are loaded.

    Args:
        args: the geometry, `vocab_size` known.
        partition: the cut; None for equal shards over the current ranks.
        ranks: this process's place; None for the current one.
        device, dtype: of the shard; on "meta" nothing is allocated.

    Example:
        >>> logits = Transformer(args)(tokens)  # [B, T] int64 to [B, T, V'] float32
    """

    rope_frequencies: Tensor

    def __init__(
        self, args: ModelArgs, partition: Partition | None = None, ranks: Ranks | None = None, *,
        device: Device = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.args = args
        self.ranks = groups.current() if ranks is None else ranks
        self.partition = partition or Partition.create(args, self.ranks.world_size)
        build = _Build(self.partition, self.ranks, {"device": device, "dtype": dtype})
        cuts = self.partition.vocab
        self.tok_embeddings = VocabParallelEmbedding(
            args.vocab_size, args.dim, cuts=cuts, ranks=self.ranks, **build.where
        )
        self.layers = nn.ModuleList(TransformerBlock(layer, build) for layer in range(args.n_layers))
        self.norm = build.norm()
        self.output = build.column(args.dim, args.vocab_size, cuts)
        if args.tied:
            self.output.weight = self.tok_embeddings.weight
        self.register_buffer("rope_frequencies", rope_frequencies(args, device), persistent=False)

    def hidden(
        self, tokens: Tensor | None = None, embeddings: Tensor | None = None, positions: Tensor | None = None,
        cache: Context | None = None, mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the normed residual stream after the last block, [B, T, E]; arguments as in `forward`."""
        x = self.tok_embeddings(tokens) if embeddings is None else embeddings
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        if mask is None and cache is not None:
            mask = cache.mask(positions)
        table = rope_table(self.rope_frequencies, positions)
        for layer in self.layers:
            x = layer(x, table, positions, cache, mask)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return this rank's part of the logits: [..., E] to [..., V'] float32, or wider where the model is."""
        return widened(self.output(copy_to_ranks(hidden, self.ranks)))

    def forward(
        self, tokens: Tensor | None = None, embeddings: Tensor | None = None, positions: Tensor | None = None,
        cache: Context | None = None, mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the logits of this rank's part of the vocabulary, [B, T, V'] float32.

        Args:
            tokens: [B, T] int64.
            embeddings: [B, T, E] in place of tokens.
            positions: [B, T] int64; None counts from 0.
            cache: what the tokens attend to, such as a view of a `KVCache`; None for one another alone.
            mask: [B or 1, 1, T, S] bool, True where a query sees an entry; None is causal.
        """
        return self.logits(self.hidden(tokens, embeddings, positions, cache, mask))

    def new_cache(self, n_slots: int, length: int) -> KVCache:
        """Return an empty cache of this rank's heads, for `n_slots` sequences of at most `length` tokens."""
        args, weight = self.args, self.norm.weight
        n_kv_heads = len(self.partition.kv_heads[self.ranks.rank])
        return KVCache(
            args.n_layers, n_slots, length, n_kv_heads, args.head_dim, device=weight.device, dtype=weight.dtype
        )
