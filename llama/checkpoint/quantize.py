"""A quantized checkpoint as a target layout: Meta's, in one file, with integers and scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from llama.checkpoint.params import to_params
from llama.checkpoint.save import Entry, Quantized, TargetLayout, save
from llama.checkpoint.source import Checkpoint
from llama.checkpoint.table import Spec, specs
from llama.checkpoint.tie import source_of
from llama.checkpoint.tokenizer_files import copy_tokenizer
from llama.quantization.scheme import Scheme

FILE = "consolidated.00.pth"


def quantize_checkpoint(
    checkpoint: Checkpoint,
    output: str | Path,
    scheme: Scheme,
    tokenizer_path: str | Path | None = None,
    force: bool = False,
    chosen: Iterable[Quantized] = (),
) -> Path:
    """Write a checkpoint as integers and scales, with params, tokenizer and manifest; `split` cuts it further.

    Args:
        checkpoint: of numbers.
        output: the folder to write.
        scheme: the form of every matrix.
        tokenizer_path: its tokenizer; None for what lies beside the weights or one folder up.
        force: replace what an earlier split, conversion or quantization wrote.
        chosen: matrices whose roundings were chosen otherwise, written as they come, in any order and each once, under
            Meta's names; the others are rounded to the nearest.

    Returns:
        The folder written.

    Raises:
        LlamaError: before anything is written, or with everything that was written removed.
    """
    checkpoint.require_numbers("quantizing it anew")
    named = None if tokenizer_path is None else Path(tokenizer_path)
    describe = partial(_integers, scheme=scheme, tokenizer_path=named)
    return save(checkpoint, Path(output), describe, force, chosen)


def _integers(checkpoint: Checkpoint, scheme: Scheme, tokenizer_path: Path | None) -> TargetLayout:
    """The layout of one file of integers.

    Meta's params.json does not say that an output layer is tied: only Llama 3.2's sizes do. The embedding of another
    tied model is therefore held in the form of the output layer, as that of a tied one is.
    """
    args = checkpoint.held_args()
    if args.tied and not args.is_llama_3_2:
        args, scheme = dataclasses.replace(args, tied=False), dataclasses.replace(scheme, embedding=scheme.output)
    scheme.check(args)
    parameters = to_params(args, scheme)

    listed = specs(args, scheme)

    def entry(spec: Spec) -> Entry:
        source = source_of(spec.name, checkpoint.tensors)
        return Entry(spec.name, source, spec.whole, spec.dtype or checkpoint.tensors[source].dtype)

    return TargetLayout(
        "quantizing",
        {FILE: [entry(spec) for spec in listed.values()]},
        {"layout": "meta", "quantization": scheme.to_json()},
        parameters,
        "params.json",
        lambda folder: copy_tokenizer(checkpoint.path, folder, tokenizer_path),
        forms={name: form for name in checkpoint.tensors if (form := listed[name].form) is not None},
    )
