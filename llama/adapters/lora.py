"""LoRA (arXiv:2106.09685) over the sharded model: linears are replaced by name, and updates cut as their linears are.

Beside a column-parallel linear, a rank holds the whole A and its own rows of B; beside a row-parallel linear, its own
columns of A and the whole B. The update is added to the linear's product before any sum over the ranks, so it costs no
collective of its own. The whole halves are multiplied with this rank's features alone, forward or backward: their
gradients are partial sums (see `llama.parallel.trained`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.adapters.adapter import LoraAdapter, check_fits, linears
from llama.checkpoint.table import Spec
from llama.config import ModelArgs
from llama.errors import AdapterError, UsageError
from llama.model import Transformer
from llama.noise import GOLDEN, dropped, mix, noise_key
from llama.parallel.collectives import reduce_from_ranks
from llama.parallel.trained import Trained, own_part


class _Dropout:
    """Dropout by a counter: the same mask at every world size and in a recomputation.

    Args:
        p: probability of each feature.
        key: of this linear.
        step: number of the forward pass, an int64 scalar that all linears share.
        features: this rank's range of the whole input's features.

    Attributes:
        rows: a number per row of x, [N] int64, from which the row's mask follows, wherever in a batch the row stands;
            None numbers the rows in order.
    """

    def __init__(self, p: float, key: int, step: Tensor, features: range) -> None:
        self.p, self._key, self._step = p, key, step
        self.rows: Tensor | None = None
        self._features = torch.arange(features.start, features.stop, device=step.device)

    def __call__(self, x: Tensor) -> Tensor:
        """Zero features of x [..., F]; the others are not scaled up."""
        key, rows = mix(self._step * GOLDEN + self._key), self.rows
        if rows is None:
            rows = torch.arange(x.numel() // max(1, x.shape[-1]), device=x.device)
            key = mix(key + len(rows))  # passes of different lengths get different masks
        return x.masked_fill(dropped(key, rows, self._features, self.p).view(x.shape), 0.0)


class _LoraLinear(nn.Module):
    """A frozen linear and its update: base(x) + scaling * B A dropout(x).

    Args:
        base: the linear that is replaced, sharded and without bias; its output is not gathered.
        a, b: the whole matrices, [r, in_features] and [out_features, r], of which this rank's parts are copied.
        scaling: of the update.
        dropout: applied in training; None for none.
        device: where the update is computed, which an offloaded base's own device is not.
    """

    cut_dims: tuple[int | None, int | None]  # of A and of B

    def __init__(
        self, base: Any, a: Tensor, b: Tensor, scaling: float, dropout: _Dropout | None, device: torch.device
    ) -> None:
        super().__init__()
        self.base, self.scaling, self._dropout = base, scaling, dropout
        parts = [own_part(whole, dim, base.cuts, base.ranks) for whole, dim in zip((a, b), self.cut_dims, strict=True)]
        # Copies: the caller keeps its matrices, and a part must not keep the whole matrix in memory.
        self.a, self.b = (
            nn.Parameter(part.detach().to(device, torch.float32, copy=True).contiguous()) for part in parts
        )
        self.train(base.training)

    def trained(self, name: str) -> Iterator[Trained]:
        """Yield A and B as the trained tensors of the linear `name`."""
        for letter, parameter, dim in zip("AB", (self.a, self.b), self.cut_dims, strict=True):
            cuts = () if dim is None else self.base.cuts
            yield Trained(f"{name}.lora_{letter}", parameter, self.base.ranks, dim, cuts, partial=dim is None)

    def number_rows(self, rows: Tensor) -> None:
        """See `Lora.see`."""
        if self._dropout is not None:
            self._dropout.rows = rows

    def add_update(self, y: Tensor, x: Tensor) -> Tensor:
        """Return `y`, this rank's product of the base with x, plus the update."""
        scaling = self.scaling
        if self.training and self._dropout is not None:
            x = self._dropout(x)
            scaling /= 1 - self._dropout.p
        low = F.linear(x, self.a.to(x.dtype))  # [..., r]
        return torch.add(y, F.linear(low, self.b.to(x.dtype)), alpha=scaling)


class ColumnLora(_LoraLinear):
    """The update of a `ColumnParallelLinear`: [..., in_features] to this rank's features of the output."""

    cut_dims = (None, 0)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., len(cuts[rank])]."""
        return self.add_update(self.base(x), x)


class RowLora(_LoraLinear):
    """The update of a `RowParallelLinear`: this rank's features of the input to [..., out_features]."""

    cut_dims = (1, None)

    def forward(self, x: Tensor) -> Tensor:
        """[..., len(cuts[rank])] to [..., out_features]."""
        return reduce_from_ranks(self.add_update(self.base.partial(x), x), self.base.ranks)


