"""Rewrite a checkpoint into any number of shards, in the memory of a few tensors' rows.

Rows are read once, at full width, and dealt out to the shards that own a part of them; reading,
writing and checksums go on at the same time.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llama.checkpoint import manifest
from llama.checkpoint.folders import check_space, check_target, copy_tokenizer, partial_folder
from llama.checkpoint.params import to_params
from llama.checkpoint.rows import row_chunks
from llama.checkpoint.source import Checkpoint, SourceTensor, open_checkpoint
from llama.checkpoint.table import Spec, specs
from llama.checkpoint.write import PthWriter
from llama.errors import CheckpointError, PartitionError
from llama.parallel.partition import Partition, weighted_ranges
from llama.quantization.scheme import EMBEDDING, OUTPUT

NAMES = ("fs_consolidated", "consolidated")
# Llama 3 cuts the embedding along the vocabulary; the older ones, with small vocabularies, along the features.
LLAMA_3_VOCAB = 100_000


@dataclass(frozen=True)
class Cut:
    """How the tensors of a checkpoint are cut into files.

    Args:
        partition: who owns what.
        embedding_dim: the dimension along which the embedding is cut: 1, its features, as Llama 1 and 2
            have it, or 0, its vocabulary, as Llama 3 has it.
    """

    partition: Partition
    embedding_dim: int

    def parts(self, spec: Spec) -> list[tuple[slice, ...]]:
        """The part of a tensor that each shard holds."""
        n_shards = self.partition.world_size
        if spec.name != EMBEDDING or self.embedding_dim == 0:
            return [spec.own(self.partition, shard) for shard in range(n_shards)]
        rows = slice(0, spec.shape[0])
        columns = weighted_ranges(spec.shape[1], self.partition.weights)
        return [(rows, slice(run.start, run.stop)) for run in columns]


def plan_cut(checkpoint: Checkpoint, n_shards: int, tensor_split: str | None = None) -> Cut:
    """How a checkpoint is cut into `n_shards` files.

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
    output_dir: str | Path | None,
    names: str,
    tensor_split: str | None,
    dtype: torch.dtype | None,
    force: bool,
    tokenizer_path: str | Path | None,
) -> Path:
    """`split` of an open checkpoint, whose tensors may read as other than what is stored."""
    source = checkpoint.path
    cut = plan_cut(checkpoint, n_shards, tensor_split)
    target = Path(output_dir) if output_dir is not None else _default_target(source, n_shards)
    check_target(target, source, force)
    params = to_params(checkpoint.args, checkpoint.scheme)
    checkpoint = with_output(checkpoint)
    layouts = [_shard_layout(checkpoint, cut, shard, dtype) for shard in range(n_shards)]
    check_space(target, sum(map(layout_bytes, layouts)))
    with partial_folder(target) as folder:
        files = [folder / f"{names}.{shard:02d}.pth" for shard in range(n_shards)]
        digests = _write_shards(checkpoint, cut, files, layouts)
        copy_tokenizer(source, folder, Path(tokenizer_path) if tokenizer_path is not None else None)
        manifest.write(folder, describe_source(checkpoint), _describe_cut(cut), digests)
        # Last, since nothing opens as a checkpoint without it.
        (folder / "params.json").write_text(json.dumps(params) + "\n", encoding="utf-8")
    return target


def _default_target(source: Path, n_shards: int) -> Path:
    name = source.resolve().stem if source.is_file() else source.resolve().name
    return source.with_name(f"{name}_fs{n_shards}")


def with_output(checkpoint: Checkpoint) -> Checkpoint:
    """Meta's files hold the output layer also where it is the embedding."""
    if OUTPUT in checkpoint.tensors:
        return checkpoint
    copies = {
        name: dataclasses.replace(checkpoint.tensors[name.replace("output", "tok_embeddings")], spec=spec)
        for name, spec in specs(checkpoint.args, checkpoint.scheme).items()
        if name.startswith("output.")
    }
    return dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, **copies})


Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def _shard_layout(checkpoint: Checkpoint, cut: Cut, shard: int, dtype: torch.dtype | None) -> Layout:
    """Name, shape and dtype of every tensor of one shard."""
    layout = {}
    for name, tensor in checkpoint.tensors.items():
        part = cut.parts(tensor.spec)[shard]
        kept = tensor.spec.dtype or dtype or tensor.dtype
        layout[name] = (tuple(run.stop - run.start for run in part), kept)
    return layout


def layout_bytes(layout: Layout) -> int:
    """Bytes of the tensors of one file."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in layout.values())


# -- tensors ---------------------------------------------------------------------------------------


def _write_shards(
    checkpoint: Checkpoint, cut: Cut, files: list[Path], layouts: list[Layout]
) -> dict[str, dict[str, Any]]:
    """Fill the shard files; every tensor's entry of the manifest, by file."""
    total = sum(map(layout_bytes, layouts))
    with ExitStack() as stack:
        workers = stack.enter_context(ThreadPoolExecutor(4, thread_name_prefix="split"))
        writers = []
        for file, layout in zip(files, layouts, strict=True):
            writers.append(PthWriter(file, layout, workers))
            stack.callback(writers[-1].close)
        bar = stack.enter_context(tqdm(total=total, unit="B", unit_scale=True, desc="splitting"))
        for tensor in checkpoint.tensors.values():
            _deal_out(tensor, cut.parts(tensor.spec), writers, layouts[0][tensor.spec.name][1], bar)
        digests = [writer.finish() for writer in writers]
    return {
        file.name: {name: manifest.describe(*layout[name], sha256) for name, sha256 in digest.items()}
        for file, layout, digest in zip(files, layouts, digests, strict=True)
    }


def _deal_out(
    tensor: SourceTensor, parts: list[tuple[slice, ...]], writers: list[PthWriter], dtype: torch.dtype, bar: tqdm[Any]
) -> None:
    """Write one tensor's rows to the shards that own them, reading ahead by one chunk."""
    name, under_way = tensor.spec.name, list[Future[Any]]()
    for first, rows in row_chunks(tensor, dtype):
        wait(under_way)
        under_way = []
        for part, writer in zip(parts, writers, strict=True):
            own = rows[_overlap(part, first, len(rows))]
            if own.numel():
                under_way += writer.append(name, own)
                bar.update(own.nbytes)
    wait(under_way)


def wait(under_way: list[Future[Any]]) -> None:
    """Wait for what a writer has under way; its errors are raised here."""
    for future in under_way:
        future.result()


def _overlap(part: tuple[slice, ...], first: int, n_rows: int) -> tuple[slice, ...]:
    """What a chunk of rows shares with a shard's part, as an index into the chunk."""
    start, stop = (min(max(edge - first, 0), n_rows) for edge in (part[0].start, part[0].stop))
    return slice(start, stop), *part[1:]


# -- the manifest's own words ----------------------------------------------------------------------


def describe_source(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint was made from, for its manifest."""
    files = {"name": checkpoint.path.resolve().name, "format": checkpoint.format, "n_files": checkpoint.n_shards}
    return files if checkpoint.adapter is None else {**files, "adapter": checkpoint.adapter}


def _describe_cut(cut: Cut) -> Mapping[str, Any]:
    runs = {
        field.name: [[run.start, run.stop] for run in getattr(cut.partition, field.name)]
        for field in dataclasses.fields(cut.partition)
        if field.name in ("heads", "kv_heads", "ffn", "vocab")
    }
    return {"world_size": cut.partition.world_size, "weights": cut.partition.weights, **runs} | {
        "embedding_cut": "features" if cut.embedding_dim else "vocabulary"
    }
