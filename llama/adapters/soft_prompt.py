"""Adapters at generation: checked against the model, a soft prompt run once as the prefix of every text."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llama.adapters.adapter import Adapter, LoraAdapter, PromptAdapter, check_fits
from llama.adapters.files import read_adapter
from llama.cache import KVCache
from llama.config import ModelArgs
from llama.errors import AdapterError
from llama.model import Transformer


def fitting_adapter(adapter: str | Path | Adapter | None, args: ModelArgs) -> Adapter | None:
    """Return an adapter that fits the model, read from its files where a path is given.

    Raises:
        AdapterError: when the adapter is missing, damaged or of another model.
    """
    if isinstance(adapter, str | Path):
        return read_adapter(adapter, args)
    if isinstance(adapter, LoraAdapter):
        check_fits(adapter, args)
    if isinstance(adapter, PromptAdapter) and (adapter.prompt.dim() != 2 or adapter.prompt.shape[1] != args.dim):
        raise AdapterError(
            f"the soft prompt is {list(adapter.prompt.shape)}, the model's embeddings are {args.dim} wide: "
            "it was trained for another model"
        )
    return adapter


def n_virtual_tokens(adapter: Adapter | None) -> int:
    """Return the number of positions that an adapter puts before every text."""
    return adapter.prompt.shape[0] if isinstance(adapter, PromptAdapter) else 0


@torch.inference_mode()
def prefix_of(model: Transformer, prompt: Tensor) -> KVCache:
    """Compute the keys and values of embeddings [P, dim] at positions 0 to P - 1: a full cache of one slot.

    A collective call. Keys and values have the model's dtype, as in PEFT, and are the same for every text.
    """
    weight = model.norm.weight
    embeddings = prompt.to(device=weight.device, dtype=weight.dtype).unsqueeze(0)
    prefix = model.new_cache(1, embeddings.shape[1])
    model.hidden(embeddings=embeddings, cache=prefix.view(fresh=True))
    return prefix


def describe_adapter(adapter: Adapter | None) -> str:
    """Return the end of the line that says what was loaded: ", with a soft prompt of 32 tokens"; empty for None."""
    if isinstance(adapter, PromptAdapter):
        n_tokens = n_virtual_tokens(adapter)
        return f", with a soft prompt of {n_tokens} token{'' if n_tokens == 1 else 's'}"
    if isinstance(adapter, LoraAdapter):
        return f", with LoRA r {adapter.r} on {', '.join(adapter.targets)}"
    return ""
