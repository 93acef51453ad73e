"""Carry a checkpoint into another world: Hugging Face's, Meta's, or LLMs-from-scratch's single file.

Whatever `open_checkpoint` opens is streamed, tensor by tensor; what a world cannot express is refused before
anything is written.
"""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint import manifest
from llama.checkpoint.folders import check_space, check_target, copy_tokenizer, partial_file, partial_folder
from llama.checkpoint.hf_weights import Place, checkpoint_rows, describe, pour, tensor_bytes, write_weights
from llama.checkpoint.params import context_length, generation_config, hf_config
from llama.checkpoint.scratch import beside
from llama.checkpoint.source import SINGLE_SUFFIXES, Checkpoint, open_checkpoint, shares_output
from llama.checkpoint.split import describe_source, split_checkpoint, with_output
from llama.checkpoint.table import Spec
from llama.checkpoint.write import PthWriter
from llama.config import read_json
from llama.env import notice
from llama.errors import CheckpointError, LlamaError, TokenizerError, UsageError
from llama.sizes import parse_bytes
from llama.tokenizer import Tokenizer, find_tokenizer, load_tokenizer, locate_tokenizer

KINDS = ("hf", "meta", "single")
# Of --max_shard_size; a bare number is one of bytes.
SHARD_UNITS = ("", "KB", "MB", "GB", "KIB", "MIB", "GIB")
AFTER_LAYERS = ("norm.weight", "output.weight")
# What LLMs-from-scratch's code has in place of a parameter.
SCRATCH_NORM_EPS = 1e-5


def convert(
    ckpt_dir: str | Path,
    to: str,
    output: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    tokenizer_path: str | Path | None = None,
    force: bool = False,
) -> Path:
    """Write a checkpoint in another layout, with what its world wants beside the weights.

    Args:
        ckpt_dir: anything that `open_checkpoint` reads.
        to: "hf", "meta" (one file; `split` writes more) or "single", the `.pth` of LLMs-from-scratch.
        output: the folder to write, or the file for "single".
        dtype: what to convert to; None keeps each tensor's own.
        max_shard_size: of one safetensors file, such as "5GB" or "500MiB".
        tokenizer_path: None for what lies beside the weights or one folder up.
        force: replace what an earlier conversion or split wrote.

    Returns:
        What was written.

    Raises:
        LlamaError: before anything is written, or with everything that was written removed.
    """
    check_kind(to)
    max_bytes = parse_size(max_shard_size)
    return convert_checkpoint(open_checkpoint(ckpt_dir), to, output, dtype, max_bytes, tokenizer_path, force)


def convert_checkpoint(
    checkpoint: Checkpoint,
    to: str,
    output: str | Path,
    dtype: torch.dtype | None,
    max_bytes: int,
    tokenizer_path: str | Path | None,
    force: bool,
) -> Path:
    """`convert` of an open checkpoint, whose tensors may read as other than what is stored."""
    check_kind(to)
    target, named = Path(output), None if tokenizer_path is None else Path(tokenizer_path)
    if to == "meta":
        _read_tokenizer(checkpoint, named)
        return split_checkpoint(checkpoint, 1, target, "consolidated", None, dtype, force, named)
    checkpoint.require_numbers(f"--to {to}")
    check_target(target, checkpoint.path, force)
    if to == "hf":
        return _to_hf(checkpoint, target, dtype, max_bytes, named)
    return _to_single(checkpoint, target, dtype, named)


def check_kind(to: str) -> None:
    """Refuse a layout that is not one of `KINDS`.

    Raises:
        UsageError: which names them.
    """
    if to not in KINDS:
        raise UsageError(f"--to is {to!r}: use {', '.join(KINDS)}")


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "5GB" (decimal) or "500MiB" (binary).

    Raises:
        UsageError: for anything else.
    """
    try:
        return parse_bytes(text, SHARD_UNITS)
    except LlamaError:
        raise UsageError(f"--max_shard_size takes a size such as 5GB or 500MiB, not {text!r}") from None


# -- Hugging Face ----------------------------------------------------------------------------------


def _to_hf(
    checkpoint: Checkpoint, target: Path, dtype: torch.dtype | None, max_bytes: int, tokenizer_path: Path | None
) -> Path:
    found = _read_tokenizer(checkpoint, tokenizer_path)
    checkpoint = _tie_if_equal(checkpoint)
    # As transformers has them: what follows the layers comes after them, so that files hold neighbours.
    in_order = sorted(checkpoint.tensors.values(), key=lambda tensor: tensor.spec.name in AFTER_LAYERS)
    stored = [(tensor.spec, dtype or tensor.dtype) for tensor in in_order]
    check_space(target, sum(tensor_bytes(spec, kind) for spec, kind in stored))
    with partial_folder(target) as folder:
        _write_tokenizer(checkpoint.path, tokenizer_path, found, folder)
        shards = write_weights(folder, stored, checkpoint_rows(checkpoint), max_bytes)
        _write_generation_config(folder, found[1] if found else None)
        manifest.write(folder, describe_source(checkpoint), {"layout": "hf"}, shards)
        # Last, since nothing opens as a checkpoint without it.
        _write_json(folder / "config.json", _config(checkpoint, dtype, found[1] if found else None))
    return target


def _tie_if_equal(checkpoint: Checkpoint) -> Checkpoint:
    """Hugging Face stores a tied output layer once. Meta's files hold it twice and do not say so: equality does."""
    args = checkpoint.args
    tied = (args.tied or checkpoint.format != "hf") and shares_output(checkpoint)
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not (tied and name == "output.weight")}
    return dataclasses.replace(checkpoint, args=dataclasses.replace(args, tied=tied), tensors=tensors)


