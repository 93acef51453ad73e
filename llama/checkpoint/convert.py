"""Convert a checkpoint to another layout: Hugging Face's, Meta's, or LLMs-from-scratch's single file.

Whatever `open_checkpoint` opens is streamed, tensor by tensor; a model that a layout cannot express is refused before
anything is written.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from llama.checkpoint.hugging_face import hugging_face
from llama.checkpoint.params import context_length, hf_config
from llama.checkpoint.save import Entry, TargetLayout, save
from llama.checkpoint.source import SINGLE_SUFFIXES, Checkpoint, open_checkpoint
from llama.checkpoint.split import kept_dtype, split_checkpoint, stored_twice
from llama.checkpoint.tokenizer_files import copy_tokenizer, read_tokenizer
from llama.env import notice
from llama.errors import CheckpointError, LlamaError, UsageError
from llama.sizes import parse_bytes

KINDS = ("hf", "meta", "single")
# Of --max_shard_size; a bare number is one of bytes.
SHARD_UNITS = ("", "KB", "MB", "GB", "KIB", "MIB", "GIB")
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
    """Write a checkpoint in another layout, with the files that belong beside the weights.

    Args:
        ckpt_dir: anything that `open_checkpoint` reads.
        to: "hf", "meta" (one file; `split` writes more) or "single", the `.pth` of LLMs-from-scratch.
        output: the folder to write, or the file for "single".
        dtype: what to convert to; None keeps each tensor's own.
        max_shard_size: of one safetensors file, such as "5GB" or "500MiB".
        tokenizer_path: None for what lies beside the weights or one folder up.
        force: replace what an earlier conversion or split wrote.

    Returns:
        The folder or file written.

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
        read_tokenizer(checkpoint, named)
        return split_checkpoint(checkpoint, 1, target, "consolidated", None, dtype, force, named)
    checkpoint.require_numbers(f"--to {to}")
    if to == "hf":
        describe = partial(hugging_face, dtype=dtype, max_bytes=max_bytes, tokenizer_path=named)
    else:
        describe = partial(_single_file, target=target, dtype=dtype, tokenizer_path=named)
    return save(checkpoint, target, describe, force)


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


# -- LLMs-from-scratch -----------------------------------------------------------------------------


def _single_file(
    checkpoint: Checkpoint, target: Path, dtype: torch.dtype | None, tokenizer_path: Path | None
) -> TargetLayout:
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
    read_tokenizer(checkpoint, tokenizer_path)
    held_args = checkpoint.held_args(unsaid=checkpoint.format != "hf")
    entries = [
        Entry(spec.scratch_name, source, spec.whole, kept_dtype(checkpoint, source, dtype))
        for spec, source in stored_twice(checkpoint)
    ]
    return TargetLayout(
        "converting",
        {target.name: entries},
        {"layout": "single"},
        hf_config(held_args, dtype or checkpoint.dtype, context=context_length(checkpoint)),
        None,
        lambda folder: copy_tokenizer(checkpoint.path, folder, tokenizer_path),
        rotate_half=True,
    )
