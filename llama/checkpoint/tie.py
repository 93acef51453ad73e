"""Whether the output layer is the embedding."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llama.checkpoint.rows import SourceTensor
from llama.checkpoint.table import SCALES, WEIGHT
from llama.config import ModelArgs
from llama.quantization.scheme import EMBEDDING, OUTPUT, Scheme


def is_tied(
    args: ModelArgs,
    tensors: Mapping[str, SourceTensor],
    scheme: Scheme | None = None,
    rows: slice | None = None,
    unsaid: bool = False,
) -> bool:
    """Whether the output layer shares the embedding's memory.

    Hugging Face's config.json says so. Meta's params.json does not: only Llama 3.2's sizes do, and its files hold the
    tied matrix twice. The two copies are one where they are equal, and two where tuning has set them apart (as
    transformers has it). A quantized embedding that is held otherwise than its output layer has been set apart too.

    Args:
        args: the geometry; its `tied` is what the config or the sizes say.
        tensors: the stored ones; where the output layer is not among them, it is the embedding.
        scheme: which tensors are integers; None for numbers alone.
        rows: of the vocabulary, that are compared; None for all.
        unsaid: whether equality is enough where neither a config nor the sizes say that the two are one.
    """
    if not (args.tied or unsaid) or not _may_hold_output(args, tensors, scheme):
        return False
    both = (name for name in (OUTPUT, OUTPUT.replace(WEIGHT, SCALES)) if OUTPUT in tensors and name in tensors)
    return all(_are_equal(tensors[name], tensors[embedding_of(name)], rows) for name in both)


def embedding_of(name: str) -> str:
    """The embedding's tensor that is the same as one of a tied output layer: its matrix, its integers or its scales."""
    return name.replace(OUTPUT.removesuffix(WEIGHT), EMBEDDING.removesuffix(WEIGHT))


def _may_hold_output(args: ModelArgs, tensors: Mapping[str, SourceTensor], scheme: Scheme | None) -> bool:
    """Whether the embedding is stored in the form of the output layer."""
    if scheme is None or EMBEDDING not in tensors:
        return True
    form, found = scheme.form(OUTPUT, args), tensors[EMBEDDING].dtype
    return found.is_floating_point if form is None else found == form.dtype


def _are_equal(left: SourceTensor, right: SourceTensor, rows: slice | None) -> bool:
    """Whether two tensors hold the same in these rows."""
    index = (rows or left.spec.whole[0], *left.spec.whole[1:])
    for where, values in left.read(index):
        part = tuple(slice(run.start + own.start, run.start + own.stop) for run, own in zip(index, where, strict=True))
        scratch = torch.empty_like(values, memory_format=torch.contiguous_format)
        right.read_into(part, scratch)
        if not torch.equal(scratch, values):
            return False
    return True
