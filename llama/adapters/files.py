"""Adapters on disk: PEFT's folders, read and written, and the files of earlier tools, read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from llama.adapters import peft_config
from llama.adapters.adapter import Adapter, LoraAdapter, PromptAdapter, linears
from llama.adapters.peft_config import CONFIG_NAME
from llama.adapters.peft_tensors import (
    PROMPT_KEY,
    Stored,
    lora_tensors,
    prompt_tensors,
    read_lora,
    read_prompt,
)
from llama.checkpoint.files import read_header
from llama.checkpoint.folders import partial_folder
from llama.config import ModelArgs
from llama.env import notice
from llama.errors import AdapterError, CheckpointError

WEIGHTS_NAME, OLDER_WEIGHTS_NAME = "adapter_model.safetensors", "adapter_model.bin"
# The only tensor of a prefix.N.pth: the state of the nn.Embedding that was trained.
EMBEDDING_KEY = "embedding.weight"
# Where a new adapter stands until it has been read back.
_NEW = "adapter.new"


def read_adapter(path: str | Path, args: ModelArgs) -> Adapter:
    """Read an adapter for a model of this geometry.

    Args:
        path: PEFT's folder (`adapter_config.json` with `adapter_model.safetensors`, or the older `.bin` in either of
            torch's formats) or a file in that folder; if the weights file named is missing, the other one of the two
            is read. Or a soft prompt's file alone: PEFT's, or a `prefix.N.pth`.
        args: geometry of the model.

    Raises:
        AdapterError: when the adapter is missing, damaged, holds code, needs a computation that is not supported, or
            belongs to another model.
    """
    path = Path(path)
    with _told_of_adapters():
        file = _weights_file(path)
        config_path = file.with_name(CONFIG_NAME)
        if path.is_dir() and not config_path.exists():
            raise AdapterError(f"{path} lacks {CONFIG_NAME}: copy it from where the adapter came from")
        stored = read_header(file)
        if not stored:
            raise AdapterError(f"{file} holds no tensors: what was trained was not saved in it; ask for another copy")
        if set(stored) == {EMBEDDING_KEY}:
            return PromptAdapter(read_prompt(file, stored, EMBEDDING_KEY, args))
        if config_path.exists():
            return _read_peft(file, stored, config_path, args)
        if set(stored) == {PROMPT_KEY}:
            return PromptAdapter(read_prompt(file, stored, PROMPT_KEY, args))
        raise AdapterError(
            f"{file} is no soft prompt, and there is no {CONFIG_NAME} beside it that says what it is: copy that from "
            "where the adapter came from"
        )


def write_adapter(folder: Path, adapter: Adapter, args: ModelArgs, base_name: str | None = None) -> None:
    """Write an adapter as PEFT does, read the files back, and only then replace an earlier adapter with them.

    Args:
        folder: where to write; made if it is missing. Its other files stay, except an older `adapter_model.bin`.
        adapter: the whole adapter.
        args: geometry of the base model.
        base_name: name or path of the base model, if another than the adapter's `base_model`.

    Raises:
        AdapterError: when the files cannot be written, or are not read back bit for bit (NaN and infinity are not);
            an adapter that was there before stays as it was.
    """
    folder = Path(folder)
    adapter = replace(adapter, base_model=base_name or adapter.base_model)
    if isinstance(adapter, PromptAdapter):
        config, tensors = _prompt_config(adapter, args), prompt_tensors(adapter)
    else:
        config, tensors = _lora_config(adapter, args), lora_tensors(adapter, args)
    with _told_of_adapters():
        with partial_folder(folder / _NEW) as partial:
            _write(partial / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True).encode())
            _write(partial / WEIGHTS_NAME, save(tensors, metadata={"format": "pt"}))
            if not _is_same(adapter, read_adapter(partial, args)):
                raise AdapterError(f"{folder}: the adapter was not read back as it was written: is the disk sound?")
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            (folder / _NEW / name).replace(folder / name)
        (folder / _NEW).rmdir()
        (folder / OLDER_WEIGHTS_NAME).unlink(missing_ok=True)
        _sync(folder)


@contextmanager
def _told_of_adapters() -> Iterator[None]:
    """Turn errors of the checkpoint's readers and writers, and of the system, into an `AdapterError`."""
    try:
        yield
    except CheckpointError as error:
        raise AdapterError(str(error)) from None
    except OSError as error:
        raise AdapterError(f"cannot use {error.filename}: {error.strerror}") from None


