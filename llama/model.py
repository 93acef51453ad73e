"""The Llama: one `Transformer` for training, prefill and decode, cut across ranks.

Weights are in Meta's layout and under Meta's names. A rank computes with its own heads and FFN
columns; one all-reduce after attention and one after the FFN put the residual stream together again.

Shape legend: B batch, T tokens, S tokens seen, E dim, H query heads and K KV heads of this rank,
D head_dim, V' this rank's part of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import lean
from llama.attention import Context, attend
from llama.cache import KVCache
from llama.config import ModelArgs
from llama.kernels import block
from llama.parallel import groups
from llama.parallel.collectives import copy_to_ranks, gather_last
from llama.parallel.groups import Ranks
from llama.parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from llama.parallel.partition import Partition
from llama.rope import apply_rope, rope_frequencies, rope_table

Table = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467), accumulated in float32: [..., E] to [..., E]."""

    def __init__(
        self, dim: int, eps: float, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] to [..., E]."""
        if lean.applies(x) and not self.weight.requires_grad:
            return lean.rms_norm(x, self.weight, self.eps)
        if block.serves(x, self.weight):
            return block.rms_norm(x, self.weight, self.eps)
        wide = lean.widened(x)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


class _Build:
    """How the layers of this rank are made: the partition, the ranks, device and dtype."""

    def __init__(
        self,
        partition: Partition,
        ranks: Ranks,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.partition, self.ranks = partition, ranks
        self.where: dict[str, Any] = {"device": device, "dtype": dtype}

    def column(self, n_in: int, n_out: int, cuts: tuple[range, ...]) -> ColumnParallelLinear:
        # The block copies the input to the ranks once for all of its column-parallel linears.
        return ColumnParallelLinear(
            n_in, n_out, bias=False, gather_output=False,
            cuts=cuts, copy_input=False, ranks=self.ranks, **self.where,
        )  # fmt: skip

    def row(self, n_in: int, n_out: int, cuts: tuple[range, ...]) -> RowParallelLinear:
        return RowParallelLinear(
            n_in, n_out, bias=False, input_is_parallel=True, cuts=cuts, ranks=self.ranks, **self.where
        )  # fmt: skip

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
        q = apply_rope(self.wq(x).unflatten(-1, heads), table)  # [B, T, H, D]
        k = apply_rope(self.wk(x).unflatten(-1, heads), table)  # [B, T, K, D]
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
        gate = self.w1(x)
        if gate.requires_grad:
            return self.w2(F.silu(gate) * self.w3(x))
        if block.serves(gate):
            return self.w2(block.swiglu_(gate, self.w3(x)))
        # In place: fresh memory for the FFN's width takes the system longer to give than the product takes.
        return self.w2(F.silu(gate, inplace=True).mul_(self.w3(x)))


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
    """A Llama of which this rank holds its shard; weights are uninitialised until they are loaded.

    Args:
        args: the geometry, `vocab_size` known.
        partition: the cut; None for equal shards over the current ranks.
        ranks: this process's place; None for the current one.
        device, dtype: where and how the shard is held; "meta" allocates nothing.

    Example:
        >>> logits = Transformer(args)(tokens)  # [B, T] int64 to [B, T, V'] float32
    """

    rope_frequencies: Tensor

    def __init__(
        self,
        args: ModelArgs,
        partition: Partition | None = None,
        ranks: Ranks | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.args = args
        self.ranks = groups.current() if ranks is None else ranks
        self.partition = partition or Partition.create(args, self.ranks.world_size)
        build = _Build(self.partition, self.ranks, device, dtype)
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
        self,
        tokens: Tensor | None = None,
        embeddings: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Context | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The normed residual stream after the last block: [B, T, E]. Arguments as in `forward`."""
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
        """This rank's part of the logits: [..., E] to [..., V'] float32, or wider where the model is."""
        return lean.widened(self.output(copy_to_ranks(hidden, self.ranks)))

    def forward(
        self,
        tokens: Tensor | None = None,
        embeddings: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Context | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Logits of this rank's part of the vocabulary, [B, T, V'] float32; see `gather_logits`.

        Args:
            tokens: [B, T] int64.
            embeddings: [B, T, E] in place of tokens.
            positions: [B, T] int64; None counts from 0.
            cache: what else is seen, such as a view of a `KVCache`; None attends among the given tokens alone.
            mask: [B or 1, 1, T, S] bool, True where a query sees an entry; None is causal.
        """
        return self.logits(self.hidden(tokens, embeddings, positions, cache, mask))

    def gather_logits(self, logits: Tensor) -> Tensor:
        """The whole vocabulary's logits on every rank: [..., V'] to [..., vocab_size]; no gradient."""
        return gather_last(logits, self.partition.vocab, self.ranks)

    def new_cache(self, n_slots: int, length: int) -> KVCache:
        """An empty cache for `n_slots` sequences of at most `length` tokens, for this rank's heads."""
        n_kv_heads = len(self.partition.kv_heads[self.ranks.rank])
        weight = self.norm.weight
        return KVCache(
            self.args.n_layers,
            n_slots,
            length,
            n_kv_heads,
            self.args.head_dim,
            device=weight.device,
            dtype=weight.dtype,
        )
