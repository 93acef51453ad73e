"""Softmax attention, and the protocol of a context: whatever a pass attends to beside its own tokens.

Shape legend: B batch, T tokens, S tokens seen, H query heads and K KV heads of this rank, D head_dim.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class Context(Protocol):
    """The tokens that one forward pass attends to, where plain causal attention over its own does not do.

    Two exist: a cache of earlier tokens (`llama.cache`), and a batch of examples that share their beginnings
    (`llama.finetuning.packing`).
    """

    def mask(self, positions: Tensor) -> Tensor | None:
        """Return the mask for tokens at `positions` [B, T], the same in every layer: [B or 1, 1, T, S] bool or None."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Return the attention of one layer: q [B, T, H, D], k and v [B, T, K, D] to [B, T, H * D]."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return softmax attention: q [B, T, H, D] over k and v [B, K, S, D] to [B, T, H * D].

    Args:
        mask: [B or 1, 1, T, S] bool, True where a query sees an entry; None for causal (T equals S).
    """
    batch, n_tokens, n_heads, _ = q.shape
    n_groups = k.shape[1]
    if n_tokens == 1:
        # One token: the heads of a group become the queries of one head, so no key is copied.
        grouped = q.reshape(batch, n_groups, n_heads // n_groups, -1)
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
        return out.reshape(batch, 1, -1)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=n_groups != n_heads
    )
    return out.transpose(1, 2).flatten(2)
