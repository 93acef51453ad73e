"""PEFT's `adapter_config.json`: the fields that are read, those that may hold anything, and those that are refused.

Fields are those of peft 0.21 (src/peft/tuners/{prompt_tuning,lora}/config.py) and of earlier versions. A field that is
not listed here is refused as soon as it holds anything, so that no option of a later PEFT is silently ignored.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from llama.checkpoint.table import Spec
from llama.config import ModelArgs, read_json
from llama.errors import AdapterError

CONFIG_NAME = "adapter_config.json"
PROMPT_TUNING, LORA = "PROMPT_TUNING", "LORA"

_REQUIRED = {PROMPT_TUNING: ("num_virtual_tokens",), LORA: ("r", "lora_alpha")}
_HARMLESS = frozenset(
    {
        "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "runtime_config",
    }
)  # fmt: skip
_FREE = {
    # A trained prompt's initialisation does not matter: "TEXT" without a tokenizer loads here, not in PEFT.
    PROMPT_TUNING: _HARMLESS
    | {
        "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers",
        "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    },
    LORA: _HARMLESS
    | {
        "r", "lora_alpha", "lora_dropout", "use_rslora",
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        # Initialisation or the backward pass alone; an initialisation that changes the base shows in init_lora_weights.
        "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "merge_weights",
        # Linears that a Llama does not have, QALoRA, and tied layers, on which no LoRA is loaded.
        "megatron_core", "qalora_group_size", "ensure_weight_tying",
    },
}  # fmt: skip
# Fields that are accepted at these values besides empty ones. PiSSA, CorDA, OLoRA, LoftQ and LoRA-GA change the base
# at initialisation; the initialisations listed here leave the base as it is.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_transformer_submodules": (1,),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal", "mica"),
}
_WAY_OUT = {
    PROMPT_TUNING: "train the prompt without it",
    LORA: "train without it, or let PEFT merge the adapter into its base (merge_and_unload) and load that",
}
_OUTSIDE_LAYERS = ("model.embed_tokens", "lm_head")


def read_config(path: Path) -> Mapping[str, Any]:
    """Return the content of an `adapter_config.json` whose adapter can be loaded.

    Raises:
        AdapterError: for another kind of adapter, a missing field, and a field that changes the computation, named
            with its value.
        CheckpointError: when the file cannot be read or is no JSON.
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise AdapterError(f"{path} must hold an object, found {type(config).__name__}")
    kind = config.get("peft_type")
    if kind not in (PROMPT_TUNING, LORA):
        raise AdapterError(f"{path}: adapters of peft_type {kind!r} are not loaded, only {PROMPT_TUNING} and {LORA}")
    missing = [field for field in _REQUIRED[kind] if config.get(field) is None]
    if missing:
        raise AdapterError(f"{path} lacks {', '.join(missing)}: copy it again from where the adapter came from")
    refused = [
        f"{field} = {reprlib.repr(value)}"
        for field, value in config.items()
        if field not in _FREE[kind] and value and value not in _NEUTRAL.get(field, ())
    ]
    if refused:
        raise AdapterError(
            f"{path}: {', '.join(refused)} changes the computation and is not supported; {_WAY_OUT[kind]}"
        )
    return config


def text(config: Mapping[str, Any], field: str) -> str | None:
    """Return a field that is only passed on; None unless its value is a text."""
    value = config.get(field)
    return value if isinstance(value, str) and value else None


def count(path: Path, config: Mapping[str, Any], field: str) -> int:
    """Return a field that must be a positive integer."""
    value = config[field]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdapterError(f"{path}: {field} must be a positive integer, found {value!r}")
    return value


def number(path: Path, config: Mapping[str, Any], field: str, default: float = 0.0) -> float:
    """Return a field that must be a finite number."""
    value = config.get(field)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise AdapterError(f"{path}: {field} must be a number, found {value!r}")
    return value


def truth(path: Path, config: Mapping[str, Any], field: str) -> bool:
    """Return a field that must be true or false; False where the field is missing."""
    value = config.get(field)
    if value not in (None, True, False):
        raise AdapterError(f"{path}: {field} must be true or false, found {value!r}")
    return bool(value)


def check_base(path: Path, config: Mapping[str, Any], args: ModelArgs) -> None:
    """Check that a prompt's base has the model's layers and heads, as far as the file says.

    Raises:
        AdapterError: naming both numbers.
    """
    for field, size in (("num_layers", args.n_layers), ("num_attention_heads", args.n_heads)):
        if config.get(field) not in (None, size):
            raise AdapterError(
                f"{path}: {field} is {config[field]!r}, the model has {size}: it was trained for another model"
            )


def targeted(path: Path, config: Mapping[str, Any], linears: Collection[Spec]) -> set[str] | None:
    """Return Hugging Face's names of the linears that `target_modules` updates; None where the field is missing.

    A list holds the ends of module names; a text is a regular expression for whole names, or "all-linear".

    Raises:
        AdapterError: when the field cannot be read, or also targets the embedding or the output layer.
    """
    targets = config.get("target_modules")
    if targets is None:
        return None
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = [module_of(spec) for spec in linears]
    excluded, layers = config.get("exclude_modules") or [], config.get("layers_to_transform")
    modules = [*map(module_of, linears), *_OUTSIDE_LAYERS]
    found = {
        module
        for module in modules
        if _matches(path, "target_modules", targets, module)
        and not _matches(path, "exclude_modules", excluded, module)
        and _in_layers(layers, module)
    }
    outside = found & set(_OUTSIDE_LAYERS)
    if outside:
        raise AdapterError(
            f"{path}: target_modules has {', '.join(sorted(outside))}, but LoRA is taken on the linears of the layers "
            f"alone; {_WAY_OUT[LORA]}"
        )
    return found


def module_of(spec: Spec) -> str:
    """Return Hugging Face's name of a linear's module."""
    return spec.hf_name.removesuffix(".weight")


def _matches(path: Path, field: str, pattern: Any, module: str) -> bool:
    if isinstance(pattern, str):
        try:
            return re.fullmatch(pattern, module) is not None
        except re.error as error:
            raise AdapterError(f"{path}: {field} is no regular expression: {error}") from None
    if not isinstance(pattern, list) or not all(isinstance(name, str) for name in pattern):
        raise AdapterError(f"{path}: {field} must be a text or a list of texts, found {reprlib.repr(pattern)}")
    return any(module == name or module.endswith(f".{name}") for name in pattern)


def _in_layers(layers: Any, module: str) -> bool:
    """Return whether `layers_to_transform` (one layer, or a list; None and [] mean all) covers a module."""
    if layers is None or layers == []:
        return True
    match = re.search(r"\.layers\.(\d+)\.", module)
    return match is not None and int(match[1]) in (layers if isinstance(layers, list) else [layers])
