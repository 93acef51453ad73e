"""The KV cache: keys and values of earlier tokens, sized to the request.

A cache has slots, one per sequence, each with its own length. A token's entry stands at the index of its position, and
a query sees the entries up to its own position. Entries beyond a slot's length are stale: they are written again before
any query sees them.

Shape legend: B slots in use, T tokens, S entries per slot, K KV heads of this rank, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama.attention import attend

# Tokens of one prefill pass at most: bounds the activations, however long or many the prompts are.
PREFILL_TOKENS = 4096


class KVCache:
    """Keys and values of `n_slots` sequences of at most `length` tokens, for every layer.

    Args:
        n_layers, n_kv_heads, head_dim: geometry of this rank's shard.
        n_slots: sequences at a time.
        length: tokens per sequence.
        device, dtype: of the keys and values.
    """

    def __init__(
        self,
        n_layers: int,
        n_slots: int,
        length: int,
        n_kv_heads: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (n_slots, n_kv_heads, length, head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(n_layers)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(n_layers)]
        self.n_slots, self.length = n_slots, length

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds on this rank."""
        return sum(entry.nbytes for entry in (*self.k, *self.v))

    def view(self, first: int = 0, visible: int | None = None, fresh: bool = False) -> CacheView:
        """Return the part of the cache that one forward pass writes and reads.

        Args:
            first: slot of the batch's first row; the other rows follow.
            visible: entries that queries may see; None for all.
            fresh: whether the rows start at position 0, so that they see nothing but themselves.
        """
        entries = torch.arange(self.length if visible is None else visible, device=self.k[0].device)
        return CacheView(self, first, entries, fresh)

    def rows(self, first: int, last: int) -> KVCache:
        """Return the slots from `first` up to `last` as a cache that shares their memory."""
        part = object.__new__(KVCache)
        part.k, part.v = [k[first:last] for k in self.k], [v[first:last] for v in self.v]
        part.n_slots, part.length = last - first, self.length
        return part

    def begin_with(self, prefix: KVCache) -> None:
        """Copy the entries of a prefix, itself a cache of one slot, to the start of every slot."""
        for own, shared in zip((*self.k, *self.v), (*prefix.k, *prefix.v), strict=True):
            own[:, :, : prefix.length] = shared

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` entries of slot `source` over those of slot `target`."""
        for entries in (*self.k, *self.v):
            entries[target, :, :length] = entries[source, :, :length]


class CacheView:
    """The part of a `KVCache` that one forward pass writes and reads.

    Args:
        cache, first, fresh: as in `KVCache.view`.
        entries: indices of the entries that queries may see, [S] int64 from 0 on; a tensor, so that its length may
            change from pass to pass without compiling another graph.
    """

    def __init__(self, cache: KVCache, first: int, entries: Tensor, fresh: bool) -> None:
        self.cache, self.first, self.entries, self.fresh = cache, first, entries, fresh

    def mask(self, positions: Tensor) -> Tensor | None:
        """Return the mask: [B, 1, T, S] bool, True where a query sees an entry; None for plain causal attention."""
        if self.fresh:
            return None
        return (self.entries <= positions.unsqueeze(-1)).unsqueeze(1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Write k and v into the cache, and attend over the visible entries; see `llama.attention.Context`."""
        keys, values = self.update(layer, k, v, positions)
        return attend(q, keys, values, mask)

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v [B, T, K, D] at `positions` [B, T]; return the visible keys and values, each [B, K, S, D]."""
        slots = slice(self.first, self.first + k.shape[0])
        keys, values = self.cache.k[layer][slots], self.cache.v[layer][slots]
        rows = torch.arange(k.shape[0], device=k.device).unsqueeze(1)
        keys[rows, :, positions] = k
        values[rows, :, positions] = v
        if self.fresh:
            return k.transpose(1, 2), v.transpose(1, 2)
        n_seen = self.entries.shape[0]
        return keys[:, :, :n_seen], values[:, :, :n_seen]