# -- reading ---------------------------------------------------------------------------------------


def _weights_file(path: Path) -> Path:
    """Return the file with the tensors of the adapter at `path`."""
    names = (WEIGHTS_NAME, OLDER_WEIGHTS_NAME)
    folder = path.parent if path.name == CONFIG_NAME and path.is_file() else path
    if folder.is_dir():
        for name in names:
            if (folder / name).is_file():
                return folder / name
        raise AdapterError(f"{folder} holds no adapter: expected {CONFIG_NAME} with {' or '.join(names)}")
    if path.is_file():
        return path
    for name in names:
        if path.name in names and (path.parent / name).is_file():
            notice(f"{path} is not there: {name} beside it is taken")
            return path.parent / name
    raise AdapterError(f"no adapter at {path}: there is no such file or folder")


def _read_peft(file: Path, stored: Stored, config_path: Path, args: ModelArgs) -> Adapter:
    config = peft_config.read_config(config_path)
    base = peft_config.text(config, "base_model_name_or_path")
    if config["peft_type"] == peft_config.LORA:
        return replace(read_lora(file, stored, config_path, config, args), base_model=base)
    announced = peft_config.count(config_path, config, "num_virtual_tokens")
    prompt = read_prompt(file, stored, PROMPT_KEY, args)
    peft_config.check_base(config_path, config, args)
    if len(prompt) != announced:
        raise AdapterError(
            f"{file}: {PROMPT_KEY} has {len(prompt)} virtual tokens, num_virtual_tokens in {CONFIG_NAME} is {announced}"
        )
    return PromptAdapter(prompt, peft_config.text(config, "prompt_tuning_init_text"), base)


# -- writing ---------------------------------------------------------------------------------------


def _prompt_config(adapter: PromptAdapter, args: ModelArgs) -> dict[str, Any]:
    return {
        **_common_config(peft_config.PROMPT_TUNING, adapter),
        "num_virtual_tokens": len(adapter.prompt),
        "token_dim": args.dim,
        "num_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_transformer_submodules": 1,
        # With "TEXT" PEFT asks for a tokenizer, which a trained prompt does not need; the text may be kept.
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": adapter.init_text,
        "tokenizer_name_or_path": None,
    }


def _lora_config(adapter: LoraAdapter, args: ModelArgs) -> dict[str, Any]:
    return {
        **_common_config(peft_config.LORA, adapter),
        "r": adapter.r,
        "lora_alpha": int(adapter.alpha) if float(adapter.alpha).is_integer() else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.use_rslora,
        "target_modules": _target_modules(adapter, args),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _common_config(kind: str, adapter: Adapter) -> dict[str, Any]:
    return {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "revision": None,
        "inference_mode": True,
    }


def _target_modules(adapter: LoraAdapter, args: ModelArgs) -> list[str]:
    """Return the kinds of linears that are updated, if in every layer; otherwise every module by its whole name."""
    table = linears(args)
    modules = [peft_config.module_of(spec) for name, spec in table.items() if name in adapter.weights]
    kinds = list(dict.fromkeys(module.rpartition(".")[2] for module in modules))
    return kinds if len(modules) == len(kinds) * args.n_layers else modules


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the renames survive a power failure, on file systems that can promise it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_same(written: Adapter, found: Adapter) -> bool:
    """Return whether an adapter was read back as it was written, bit for bit; files hold float32."""
    if isinstance(written, PromptAdapter):
        return isinstance(found, PromptAdapter) and (
            written.init_text == found.init_text and _is_equal(written.prompt, found.prompt)
        )
    return (
        isinstance(found, LoraAdapter)
        and (written.r, written.alpha, written.dropout) == (found.r, found.alpha, found.dropout)
        and written.use_rslora == found.use_rslora
        and written.weights.keys() == found.weights.keys()
        and all(
            _is_equal(before, after)
            for name, halves in written.weights.items()
            for before, after in zip(halves, found.weights[name], strict=True)
        )
    )


def _is_equal(written: Tensor, found: Tensor) -> bool:
    return torch.equal(written.detach().to("cpu", torch.float32), found)
