"""Weights that several engines can read: Hugging Face safetensors written piece by piece.

Either random ones of a geometry, or a checkpoint in Meta's layout under Hugging Face's names and row order. At no
time is more than one piece in memory, so a model larger than memory can be written.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoint.layout import Spec, specs
from llama.checkpoint.source import Checkpoint
from llama.config import ModelArgs
from llama.errors import LlamaError

PIECE_ELEMENTS = 16 << 20
SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

# The rows of one tensor in order, in pieces.
Fill = Callable[[Spec], Iterator[Tensor]]


def random_fill(seed: int) -> Fill:
    """Normal values of a size that keeps activations near 1, the same for a seed whatever the dtype."""
    generator = torch.Generator().manual_seed(seed)

    def fill(spec: Spec) -> Iterator[Tensor]:
        if len(spec.shape) == 1:
            yield torch.ones(spec.shape)
            return
        n_rows, n_columns = spec.shape
        for first, last in _row_runs(n_rows, n_columns, 1):
            yield torch.randn(last - first, n_columns, generator=generator) * n_columns**-0.5

    return fill


def checkpoint_fill(checkpoint: Checkpoint) -> Fill:
    """The values of an open checkpoint, in Hugging Face's row order."""
    head_dim = checkpoint.args.head_dim

    def fill(spec: Spec) -> Iterator[Tensor]:
        rest = tuple(slice(0, size) for size in spec.shape[1:])
        for first, last in _row_runs(spec.shape[0], math.prod(spec.shape[1:]), head_dim):
            tensor = checkpoint.tensors[spec.name]
            piece = torch.empty(last - first, *spec.shape[1:], dtype=tensor.dtype)
            tensor.read_into((slice(first, last), *rest), piece)
            yield to_hf_order(piece, head_dim) if spec.permuted else piece

    return fill


def to_hf_order(rows: Tensor, head_dim: int) -> Tensor:
    """Whole heads of `wq` or `wk`, [heads * D, E], from Meta's [heads, D/2, 2] rows to [heads, 2, D/2]."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _row_runs(n_rows: int, n_columns: int, multiple: int) -> Iterator[tuple[int, int]]:
    """Runs of rows of about `PIECE_ELEMENTS`, each but the last a multiple of so many rows."""
    run = max(multiple, PIECE_ELEMENTS // n_columns // multiple * multiple)
    for first in range(0, n_rows, run):
        yield first, min(first + run, n_rows)


def write_hf(
    folder: Path, args: ModelArgs, dtype: torch.dtype, fill: Fill, names: Container[str] | None = None
) -> Path:
    """Write `config.json` and `model.safetensors` of a whole model; returns the folder.

    Args:
        folder: where; made when missing.
        args: the geometry.
        dtype: what is stored.
        fill: gives the rows of each tensor.
        names: Meta's names of the tensors to write; None for all, without a tied output layer.

    Raises:
        LlamaError: when the disk has too little room, with both numbers.
    """
    if names is None:
        names = set(specs(args)) - ({"output.weight"} if args.tied else set())
    stored = [spec for spec in specs(args).values() if spec.name in names]
    header, n_bytes = _header(stored, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise LlamaError(
            f"the weights take {n_bytes / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free: "
            "name a folder on a larger disk with --keep_dir, or take a smaller --geometry"
        )
    (folder / "config.json").write_text(json.dumps(hf_config(args, dtype), indent=2) + "\n")
    partial = folder / "model.safetensors.partial"
    with partial.open("wb") as file:
        file.write(header)
        for spec in stored:
            for piece in fill(spec):
                values = piece.to(dtype).contiguous()
                file.write(values.flatten().view(torch.uint8).numpy().data)
    partial.replace(folder / "model.safetensors")
    return folder


def _header(stored: list[Spec], dtype: torch.dtype) -> tuple[bytes, int]:
    """The safetensors header of these tensors laid end to end, and the size of the file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in stored:
        begin, end = end, end + math.prod(spec.shape) * dtype.itemsize
        entries[spec.hf_name] = {
            "dtype": SAFETENSORS_NAMES[dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, 8 + len(text) + end


def hf_config(args: ModelArgs, dtype: torch.dtype) -> dict[str, Any]:
    """The content of `config.json`, in transformers 5's spelling."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "intermediate_size": args.ffn_dim,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "max_position_embeddings": 131072,
        "rope_parameters": _rope_parameters(args),
        "tie_word_embeddings": args.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _rope_parameters(args: ModelArgs) -> dict[str, Any]:
    scaling = args.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": args.rope_theta}
    parameters = {"rope_type": scaling.kind, "rope_theta": args.rope_theta, "factor": scaling.factor}
    if scaling.kind == "llama3":
        parameters |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    return parameters
