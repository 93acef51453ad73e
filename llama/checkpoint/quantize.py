"""Write a quantized checkpoint, in Meta's layout with integers and scales, in the memory of a few rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from llama.checkpoint import manifest
from llama.checkpoint.folders import check_space, check_target, copy_tokenizer, partial_folder
from llama.checkpoint.load import settle_tie
from llama.checkpoint.params import to_params
from llama.checkpoint.rows import quantized_chunks, row_chunks
from llama.checkpoint.source import Checkpoint
from llama.checkpoint.split import Layout, describe_source, layout_bytes, wait, with_output
from llama.checkpoint.table import SCALES, WEIGHT, form_of, specs
from llama.checkpoint.write import PthWriter
from llama.quantization.scheme import Scheme

FILE = "consolidated.00.pth"
# The name of a matrix, its packed integers and their scales, all of its rows.
Quantized = tuple[str, Tensor, Tensor]


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
        scheme: what is quantized, and how.
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
    target = Path(output)
    check_target(target, checkpoint.path, force)
    checkpoint, scheme = _as_written(checkpoint, scheme)
    scheme.check(checkpoint.args)
    params = to_params(checkpoint.args, scheme)
    layout = _layout(checkpoint, scheme)
    check_space(target, layout_bytes(layout))
    with partial_folder(target) as folder:
        digests = _write(folder / FILE, checkpoint, scheme, layout, chosen)
        entries = {name: manifest.describe(*layout[name], sha256) for name, sha256 in digests.items()}
        copy_tokenizer(checkpoint.path, folder, None if tokenizer_path is None else Path(tokenizer_path))
        cut = {"layout": "meta", "quantization": scheme.to_json()}
        manifest.write(folder, describe_source(checkpoint), cut, {FILE: entries})
        # Last, since nothing opens as a checkpoint without it.
        (folder / "params.json").write_text(json.dumps(params) + "\n", encoding="utf-8")
    return target


def _as_written(checkpoint: Checkpoint, scheme: Scheme) -> tuple[Checkpoint, Scheme]:
    """The checkpoint with an output layer of its own, and what makes the files mean the same model.

    Meta's params.json does not say that an output layer is tied: only Llama 3.2's sizes do. Of another tied model the
    embedding is held as its output layer is, which is what a tied one would be.
    """
    args = settle_tie(checkpoint)
    if args.tied and not args.is_llama_3_2:
        args, scheme = dataclasses.replace(args, tied=False), dataclasses.replace(scheme, embedding=scheme.output)
    return with_output(dataclasses.replace(checkpoint, args=args)), scheme


def _layout(checkpoint: Checkpoint, scheme: Scheme) -> Layout:
    """Name, shape and dtype of every tensor of the file."""
    listed = specs(checkpoint.args, scheme)
    return {name: (spec.shape, spec.dtype or checkpoint.tensors[name].dtype) for name, spec in listed.items()}


def _write(
    path: Path, checkpoint: Checkpoint, scheme: Scheme, layout: Layout, chosen: Iterable[Quantized]
) -> dict[str, str]:
    """Fill the file; each tensor's sha256."""
    with ExitStack() as stack:
        workers = stack.enter_context(ThreadPoolExecutor(4, thread_name_prefix="quantize"))
        writer = PthWriter(path, layout, workers)
        stack.callback(writer.close)
        bar = stack.enter_context(tqdm(total=layout_bytes(layout), unit="B", unit_scale=True, desc="quantizing"))
        done = set()
        for name, packed, scales in chosen:
            _append(writer, {name: packed, name.removesuffix(WEIGHT) + SCALES: scales}, bar)
            done.add(name)
        for name in checkpoint.tensors:
            if name not in done:
                for rows in _rounded(checkpoint, scheme, name):
                    _append(writer, rows, bar)
        return writer.finish()


def _rounded(checkpoint: Checkpoint, scheme: Scheme, name: str) -> Iterator[dict[str, Tensor]]:
    """The rows of one tensor in order, as they are stored: under its name, and the scales' where it has some."""
    tensor, form = checkpoint.tensors[name], form_of(name, checkpoint.args, scheme)
    if form is None:
        yield from ({name: rows} for _, rows in row_chunks(tensor, tensor.dtype))
        return
    for _, packed, scales in quantized_chunks(tensor, form):
        yield {name: packed, name.removesuffix(WEIGHT) + SCALES: scales}


def _append(writer: PthWriter, rows: dict[str, Tensor], bar: tqdm[Any]) -> None:
    wait([future for name, values in rows.items() for future in writer.append(name, values)])
    bar.update(sum(values.nbytes for values in rows.values()))
