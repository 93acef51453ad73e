"""Adapters as data: a soft prompt or LoRA matrices, whole, apart from any model and any rank."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from llama.checkpoint.table import BLOCK, TOP, Spec, specs
from llama.config import ModelArgs
from llama.errors import AdapterError, UsageError


@dataclass(frozen=True)
class PromptAdapter:
    """A soft prompt (arXiv:2104.08691).

    Args:
        prompt: the virtual tokens' embeddings, [n_virtual_tokens, dim] float32; they stand before BOS.
        init_text: the text whose embeddings the prompt was initialised from; None for another start.
        base_model: name or path of the model that the prompt was trained for.
    """

    prompt: Tensor
    init_text: str | None = None
    base_model: str | None = None


@dataclass(frozen=True)
class LoraAdapter:
    """Low-rank updates of linears (arXiv:2106.09685): W x becomes W x + scaling * B A x.

    Args:
        r: rank of the updates.
        alpha: numerator of the scaling.
        targets: kinds of linears that are updated, by Meta's names ("wq", "w2"), in the order of the layer.
        weights: A [r, in_features] and B [out_features, r], float32, by the linear's name
            ("layers.0.attention.wq"); rows of B in Meta's order.
        dropout: probability of dropping a feature of x in training.
        use_rslora: whether the scaling is alpha / sqrt(r) (arXiv:2312.03732) in place of alpha / r.
        base_model: name or path of the model that the updates were trained for.
    """

    r: int
    alpha: float
    targets: tuple[str, ...]
    weights: Mapping[str, tuple[Tensor, Tensor]] = field(repr=False)
    dropout: float = 0.0
    use_rslora: bool = False
    base_model: str | None = None

    @property
    def scaling(self) -> float:
        """The factor of B A x."""
        return self.alpha / (self.r**0.5 if self.use_rslora else self.r)


Adapter = PromptAdapter | LoraAdapter


def _kind(name: str) -> str:
    return name.split(".")[-2]


# Meta's name of every kind of linear in a layer, in the layer's order, to Hugging Face's.
TARGETS = {_kind(row.meta): _kind(row.hf) for row in BLOCK if row.is_matrix}
_TABLES = {name for row in TOP if row.is_matrix for name in (_kind(row.meta), _kind(row.hf))}
_ALL = ("all", "all-linear")


def resolve_targets(text: str) -> tuple[str, ...]:
    """Return the kinds of linears that a list such as "wq,wv" or "q_proj,v_proj" names, by Meta's names.

    Args:
        text: names separated by commas, Meta's or Hugging Face's; "all" or "all-linear" for every kind.

    Returns:
        Meta's names in the order of the layer.

    Raises:
        UsageError: for a name that no linear has, or that of the embedding or the output layer.
    """
    ours = {hf: meta for meta, hf in TARGETS.items()} | {meta: meta for meta in TARGETS}
    named: set[str] = set()
    for name in (part.strip() for part in text.split(",")):
        if name in _ALL:
            named |= set(TARGETS)
        elif name in ours:
            named.add(ours[name])
        else:
            raise UsageError(_unknown(name, [*TARGETS, *TARGETS.values(), *_ALL]))
    return tuple(kind for kind in TARGETS if kind in named)


def _unknown(name: str, known: list[str]) -> str:
    known_names = f"{', '.join(TARGETS)} ({', '.join(TARGETS.values())}), or all"
    if name in _TABLES:
        return f"LoRA is not offered for {name}, only for the layers' linears: --lora_targets takes {known_names}"
    closest = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    hint = f"; did you mean {closest[0]}?" if closest else ""
    return f"--lora_targets names {name!r}, which matches no linear: it takes {known_names}{hint}"


def linears(args: ModelArgs, targets: Iterable[str] = tuple(TARGETS)) -> dict[str, Spec]:
    """Return the layers' linears of these kinds, by name ("layers.0.attention.wq"), in the model's order."""
    kinds = set(targets)
    return {
        spec.name.removesuffix(".weight"): spec
        for spec in specs(args).values()
        if len(spec.shape) == 2 and _kind(spec.name) in kinds
    }


def check_fits(adapter: LoraAdapter, args: ModelArgs) -> None:
    """Refuse an adapter that was made for another model.

    Raises:
        AdapterError: when the adapter updates a linear that the model lacks or has in another shape.
    """
    known = linears(args)
    for name, (a, b) in adapter.weights.items():
        if name not in known:
            raise AdapterError(
                f"the adapter updates {name}, which this model of {args.n_layers} layers does not have: "
                "it was made for another model"
            )
        n_out, n_in = known[name].shape
        if tuple(a.shape) != (adapter.r, n_in) or tuple(b.shape) != (n_out, adapter.r):
            raise AdapterError(
                f"the adapter's matrices for {name} are {list(a.shape)} and {list(b.shape)}, but rank {adapter.r} on "
                f"this model takes {[adapter.r, n_in]} and {[n_out, adapter.r]}: it was made for another model"
            )
