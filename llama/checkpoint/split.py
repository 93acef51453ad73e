"""Meta's shards as a target layout: any number of files, each with its rank's part of every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.params import to_params
from llama.checkpoint.save import Entry, TargetLayout, save
from llama.checkpoint.source import Checkpoint, open_checkpoint
from llama.checkpoint.table import Spec, specs
from llama.checkpoint.tie import source_of
from llama.checkpoint.tokenizer_files import copy_tokenizer
from llama.errors import CheckpointError, PartitionError
from llama.parallel.partition import Partition, weighted_ranges
from llama.quantization.scheme import EMBEDDING

NAMES = ("fs_consolidated", "consolidated")
# Llama 3 cuts the embedding along the vocabulary; the older ones, with small vocabularies, along the features.
LLAMA_3_VOCAB = 100_000


@dataclass(frozen=True)
class Cut:
    """The cut of a checkpoint's tensors into files.

    Args:
        partition: the shards' parts of every axis.
        embedding_dim: the dimension along which the embedding is cut: 1, its features, as Llama 1 and 2
            have it, or 0, its vocabulary, as Llama 3 has it.
    """

    partition: Partition
    embedding_dim: int

    def part(self, spec: Spec, shard: int) -> tuple[slice, ...]:
        """The part of a tensor that a shard holds."""
        if spec.name != EMBEDDING or self.embedding_dim == 0:
            return spec.own(self.partition, shard)
        columns = weighted_ranges(spec.shape[1], self.partition.weights)[shard]
        return slice(0, spec.shape[0]), slice(columns.start, columns.stop)

    def described(self) -> Mapping[str, Any]:
        """For the manifest."""
        runs = {
            name: [[run.start, run.stop] for run in getattr(self.partition, name)]
            for name in ("heads", "kv_heads", "ffn", "vocab")
        }
        return {"world_size": self.partition.world_size, "weights": self.partition.weights, **runs} | {
            "embedding_cut": "features" if self.embedding_dim else "vocabulary"
        }


def plan_cut(checkpoint: Checkpoint, n_shards: int, tensor_split: str | None = None) -> Cut:
    """The cut of a checkpoint into `n_shards` files.

    Raises:
        PartitionError: when its heads forbid it, naming both numbers.
    """
    args, scheme = checkpoint.args, checkpoint.scheme
    if n_shards < 1:
        raise PartitionError(f"the number of shards must be 1 or more, is {n_shards}")
    if n_shards > args.n_kv_heads:
        raise PartitionError(
            f"{n_shards} shards but only {args.n_kv_heads} key/value heads: split into at most "
            f"{args.n_kv_heads}; any split runs on up to {args.n_heads} ranks"
        )
    # Integers are cut where their scales are: by rows.
    by_rows = args.vocab_size >= LLAMA_3_VOCAB or checkpoint.tensors[EMBEDDING].spec.form is not None
    ffn_block = None if scheme is None else scheme.block
    return Cut(Partition.create(args, n_shards, tensor_split, ffn_block), embedding_dim=0 if by_rows else 1)


def split(
    ckpt_dir: str | Path,
    n_shards: int,
    output_dir: str | Path | None = None,
    names: str = "fs_consolidated",
    tensor_split: str | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    tokenizer_path: str | Path | None = None,
) -> Path:
    """Write a checkpoint as `n_shards` files in Meta's layout, with params, tokenizer and manifest.

    Args:
        ckpt_dir: anything that `open_checkpoint` reads.
        n_shards: files to write; 1 merges.
        output_dir: where; None for `<ckpt_dir>_fs<n>` beside the source.
        names: "fs_consolidated" or "consolidated", the stem of the files.
        tensor_split: weights of the shards, such as "3,1"; None for equal ones.
        dtype: what to convert to; None keeps each tensor's own. Integers and their scales stay as they are.
        force: replace an output folder that an earlier split wrote.
        tokenizer_path: its tokenizer; None for what lies beside the weights or one folder up.

    Returns:
        The folder written.

    Raises:
        LlamaError: before anything is written, or with everything that was written removed.
    """
    if names not in NAMES:
        raise CheckpointError(f"--names is {names!r}: use {' or '.join(NAMES)}")
    checkpoint = open_checkpoint(ckpt_dir)
    return split_checkpoint(checkpoint, n_shards, output_dir, names, tensor_split, dtype, force, tokenizer_path)


def split_checkpoint(
    checkpoint: Checkpoint,
    n_shards: int,
    output_dir: str | Path | None = None,
    names: str = "fs_consolidated",
    tensor_split: str | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    tokenizer_path: str | Path | None = None,
) -> Path:
    """`split` of an open checkpoint, whose tensors may read as other than what is stored."""
    cut = plan_cut(checkpoint, n_shards, tensor_split)
    target = Path(output_dir) if output_dir is not None else _default_target(checkpoint.path, n_shards)
    named = None if tokenizer_path is None else Path(tokenizer_path)
    return save(checkpoint, target, partial(_shards, cut=cut, stem=names, dtype=dtype, tokenizer_path=named), force)


def _default_target(source: Path, n_shards: int) -> Path:
    name = source.resolve().stem if source.is_file() else source.resolve().name
    return source.with_name(f"{name}_fs{n_shards}")


def _shards(
    checkpoint: Checkpoint, cut: Cut, stem: str, dtype: torch.dtype | None, tokenizer_path: Path | None
) -> TargetLayout:
    parameters = to_params(checkpoint.args, checkpoint.scheme)
    stored = stored_twice(checkpoint)
    files = {
        f"{stem}.{shard:02d}.pth": [
            Entry(spec.name, source, cut.part(spec, shard), kept_dtype(checkpoint, source, dtype))
            for spec, source in stored
        ]
        for shard in range(cut.partition.world_size)
    }
    return TargetLayout(
        "splitting",
        files,
        cut.described(),
        parameters,
        "params.json",
        lambda folder: copy_tokenizer(checkpoint.path, folder, tokenizer_path),
    )


def stored_twice(checkpoint: Checkpoint) -> list[tuple[Spec, str]]:
    """Every tensor of a file that holds a tied output layer twice, as Meta's and LLMs-from-scratch's do.

    Returns:
        In the files' order, each tensor with the name of the one whose rows it takes.
    """
    tensors, listed = checkpoint.tensors, specs(checkpoint.args, checkpoint.scheme)
    missing = (spec for name, spec in listed.items() if name.startswith("output.") and name not in tensors)
    stored = [*(tensor.spec for tensor in tensors.values()), *missing]
    return [(spec, source_of(spec.name, tensors)) for spec in stored]


def kept_dtype(checkpoint: Checkpoint, name: str, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that a tensor is written in, where `dtype` is asked for: integers and their scales keep their own."""
    tensor = checkpoint.tensors[name]
    return tensor.spec.dtype or dtype or tensor.dtype
