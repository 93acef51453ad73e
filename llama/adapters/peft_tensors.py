"""Tensors of an adapter's file, checked: PEFT's names and row order in the file, Meta's in memory, float32."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.adapters.adapter import LoraAdapter, PromptAdapter, linears
from llama.adapters.peft_config import count, module_of, number, targeted, truth
from llama.checkpoint.files import StoredTensor
from llama.checkpoint.rows import to_hf_order, to_meta_order
from llama.checkpoint.source import MOST_NAMED
from llama.checkpoint.table import Spec
from llama.config import ModelArgs
from llama.errors import AdapterError

PROMPT_KEY = "prompt_embeddings"
# "base_model.model." + Hugging Face's module + side; a model's own state dict has the adapter's name before "weight".
_LORA_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
OTHER_MODEL = "it was trained for another model"

Stored = Mapping[str, StoredTensor]


# -- soft prompts ----------------------------------------------------------------------------------


def read_prompt(file: Path, stored: Stored, key: str, args: ModelArgs) -> Tensor:
    """Read the soft prompt under `key`, the only tensor of the file: [n_virtual_tokens, dim] float32.

    Raises:
        AdapterError: for other tensors, another width than the model's, and values that are NaN or infinite.
    """
    _refuse_unknown(file, [name for name in stored if name != key])
    if key not in stored:
        raise AdapterError(f"{file} lacks {key}: it is no soft prompt")
    shape = stored[key].shape
    if len(shape) != 2 or not shape[0]:
        raise AdapterError(f"{file}: {key} is {list(shape)}, expected [virtual tokens, {args.dim}]")
    if shape[1] != args.dim:
        raise AdapterError(f"{file}: {key}: the adapter has {shape[1]} features, the model {args.dim}: {OTHER_MODEL}")
    return _read(file, key, stored[key])


def prompt_tensors(adapter: PromptAdapter) -> dict[str, Tensor]:
    """Return a soft prompt under PEFT's name."""
    return {PROMPT_KEY: _plain(adapter.prompt)}


# -- LoRA ------------------------------------------------------------------------------------------


def read_lora(file: Path, stored: Stored, config_path: Path, config: Mapping[str, Any], args: ModelArgs) -> LoraAdapter:
    """Read the LoRA matrices that a file holds and its `adapter_config.json` announces.

    Raises:
        AdapterError: for tensors that the model has no place for, an A without its B or a B without its A, updates
            that only one of configuration and file has, another rank or width, and values that are NaN or infinite.
    """
    r = count(config_path, config, "r")
    keys = _lora_keys(file, stored, args)
    table = {name: spec for name, spec in linears(args).items() if spec.name in keys}
    _check_announced(file, table, targeted(config_path, config, linears(args).values()), args.n_layers)
    dropout = number(config_path, config, "lora_dropout")
    if not 0 <= dropout < 1:
        raise AdapterError(f"{config_path}: lora_dropout must be at least 0 and less than 1, found {dropout}")
    return LoraAdapter(
        r=r,
        alpha=number(config_path, config, "lora_alpha"),
        targets=tuple(dict.fromkeys(name.rpartition(".")[2] for name in table)),
        weights={name: _read_pair(file, stored, keys[spec.name], r, spec, args) for name, spec in table.items()},
        dropout=dropout,
        use_rslora=truth(config_path, config, "use_rslora"),
    )


def lora_tensors(adapter: LoraAdapter, args: ModelArgs) -> dict[str, Tensor]:
    """Return LoRA matrices by PEFT's names, B of `wq` and `wk` in Hugging Face's row order.

    Raises:
        AdapterError: when the model has no such linear.
    """
    table, tensors = linears(args), {}
    for name, (a, b) in adapter.weights.items():
        if name not in table:
            raise AdapterError(f"the model of {args.n_layers} layers has no linear {name}")
        module = f"base_model.model.{module_of(table[name])}"
        tensors[f"{module}.lora_A.weight"] = _plain(a)
        tensors[f"{module}.lora_B.weight"] = _plain(to_hf_order(b, args.head_dim) if table[name].permuted else b)
    return tensors


