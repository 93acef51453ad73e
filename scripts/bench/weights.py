"""Weights that several engines can read, as safetensors: random ones of a geometry, or a checkpoint's."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Container, Iterator
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint.hf_config import hf_config
from llama.checkpoint.hf_weights import Rows, tensor_bytes, write_weights
from llama.checkpoint.layout import Spec, specs
from llama.config import ModelArgs
from llama.errors import LlamaError

PIECE_ELEMENTS = 16 << 20


def random_rows(seed: int) -> Rows:
    """Normal values of a size that keeps activations near 1, the same for a seed whatever the dtype."""
    generator = torch.Generator().manual_seed(seed)

    def rows(spec: Spec) -> Iterator[Tensor]:
        if len(spec.shape) == 1:
            yield torch.ones(spec.shape)
            return
        n_rows, n_columns = spec.shape
        run = max(1, PIECE_ELEMENTS // n_columns)
        for first in range(0, n_rows, run):
            yield torch.randn(min(run, n_rows - first), n_columns, generator=generator) * n_columns**-0.5

    return rows


def write_hf(
    folder: Path, args: ModelArgs, dtype: torch.dtype, rows: Rows, names: Container[str] | None = None
) -> Path:
    """Write `config.json` and `model.safetensors` of a whole model; returns the folder.

    Args:
        folder: where; made when missing.
        args: the geometry.
        dtype: what is stored.
        rows: gives the values of each tensor, in Hugging Face's row order.
        names: Meta's names of the tensors to write; None for all, without a tied output layer.

    Raises:
        LlamaError: when the disk has too little room, with both numbers.
    """
    if names is None:
        names = set(specs(args)) - ({"output.weight"} if args.tied else set())
    stored = [(spec, dtype) for spec in specs(args).values() if spec.name in names]
    n_bytes = sum(tensor_bytes(spec, dtype) for spec, _ in stored)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise LlamaError(
            f"the weights take {n_bytes / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free: "
            "name a folder on a larger disk with --keep_dir, or take a smaller --geometry"
        )
    (folder / "config.json").write_text(json.dumps(hf_config(args, dtype), indent=2) + "\n")
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        for name in write_weights(Path(unfinished), stored, rows):
            (Path(unfinished) / name).replace(folder / name)
    return folder