class Lora:
    """The LoRA of a model, as made by `add_lora` or `load_lora`.

    Args:
        model: the model whose linears were replaced.
        modules: the replacements by name, in the model's order.
        adapter: rank, scaling and targets, without weights.
        step: the dropout counter that the modules share.
    """

    def __init__(self, model: Transformer, modules: dict[str, _LoraLinear], adapter: LoraAdapter, step: Tensor) -> None:
        self.trained = [trained for name, module in modules.items() for trained in module.trained(name)]
        self._model, self._modules, self._adapter, self._step = model, modules, adapter, step

    def begin_step(self, step: int) -> None:
        """Set the dropout seed from here on.

        Args:
            step: a different number for every forward and backward pass. It must stay until the backward is done, which
                may recompute.
        """
        self._step.fill_(step)

    @property
    def n_virtual(self) -> int:
        """Number of virtual tokens: none."""
        return 0

    def embeddings(self) -> None:
        """Return None: there are no virtual tokens."""
        return

    def begin_pass(self, step: int, micro: int) -> None:
        """Set the dropout seed for micro-batch `micro` of an optimiser step, the same in every copy of the model."""
        self.begin_step((step << 20) + micro)

    def see(self, rows: Tensor) -> None:
        """Set the keys of the next pass's rows, [N] int64: a row's dropout mask follows from its key."""
        for module in self._modules.values():
            module.number_rows(rows)

    def adapter(self, base_model: str | None = None) -> LoraAdapter:
        """Return the whole matrices on the CPU, the same on every rank; a collective call.

        Args:
            base_model: name or path of the base model; None for the name that the adapter was loaded with.
        """
        whole = [trained.whole(trained.parameter).cpu() for trained in self.trained]
        weights = dict(zip(self._modules, zip(whole[::2], whole[1::2], strict=True), strict=True))
        named = base_model or self._adapter.base_model
        return dataclasses.replace(self._adapter, weights=weights, base_model=named)

    def detach(self) -> None:
        """Put the model's own linears back; the trained matrices stay in this object."""
        for name, module in self._modules.items():
            _replace(self._model, name, module.base)


def add_lora(
    model: Transformer,
    r: int = 8,
    alpha: float = 16.0,
    targets: Iterable[str] = ("wq", "wv"),
    dropout: float = 0.0,
    use_rslora: bool = False,
    seed: int = 0,
) -> Lora:
    """Give a model a new LoRA whose update is zero at first; everything else is frozen.

    A is drawn as in PEFT, B is zero. Every rank draws whole matrices and keeps its part, so that a seed gives the same
    matrices at every world size.

    Args:
        model: this rank's shard; its linears are replaced.
        r: rank of the updates.
        alpha: numerator of their scaling.
        targets: kinds of linears, as `resolve_targets` returns them.
        dropout: probability with which a feature of x is left out while the model is in training mode.
        use_rslora: whether the scaling is alpha / sqrt(r) rather than alpha / r.
        seed: of A and of dropout.

    Raises:
        UsageError: for a value out of range, or without targets.
        AdapterError: when the model has a LoRA already.
    """
    if r < 1:
        raise UsageError(f"the rank of a LoRA must be 1 or more, is {r}")
    if not 0 < alpha < float("inf"):
        raise UsageError(f"the alpha of a LoRA must be a positive number, is {alpha}")
    if not 0 <= dropout < 1:
        raise UsageError(f"the dropout of a LoRA must be 0 or more and below 1, is {dropout}")
    wanted = linears(model.args, targets)
    if not wanted:
        raise UsageError(f"a LoRA needs linears to update: {', '.join(targets) or 'nothing'} names none")
    kinds = tuple(dict.fromkeys(name.rsplit(".", 1)[1] for name in wanted))
    frame = LoraAdapter(r, alpha, kinds, {}, dropout, use_rslora)
    return _attach(model, frame, _fresh(model.args, wanted, r, seed), seed)


def load_lora(model: Transformer, adapter: LoraAdapter, seed: int = 0) -> Lora:
    """Give a model the LoRA of an adapter, to run it or to train it further; everything else is frozen.

    Args:
        model: this rank's shard; the linears that the adapter updates are replaced.
        adapter: whole matrices; each rank keeps its part.
        seed: of dropout.

    Raises:
        AdapterError: when the adapter was made for another model, or the model has a LoRA already.
    """
    check_fits(adapter, model.args)
    pairs = ((name, adapter.weights[name]) for name in linears(model.args) if name in adapter.weights)
    return _attach(model, dataclasses.replace(adapter, weights={}), pairs, seed)


Pairs = Iterable[tuple[str, tuple[Tensor, Tensor]]]


def _fresh(args: ModelArgs, wanted: dict[str, Spec], r: int, seed: int) -> Pairs:
    """Yield whole new A and B of each linear in turn."""
    numbers = _numbers(args)
    for name, spec in wanted.items():
        generator = torch.Generator().manual_seed(noise_key(seed, numbers[name], 0))
        a = torch.empty(r, spec.shape[1])
        nn.init.kaiming_uniform_(a, a=5**0.5, generator=generator)
        yield name, (a, torch.zeros(spec.shape[0], r))


def _numbers(args: ModelArgs) -> dict[str, int]:
    """Return the number of each linear by name; it does not depend on which linears are updated."""
    return {name: number for number, name in enumerate(linears(args))}


def _attach(model: Transformer, frame: LoraAdapter, pairs: Pairs, seed: int) -> Lora:
    """Replace linears one by one, so that only one whole pair of matrices exists at a time."""
    if any(isinstance(module, _LoraLinear) for module in model.modules()):
        raise AdapterError("the model has a LoRA already: detach it before the next")
    model.requires_grad_(False)
    step = torch.zeros((), dtype=torch.int64, device=model.norm.weight.device)
    numbers, specs, modules = _numbers(model.args), linears(model.args), dict[str, _LoraLinear]()
    for name, (a, b) in pairs:
        base: Any = model.get_submodule(name)
        kind = ColumnLora if specs[name].cut_dim == 0 else RowLora
        features = base.own if kind is RowLora else range(base.in_features)
        key = noise_key(seed, numbers[name], 1)
        dropout = _Dropout(frame.dropout, key, step, features) if frame.dropout else None
        modules[name] = kind(base, a, b, frame.scaling, dropout, step.device)
        _replace(model, name, modules[name])
    return Lora(model, modules, frame, step)


def _replace(model: Transformer, name: str, module: nn.Module) -> None:
    owner, attribute = name.rsplit(".", 1)
    setattr(model.get_submodule(owner), attribute, module)
