"""Keys and values of the tokens seen so far, sized to the request.

A cache has slots, one a sequence, each with its own length: the entry of a token stands at the index
of its position, and a query sees the entries up to its own position. Entries beyond a slot's length
are leftovers that no query sees before they are written again.

Shape legend: B slots in use, T tokens, S entries a slot, K KV heads of this rank, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama.attention import attend

# Tokens of one prefill pass: bounds activations, however long or many the prompts.
PREFILL_TOKENS = 4096


class KVCache:
    """Keys and values of `n_slots` sequences of at most `length` tokens, for every layer.

    Args:
        n_layers, n_kv_heads, head_dim: geometry of this rank's shard.
        n_slots: sequences at a time.
        length: tokens a sequence.
        device, dtype: those of the keys.
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
        """What one forward pass sees: a run of slots, up to some length.

        Args:
            first: the slot of the batch's first row; the others follow.
            visible: entries that the queries may look at; None for all.
            fresh: the rows start at position 0, so they see nothing but themselves.
        """
        return CacheView(self, first, self.length if visible is None else visible, fresh)

    def begin_with(self, prefix: KVCache) -> None:
        """Copy the entries of a prefix, a cache of one slot, to the start of every slot."""
        for own, shared in zip((*self.k, *self.v), (*prefix.k, *prefix.v), strict=True):
            own[:, :, : prefix.length] = shared

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` entries of one slot over another's."""
        for entries in (*self.k, *self.v):
            entries[target, :, :length] = entries[source, :, :length]


class CacheView:
    """The part of a `KVCache` that one forward pass writes and reads."""

    def __init__(self, cache: KVCache, first: int, visible: int, fresh: bool) -> None:
        self.cache, self.first, self.visible, self.fresh = cache, first, visible, fresh

    def mask(self, positions: Tensor) -> Tensor | None:
        """Which entries each query sees: [B, 1, T, S] bool; None for plain causal attention."""
        if self.fresh:
            return None
        entries = torch.arange(self.visible, device=positions.device)
        return (entries <= positions.unsqueeze(-1)).unsqueeze(1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Keep k and v, and attend over all that the queries see: see `llama.attention.Context`."""
        keys, values = self.update(layer, k, v, positions)
        return attend(q, keys, values, mask)

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v [B, T, K, D] at `positions` [B, T]; return what the queries see, [B, K, S, D]."""
        slots = slice(self.first, self.first + k.shape[0])
        keys, values = self.cache.k[layer][slots], self.cache.v[layer][slots]
        rows = torch.arange(k.shape[0], device=k.device).unsqueeze(1)
        keys[rows, :, positions] = k
        values[rows, :, positions] = v
        if self.fresh:
            return k.transpose(1, 2), v.transpose(1, 2)
        return keys[:, :, : self.visible], values[:, :, : self.visible]