def _config(checkpoint: Checkpoint, dtype: torch.dtype | None, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the content of `config.json`; the context length of a source that states one is kept."""
    bos, stops = (None, ()) if tokenizer is None else (tokenizer.bos_id, tokenizer.stop_tokens)
    return hf_config(checkpoint.args, dtype or checkpoint.dtype, bos, stops, context_length(checkpoint))


def _write_generation_config(folder: Path, tokenizer: Tokenizer | None) -> None:
    """Stop tokens, and whatever else the source's own file says."""
    path = folder / "generation_config.json"
    ids = {} if tokenizer is None else generation_config(tokenizer.bos_id, tokenizer.stop_tokens)
    kept = read_json(path) if path.exists() else {}
    _write_json(path, {**(kept if isinstance(kept, dict) else {}), **ids})


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# -- LLMs-from-scratch -----------------------------------------------------------------------------


def _to_single(checkpoint: Checkpoint, target: Path, dtype: torch.dtype | None, tokenizer_path: Path | None) -> Path:
    args = checkpoint.args
    if target.suffix not in SINGLE_SUFFIXES:
        raise UsageError(f"--output {target} names the single file: let it end in .pth")
    if args.head_dim * args.n_heads != args.dim:
        raise CheckpointError(
            f"LLMs-from-scratch cannot express heads of width {args.head_dim} with dim {args.dim} and "
            f"{args.n_heads} heads: keep this model in Hugging Face's layout"
        )
    if args.norm_eps != SCRATCH_NORM_EPS:
        notice(f"LLMs-from-scratch's code has norm_eps {SCRATCH_NORM_EPS}, this model {args.norm_eps}: change it there")
    _read_tokenizer(checkpoint, tokenizer_path)
    is_tied = _tie_if_equal(checkpoint).args.tied
    config = hf_config(
        dataclasses.replace(args, tied=is_tied), dtype or checkpoint.dtype, context=context_length(checkpoint)
    )
    checkpoint = with_output(checkpoint)
    stored = [(tensor.spec, dtype or tensor.dtype) for tensor in checkpoint.tensors.values()]
    check_space(target, sum(tensor_bytes(spec, kind) for spec, kind in stored))
    with partial_file(target) as partial:
        digest = _write_single(partial, checkpoint, stored)
        # Parameters of an earlier file must not stand beside this one.
        beside(target).unlink(missing_ok=True)
    shards = {target.name: describe(stored, digest, lambda spec: spec.scratch_name)}
    with partial_file(beside(target)) as partial:
        content = {"source": describe_source(checkpoint), "partition": {"layout": "single"}, "config": config}
        manifest.write_to(partial, {**content, "shards": shards})
    copy_tokenizer(checkpoint.path, target.parent, tokenizer_path)
    return target


def _write_single(path: Path, checkpoint: Checkpoint, stored: list[tuple[Spec, torch.dtype]]) -> dict[str, str]:
    layout = {spec.scratch_name: (spec.shape, kind) for spec, kind in stored}
    with ExitStack() as stack:
        workers = stack.enter_context(ThreadPoolExecutor(4, thread_name_prefix="convert"))
        writer = PthWriter(path, layout, workers)
        stack.callback(writer.close)
        places = [Place(spec, kind, writer, spec.scratch_name) for spec, kind in stored]
        pour(places, checkpoint_rows(checkpoint), "converting")
        return writer.finish()


# -- tokenizer -------------------------------------------------------------------------------------


def _read_tokenizer(checkpoint: Checkpoint, tokenizer_path: Path | None) -> tuple[Path, Tokenizer] | None:
    """The tokenizer's file and the tokenizer; None, with a notice, where there is none.

    Raises:
        TokenizerError: when it was named and is none, or belongs to a larger model.
    """
    try:
        file = locate_tokenizer(find_tokenizer(checkpoint.path, tokenizer_path))
    except TokenizerError:
        if tokenizer_path is not None:
            raise
        notice("no tokenizer beside the weights or one folder up: only the weights are converted")
        return None
    tokenizer = load_tokenizer(file)
    if tokenizer.n_words > checkpoint.args.vocab_size:
        raise TokenizerError(
            f"{file} has {tokenizer.n_words} tokens but the model only {checkpoint.args.vocab_size}: it belongs to "
            "another model; name the right one with --tokenizer_path"
        )
    return file, tokenizer


def _write_tokenizer(
    source: Path, tokenizer_path: Path | None, found: tuple[Path, Tokenizer] | None, folder: Path
) -> None:
    """What `AutoTokenizer` opens: the source's own files, or what is made of its tokenizer.model."""
    if found is None:
        return
    copy_tokenizer(source, folder, tokenizer_path)
    # Needed for this alone.
    from llama.tokenizer.export import write_hf_tokenizer, write_tokenizer_config

    if (folder / "tokenizer.json").exists():
        if not (folder / "tokenizer_config.json").exists():
            write_tokenizer_config(found[1], folder)
        return
    try:
        write_hf_tokenizer(found[0], folder)
    except TokenizerError as error:
        notice(f"{error}; it is copied as it is")
