"""Which linears a LoRA updates: their names in both worlds, and whether an adapter belongs to a model."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from llama.checkpoint.layout import BLOCK, TOP, Spec, specs
from llama.config import ModelArgs
from llama.errors import AdapterError, UsageError
from llama.finetuning.adapters import LoraAdapter


def _kind(name: str) -> str:
    return name.split(".")[-2]


# Meta's name of every kind of linear in a layer, in the layer's order, to Hugging Face's.
TARGETS = {_kind(row.meta): _kind(row.hf) for row in BLOCK if len(row.axes) == 2}
_TABLES = {name for row in TOP if len(row.axes) == 2 for name in (_kind(row.meta), _kind(row.hf))}
_ALL = ("all", "all-linear")


def resolve_targets(text: str) -> tuple[str, ...]:
    """The kinds of linears that a list such as "wq,wv" or "q_proj,v_proj" names, by Meta's names.

    Args:
        text: names separated by commas, Meta's or Hugging Face's; "all" or "all-linear" for every kind.

    Returns:
        Meta's names in the order of the layer.

    Raises:
        UsageError: for a name that is no linear's, or one that LoRA is not offered for.
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
    """The layers' linears of some kinds, by name ("layers.0.attention.wq"), in the model's order."""
    kinds = set(targets)
    return {
        spec.name.removesuffix(".weight"): spec
        for spec in specs(args).values()
        if len(spec.shape) == 2 and _kind(spec.name) in kinds
    }


def check_fits(adapter: LoraAdapter, args: ModelArgs) -> None:
    """Refuse an adapter that was made for another model.

    Raises:
        AdapterError: when it updates a linear that the model lacks or has in another shape.
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
