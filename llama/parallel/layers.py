"""Parallel linears and a parallel embedding; every rank allocates only its own shard.

Names, arguments and weight layout are those of `fairscale.nn.model_parallel.layers` (0.4.13). fairscale's own layers
build the whole weight on every rank, break `torch.compile`, and need sizes that the ranks divide evenly; `cuts` gives
each rank any rows or columns.

Weights are left uninitialised unless an `init_method` is given: they are read from a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.kernels.products import linear
from llama.parallel import groups
from llama.parallel.collectives import (
    copy_to_ranks,
    gather_from_ranks,
    reduce_from_ranks,
    scatter_to_ranks,
)
from llama.parallel.groups import Ranks
from llama.parallel.partition import even_ranges

InitMethod = Callable[[Tensor], object]
Device = torch.device | str | None


class _Sharded(nn.Module):
    """The base of the three layers: the ranks, the cuts, and this rank's own cut."""

    def __init__(self, total: int, cuts: Sequence[range] | None, ranks: Ranks | None) -> None:
        super().__init__()
        self.ranks = groups.current() if ranks is None else ranks
        self.cuts = tuple(cuts) if cuts is not None else even_ranges(total, self.ranks.world_size)

    weight: nn.Parameter

    @property
    def own(self) -> range:
        """The rows or columns of the whole weight that this rank holds."""
        return self.cuts[self.ranks.rank]

    def product(self, x: Tensor) -> Tensor:
        """Return `x W^T` with this rank's matrix: [..., K] and [N, K] to [..., N]."""
        return linear(x, self.weight)


class ColumnParallelLinear(_Sharded):
    """`y = x A^T + b` with the rows of A (the features of y) cut across ranks.

    Args:
        in_features, out_features: sizes of the whole weight.
        bias: whether there is a bias, cut like the features of y.
        gather_output: whether every rank gets the whole y, or only its own features.
        init_method: fills the shard; None leaves it uninitialised.
        cuts: features of y that each rank owns; None for equal ranges. Ranges may overlap (KV heads that several ranks
            hold), in which case `gather_output` must be off.
        copy_input: whether the backward sums the ranks' gradients of x in this layer; off where one sum serves several
            layers (see `llama.model`).
        ranks: this process's place; None for the current one.
        device, dtype: of the shard.

    Shapes: x [..., in_features] to y [..., out_features], or [..., len(cuts[rank])] ungathered.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        gather_output: bool = True,
        init_method: InitMethod | None = None,
        *,
        cuts: Sequence[range] | None = None,
        copy_input: bool = True,
        ranks: Ranks | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, cuts, ranks)
        self.in_features, self.out_features = in_features, out_features
        self.gather_output, self.copy_input = gather_output, copy_input
        self.weight = nn.Parameter(torch.empty(len(self.own), in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(len(self.own), device=device, dtype=dtype)) if bias else None
        if init_method is not None:
            init_method(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], or this rank's features of them."""
        if self.copy_input:
            x = copy_to_ranks(x, self.ranks)
        y = self.product(x)
        if self.bias is not None:
            y = y + self.bias
        return gather_from_ranks(y, self.cuts, self.ranks) if self.gather_output else y


class RowParallelLinear(_Sharded):
    """`y = x A^T + b` with the columns of A (the features of x) cut across ranks, and y summed over the ranks.

    Args:
        in_features, out_features: sizes of the whole weight.
        bias: whether there is a bias, added once, after the sum.
        input_is_parallel: whether x holds only this rank's features already.
        init_method: fills the shard; None leaves it uninitialised.
        cuts: features of x that each rank owns; None for equal ranges.
        ranks: this process's place; None for the current one.
        device, dtype: of the shard.

    Shapes: x [..., in_features], or [..., len(cuts[rank])] when parallel, to y [..., out_features].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        input_is_parallel: bool = False,
        init_method: InitMethod | None = None,
        *,
        cuts: Sequence[range] | None = None,
        ranks: Ranks | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, cuts, ranks)
        self.in_features, self.out_features = in_features, out_features
        self.input_is_parallel = input_is_parallel
        self.weight = nn.Parameter(torch.empty(out_features, len(self.own), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        if init_method is not None:
            init_method(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features], or this rank's features of them, to [..., out_features]."""
        if not self.input_is_parallel:
            x = scatter_to_ranks(x, self.cuts, self.ranks)
        y = reduce_from_ranks(self.partial(x), self.ranks)
        return y if self.bias is None else y + self.bias

    def partial(self, x: Tensor) -> Tensor:
        """Return this rank's addend of y: its features of x, [..., len(cuts[rank])], to [..., out_features]."""
        return self.product(x)


class VocabParallelEmbedding(_Sharded):
    """An embedding whose rows (the vocabulary) are cut across ranks; the vectors are summed over the ranks.

    Args:
        num_embeddings, embedding_dim: sizes of the whole table.
        init_method: fills the shard; None leaves it uninitialised.
        cuts: rows that each rank owns; None for equal ranges.
        ranks: this process's place; None for the current one.
        device, dtype: of the shard.

    Shapes: ids [...] int64 to vectors [..., embedding_dim].
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        init_method: InitMethod | None = None,
        *,
        cuts: Sequence[range] | None = None,
        ranks: Ranks | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, cuts, ranks)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.weight = nn.Parameter(torch.empty(len(self.own), embedding_dim, device=device, dtype=dtype))
        if init_method is not None:
            init_method(self.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """[...] int64 to [..., embedding_dim]."""
        if self.ranks.world_size == 1:
            return self.lookup(ids)
        local = ids - self.own.start
        foreign = (local < 0) | (local >= len(self.own))
        vectors = self.lookup(local.masked_fill(foreign, 0))
        return reduce_from_ranks(vectors.masked_fill(foreign.unsqueeze(-1), 0.0), self.ranks)

    def lookup(self, local: Tensor) -> Tensor:
        """Return vectors of this rank's own rows: [...] int64, counted from its first row, to [..., embedding_dim]."""
        return F.embedding(local, self.weight)
