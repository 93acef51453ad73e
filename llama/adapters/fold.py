"""Folding of a LoRA into the weights of a checkpoint while they are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from llama.adapters.adapter import Adapter, LoraAdapter, PromptAdapter, check_fits
from llama.checkpoint.convert import convert_checkpoint, parse_size
from llama.checkpoint.files import Index
from llama.checkpoint.rows import SourceTensor
from llama.checkpoint.source import Checkpoint, open_checkpoint
from llama.errors import AdapterError


def fold(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return W + scaling * B A, in float32 or a wider dtype: [out, in], [r, in] and [out, r] to [out, in]."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.addmm(weight.to(wide), b.to(wide), a.to(wide), alpha=scaling)


@dataclass(frozen=True, kw_only=True)
class FoldedTensor(SourceTensor):
    """A tensor that is read with its update; the sum is rounded once, to the dtype that it is read into.

    Args:
        stored: the tensor without the update.
        a, b: [r, in_features] and [out_features, r], in Meta's row order.
        scaling: factor of B A.
    """

    stored: SourceTensor
    a: Tensor = field(repr=False)
    b: Tensor = field(repr=False)
    scaling: float

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensor without the update."""
        return self.stored.dtype

    def read(self, index: Index) -> Iterator[tuple[Index, Tensor]]:
        """Read as `SourceTensor.read` does; values are float32 or wider, whatever the dtype."""
        for where, values in self.stored.read(index):
            rows, columns = (
                slice(whole.start + part.start, whole.start + part.stop)
                for whole, part in zip(index, where, strict=True)
            )
            yield where, fold(values, self.a[:, columns], self.b[rows], self.scaling)


def with_adapter(checkpoint: Checkpoint, adapter: LoraAdapter, name: str = "lora") -> Checkpoint:
    """Return the checkpoint with a LoRA folded in while tensors are read, a piece at a time; nothing is written.

    Args:
        checkpoint: open.
        adapter: made for its model.
        name: name of the adapter, for the manifest of a written copy.

    Raises:
        AdapterError: when the adapter was made for another model.
        QuantizationError: when the checkpoint is quantized.
    """
    checkpoint.require_numbers("folding an adapter in")
    check_fits(adapter, checkpoint.args)
    tensors = dict(checkpoint.tensors)
    for linear, (a, b) in adapter.weights.items():
        stored = tensors[f"{linear}.weight"]
        tensors[stored.spec.name] = FoldedTensor(
            stored.spec, stored.pieces, stored.dim, stored.head_rows, stored=stored, a=a, b=b, scaling=adapter.scaling
        )
    return dataclasses.replace(checkpoint, tensors=tensors, adapter=name)


def merge_adapter(
    ckpt_dir: str | Path,
    adapter: Adapter,
    name: str,
    output: str | Path,
    to: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    tokenizer_path: str | Path | None = None,
    force: bool = False,
) -> Path:
    """Write a checkpoint with a LoRA folded in, streamed as `convert` streams it.

    Args:
        ckpt_dir: anything that `open_checkpoint` reads.
        adapter: a LoRA made for its model.
        name: of the adapter.
        output, dtype, max_shard_size, tokenizer_path, force: as in `convert`.
        to: "hf", "meta" or "single"; None for the layout that the checkpoint has.

    Returns:
        The folder or file written.

    Raises:
        LlamaError: before anything is written, or with everything that was written removed; an
            AdapterError for a soft prompt, which is no part of any weight.
    """
    max_bytes = parse_size(max_shard_size)
    checkpoint = open_checkpoint(ckpt_dir)
    if isinstance(adapter, PromptAdapter):
        raise AdapterError(
            f"{name} is a soft prompt, which cannot be folded into weights: write it out with "
            "scripts/export_gguf.py --adapter, or run it with --tuning_ckpt_path"
        )
    folded = with_adapter(checkpoint, adapter, name)
    return convert_checkpoint(folded, to or checkpoint.format, output, dtype, max_bytes, tokenizer_path, force)
