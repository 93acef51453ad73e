"""The tied output layer: is a model's output layer its embedding?"""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch

from llama.checkpoint.rows import SourceTensor, may_be
from llama.config import ModelArgs
from llama.quantization.scheme import EMBEDDING, OUTPUT, Scheme

_LAYER = OUTPUT.removesuffix("weight")


def is_tied(
    args: ModelArgs,
    tensors: Mapping[str, SourceTensor],
    scheme: Scheme | None = None,
    rows: slice | None = None,
    unsaid: bool = False,
) -> bool:
    """Return whether the output layer shares the embedding's memory.

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
    stored = [name for name in tensors if name.startswith(_LAYER)]
    return all(_are_equal(tensors[name], tensors[_of_embedding(name)], rows) for name in stored)


def source_of(name: str, stored: Container[str]) -> str:
    """The stored tensor that holds the values of `name`: the embedding's, for an output layer that is not stored."""
    return _of_embedding(name) if name.startswith(_LAYER) and OUTPUT not in stored else name


def _of_embedding(name: str) -> str:
    """The embedding's matrix, integers or scales for the output layer's."""
    return name.replace(_LAYER, EMBEDDING.removesuffix("weight"))


def _may_hold_output(args: ModelArgs, tensors: Mapping[str, SourceTensor], scheme: Scheme | None) -> bool:
    """Return whether the embedding is stored in the form of the output layer."""
    if scheme is None or EMBEDDING not in tensors:
        return True
    form = scheme.form(OUTPUT, args)
    return may_be(tensors[EMBEDDING].dtype, None if form is None else form.dtype)


def _are_equal(left: SourceTensor, right: SourceTensor, rows: slice | None) -> bool:
    """Return whether two tensors hold the same in these rows."""
    index = (rows or left.spec.whole[0], *left.spec.whole[1:])
    for where, values in left.read(index):
        part = tuple(slice(run.start + own.start, run.start + own.stop) for run, own in zip(index, where, strict=True))
        scratch = torch.empty_like(values, memory_format=torch.contiguous_format)
        right.read_into(part, scratch)
        if not torch.equal(scratch, values):
            return False
    return True