def _lora_keys(file: Path, stored: Stored, args: ModelArgs) -> dict[str, dict[str, str]]:
    """Return the file's name of each half ("A", "B") of every update, by Meta's name of the weight."""
    modules = {module_of(spec): spec.name for spec in linears(args).values()}
    found: dict[str, dict[str, str]] = {}
    unknown = []
    for key in stored:
        match = _LORA_KEY.fullmatch(key)
        if match is None or match["module"] not in modules:
            _check_layer(file, key, args)
            unknown.append(key)
            continue
        halves = found.setdefault(modules[match["module"]], {})
        if match["side"] in halves:
            raise AdapterError(f"{file} holds several adapters: {halves[match['side']]} and {key}")
        halves[match["side"]] = key
    _refuse_unknown(file, unknown)
    for halves in found.values():
        if len(halves) == 1:
            side, key = next(iter(halves.items()))
            raise AdapterError(f"{file}: {key} is there without its lora_{'B' if side == 'A' else 'A'}")
    return found


def _check_layer(file: Path, key: str, args: ModelArgs) -> None:
    layer = _layer(key)
    if layer >= args.n_layers:
        raise AdapterError(
            f"{file}: {key} belongs to layer {layer}, the model has {args.n_layers} layers (from 0): {OTHER_MODEL}"
        )


def _layer(name: str) -> int:
    """Return the layer number in a name, or -1."""
    match = re.search(r"\.layers\.(\d+)\.", name)
    return -1 if match is None else int(match[1])


def _check_announced(file: Path, found: Mapping[str, Spec], announced: set[str] | None, n_layers: int) -> None:
    if announced is None:
        return
    modules = {module_of(spec) for spec in found.values()}
    missing, strange = sorted(announced - modules), sorted(modules - announced)
    last = max(map(_layer, modules))
    if missing and all(_layer(module) > last for module in missing):
        raise AdapterError(f"{file} ends with layer {last}, the model has {n_layers} layers (from 0): {OTHER_MODEL}")
    for names, what in (
        (missing, "lacks the updates of {}, which target_modules in adapter_config.json announces"),
        (strange, "has updates of {}, which target_modules in adapter_config.json does not announce"),
    ):
        if names:
            raise AdapterError(f"{file} {what.format(_list(names))}: copy both files again from where they came from")


def _read_pair(
    file: Path, stored: Stored, keys: Mapping[str, str], r: int, spec: Spec, args: ModelArgs
) -> tuple[Tensor, Tensor]:
    out_features, in_features = spec.shape
    a, b = stored[keys["A"]], stored[keys["B"]]
    _check_half(file, keys["A"], a.shape, (r, in_features), 0)
    _check_half(file, keys["B"], b.shape, (out_features, r), 1)
    rows = _read(file, keys["B"], b)
    return _read(file, keys["A"], a), to_meta_order(rows, args.head_dim) if spec.permuted else rows


def _check_half(file: Path, key: str, shape: tuple[int, ...], expected: tuple[int, int], rank_dim: int) -> None:
    if len(shape) != 2:
        raise AdapterError(f"{file}: {key} is {list(shape)}, expected {list(expected)}: it was not saved whole")
    if shape[rank_dim] != expected[rank_dim]:
        raise AdapterError(
            f"{file}: {key} has rank {shape[rank_dim]}, adapter_config.json says r = {expected[rank_dim]}"
        )
    width, wanted = shape[1 - rank_dim], expected[1 - rank_dim]
    if width != wanted:
        raise AdapterError(f"{file}: {key}: the adapter has {width} features, the model {wanted}: {OTHER_MODEL}")


# -- what both share -------------------------------------------------------------------------------


def _refuse_unknown(file: Path, names: list[str]) -> None:
    if names:
        raise AdapterError(f"{file} holds tensors that no adapter of this model has: {_list(names)}")


def _list(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


@torch.no_grad()  # a file may hold parameters, which ask for gradients
def _read(file: Path, key: str, stored: StoredTensor) -> Tensor:
    """Read one whole tensor as float32."""
    values = torch.empty(stored.shape, dtype=torch.float32)
    for dim, start, piece in stored.pieces(tuple(slice(0, size) for size in stored.shape)):
        values.narrow(dim, start, piece.shape[dim]).copy_(piece)
    wrong = int((~values.isfinite()).sum())
    if wrong:
        raise AdapterError(
            f"{file}: {key} has {wrong} values of {values.numel()} that are NaN or infinite: the training "
            "diverged; take an earlier checkpoint of its run"
        )
    return values


def _plain(values: Tensor) -> Tensor:
    """Return a contiguous float32 copy that shares no memory, as safetensors asks for."""
    return values.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)
