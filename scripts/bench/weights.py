"""Weights for several engines, as safetensors: random ones of a geometry, or those of a checkpoint."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from llama.checkpoint.hugging_face import hf_files
from llama.checkpoint.params import hf_config
from llama.checkpoint.save import Chunk, Files, read_rows, total_bytes, write_files
from llama.checkpoint.source import open_checkpoint
from llama.checkpoint.table import n_unique_params, specs
from llama.config import ModelArgs
from llama.config import geometry as published_geometry
from llama.env import notice
from llama.errors import LlamaError
from llama.plan.words import NAMES

DTYPE = torch.bfloat16  # the 16 bit that memory and collectives are counted in
PIECE_ELEMENTS = 16 << 20
# The bundled model's geometry, for trying a benchmark.
TINY = ModelArgs(dim=256, n_layers=4, n_heads=8, n_kv_heads=4, vocab_size=1024, multiple_of=128)
# For fine-tuning on a CPU: GPT-2's width and depth, 109.5 M parameters.
SMALL = ModelArgs(dim=768, n_layers=12, n_heads=12, vocab_size=32000, tied=True)
UNPUBLISHED = {"tiny": TINY, "110m": SMALL}


def random_rows(files: Files, seed: int) -> Iterator[Chunk]:
    """Yield normal values that keep activations near 1; a seed gives the same ones in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    for entry in (entry for entries in files.values() for entry in entries):
        if len(entry.shape) == 1:
            yield {entry.source: torch.ones(entry.shape, dtype=entry.dtype)}
            continue
        n_rows, n_columns = entry.shape
        run = max(1, PIECE_ELEMENTS // n_columns)
        for first in range(0, n_rows, run):
            rows = torch.randn(min(run, n_rows - first), n_columns, generator=generator) * n_columns**-0.5
            yield {entry.source: rows.to(entry.dtype)}


def write_hf(
    folder: Path,
    args: ModelArgs,
    dtype: torch.dtype,
    read: Callable[[Files], Iterator[Chunk]],
    names: Container[str] | None = None,
) -> Path:
    """Write `config.json` and `model.safetensors` of a whole model; return the folder.

    Args:
        folder: where they are written; made when missing.
        args: the geometry.
        dtype: what is stored.
        read: gives the rows of each tensor of the files, in Hugging Face's order.
        names: Meta's names of the tensors to write; None for all, without a tied output layer.

    Raises:
        LlamaError: where the disk has too little room, with both numbers.
    """
    if names is None:
        names = set(specs(args)) - ({"output.weight"} if args.tied else set())
    files = hf_files((spec, dtype) for spec in specs(args).values() if spec.name in names)
    n_bytes = total_bytes(files)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise LlamaError(
            f"the weights take {n_bytes / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free: "
            "name a folder on a larger disk with --keep_dir, or take a smaller --geometry"
        )
    (folder / "config.json").write_text(json.dumps(hf_config(args, dtype), indent=2) + "\n")
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        paths = {name: Path(unfinished) / name for name in files}
        write_files(paths, files, read(files), "writing")
        for name, path in paths.items():
            path.replace(folder / name)
    return folder


# -- a run's weights ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """The same weights in the layouts that the peers read.

    Args:
        name: the geometry or the checkpoint's folder.
        layout: "random", "meta" or "hf".
        args: the geometry.
        ours, hf: the folders that our engine and transformers read.
        ours_layout: the layout in the folder `ours`.
    """

    name: str
    layout: str
    args: ModelArgs
    ours: str
    hf: str
    ours_layout: str = "hf"


@contextlib.contextmanager
def prepared_weights(
    geometry: str, ckpt_dir: str | None, dtype: torch.dtype, keep_dir: str | None, seed: int
) -> Iterator[Weights]:
    """Yield the weights of a run; files written for the run are deleted afterwards, unless `keep_dir` keeps them."""
    if ckpt_dir is None:
        args = model_args(geometry)
        with _folder(keep_dir, args) as (folder, is_new):
            if is_new:
                notice(f"writing {n_unique_params(args):,} random parameters, {NAMES[dtype]}")
                write_hf(folder, args, dtype, partial(random_rows, seed=seed))
            yield Weights(geometry, "random", args, str(folder), str(folder))
        return
    checkpoint = open_checkpoint(ckpt_dir)
    if checkpoint.format == "hf":
        yield Weights(ckpt_dir, "hf", checkpoint.args, ckpt_dir, ckpt_dir)
        return
    with _folder(keep_dir, checkpoint.args) as (folder, is_new):
        if is_new:
            notice("writing a copy in Hugging Face's layout for its peer")
            stored = checkpoint.dtype if checkpoint.dtype in NAMES else torch.float32
            read = partial(read_rows, checkpoint, rotate_half=True)
            write_hf(folder, checkpoint.args, stored, read, checkpoint.tensors)
        yield Weights(ckpt_dir, checkpoint.format, checkpoint.args, ckpt_dir, str(folder), checkpoint.format)


def model_args(name: str) -> ModelArgs:
    """Return a published geometry, or one of `UNPUBLISHED`."""
    return UNPUBLISHED.get(name) or published_geometry(name)


@contextlib.contextmanager
def _folder(keep_dir: str | None, args: ModelArgs) -> Iterator[tuple[Path, bool]]:
    """Yield a folder to write to, and whether it is still empty: `keep_dir`, or a folder that is deleted in the end."""
    if keep_dir is not None:
        folder = Path(keep_dir)
        is_new = not (folder / "model.safetensors").exists()
        # A config can write the same width in several ways: the file's way decides.
        if not is_new and hf_config(open_checkpoint(folder).args, torch.float32) != hf_config(args, torch.float32):
            raise LlamaError(f"{folder} holds another model: name an empty folder with --keep_dir")
        yield folder, is_new
        return
    folder = Path(tempfile.mkdtemp(prefix="llama-bench-"))
    try:
        yield folder, True
    finally:
        shutil.rmtree(folder, ignore_errors=True)
