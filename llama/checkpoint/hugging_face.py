"""Hugging Face's folder as a target layout: safetensors, in one file or in several under an index, and JSON files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.params import context_length, generation_config, hf_config
from llama.checkpoint.save import Entry, Files, TargetLayout, total_bytes
from llama.checkpoint.source import Checkpoint
from llama.checkpoint.table import Spec
from llama.checkpoint.tokenizer_files import read_tokenizer, write_hf_tokenizers
from llama.config import ModelArgs, read_json
from llama.quantization.scheme import OUTPUT
from llama.tokenizer import Tokenizer

STEM = "model"
AFTER_LAYERS = ("norm.weight", OUTPUT)


def hugging_face(
    checkpoint: Checkpoint, dtype: torch.dtype | None, max_bytes: int, tokenizer_path: Path | None
) -> TargetLayout:
    """The layout; a tied output layer is stored once.

    Args:
        checkpoint: of numbers.
        dtype: what to convert to; None keeps each tensor's own.
        max_bytes: of one file.
        tokenizer_path: None for what lies beside the weights or one folder up.

    Raises:
        TokenizerError: when a tokenizer was named and is none, or belongs to a larger model.
    """
    found = read_tokenizer(checkpoint, tokenizer_path)
    tokenizer = found[1] if found else None
    # Meta's files hold a tied output layer twice and do not say so: equality does.
    args = checkpoint.held_args(unsaid=checkpoint.format != "hf")
    tensors = [tensor for name, tensor in checkpoint.tensors.items() if not (args.tied and name == OUTPUT)]
    # As transformers has them: what follows the layers comes after them, so that files hold neighbours.
    tensors.sort(key=lambda tensor: tensor.spec.name in AFTER_LAYERS)
    files = hf_files(((tensor.spec, dtype or tensor.dtype) for tensor in tensors), max_bytes)

    def write_beside(folder: Path) -> None:
        write_hf_tokenizers(checkpoint.path, tokenizer_path, found, folder)
        write_index(folder, files)
        _write_generation_config(folder, tokenizer)

    config = _config(checkpoint, args, dtype, tokenizer)
    return TargetLayout(
        "converting", files, {"layout": "hf"}, config, "config.json", write_beside, indent=2, rotate_half=True
    )


def hf_files(stored: Iterable[tuple[Spec, torch.dtype]], max_bytes: int | None = None) -> Files:
    """`model.safetensors`, or `model-00001-of-0000N.safetensors` and so on.

    Args:
        stored: the tensors in order, with the dtype to store.
        max_bytes: a file holds no more, but for a tensor that is larger; None for one file.
    """
    groups: list[list[Entry]] = [[]]
    size = 0
    for spec, dtype in stored:
        entry = Entry(spec.hf_name, spec.name, spec.whole, dtype)
        if max_bytes is not None and groups[-1] and size + entry.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    if len(groups) == 1:
        return {f"{STEM}.safetensors": groups[0]}
    return {f"{STEM}-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, 1)}


def write_index(folder: Path, files: Files) -> None:
    """Write which of several files holds which tensor; one file needs no index."""
    if len(files) > 1:
        weight_map = {entry.name: file for file, entries in files.items() for entry in entries}
        content = {"metadata": {"total_size": total_bytes(files)}, "weight_map": weight_map}
        _write_json(folder / f"{STEM}.safetensors.index.json", content)


def _config(
    checkpoint: Checkpoint, args: ModelArgs, dtype: torch.dtype | None, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Return the content of `config.json`; the context length of a source that states one is kept."""
    bos, stops = (None, ()) if tokenizer is None else (tokenizer.bos_id, tokenizer.stop_tokens)
    return hf_config(args, dtype or checkpoint.dtype, bos, stops, context_length(checkpoint))


def _write_generation_config(folder: Path, tokenizer: Tokenizer | None) -> None:
    """Stop tokens, and whatever else the source's own file says."""
    path = folder / "generation_config.json"
    ids = {} if tokenizer is None else generation_config(tokenizer.bos_id, tokenizer.stop_tokens)
    kept = read_json(path) if path.exists() else {}
    _write_json(path, {**(kept if isinstance(kept, dict) else {}), **ids})


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
