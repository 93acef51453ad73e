"""Fill this rank's shard of a model from an open checkpoint, reading only what it owns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from llama.checkpoint.rows import quantized_chunks
from llama.checkpoint.source import Checkpoint
from llama.checkpoint.table import SCALES, WEIGHT, Spec, specs
from llama.config import ModelArgs
from llama.env import byte_bar
from llama.errors import CheckpointError
from llama.kernels.pages import prefer_huge_pages
from llama.model import Transformer
from llama.offload import offload_blocks
from llama.parallel.groups import Ranks
from llama.parallel.partition import Partition
from llama.quantization.layers import quantize_layers
from llama.quantization.scheme import OUTPUT, Scheme
from llama.rope import rope_frequencies


def load_model(
    checkpoint: Checkpoint,
    partition: Partition,
    ranks: Ranks,
    dtype: torch.dtype,
    scheme: Scheme | None = None,
    offload_layers: int = 0,
) -> Transformer:
    """The model of this rank, its weights read from `checkpoint` straight into place.

    Args:
        checkpoint: from `open_checkpoint`, at any shard count and in any layout.
        partition: the cut of the model; of this rank only its own part is read.
        ranks: this process's place and device.
        dtype: what the weights that are not quantized are converted to, piece by piece.
        scheme: what to quantize, rounded to the nearest a chunk of rows at a time; the same integers at every world
            size. None for what the checkpoint holds. A quantized one is read as it is.
        offload_layers: layers that are read into host memory and streamed from there; see `llama.offload`.

    Raises:
        CheckpointError: when a file ends early, or contradicts itself.
        QuantizationError: when groups do not divide the model's rows or the cut; nothing is read then.
        UsageError: when the model has not so many layers to offload.
    """
    scheme = checkpoint.scheme or scheme
    if scheme is not None:
        check_cuts(checkpoint.args, scheme, partition)
    args = checkpoint.held_args(_compared(checkpoint, scheme, partition, ranks.rank))
    model = Transformer(args, partition, ranks, device="meta", dtype=dtype)
    if scheme is not None:
        quantize_layers(model, scheme)
    offload_blocks(model.requires_grad_(False), offload_layers)
    materialise(model, ranks.device)
    _fill(model, checkpoint, specs(args, scheme))
    return model.eval()


def cut_model(
    args: ModelArgs, scheme: Scheme | None, n_ranks: int, tensor_split: str | Sequence[float] | None = None
) -> Partition:
    """The cut of a model across `n_ranks`, between the groups of a quantized one.

    Raises:
        PartitionError: for more ranks than the model can serve.
        QuantizationError: where groups do not divide the model's rows, or attention cannot be cut between them.
    """
    if scheme is None:
        return Partition.create(args, n_ranks, tensor_split)
    scheme.check(args)
    partition = Partition.create(args, n_ranks, tensor_split, scheme.block)
    check_cuts(args, scheme, partition)
    return partition


def check_cuts(args: ModelArgs, scheme: Scheme, partition: Partition) -> None:
    """Refuse a cut inside a group of columns that share a scale.

    Raises:
        QuantizationError: which names the first that does not.
    """
    scheme.check(args)
    for spec in specs(args, scheme).values():
        for rank in range(partition.world_size):
            spec.own(partition, rank)


def _compared(checkpoint: Checkpoint, scheme: Scheme | None, partition: Partition, rank: int) -> slice | None:
    """The rows that decide the tie: this rank's own; all where the tie decides how the embedding is rounded."""
    if scheme is None:
        return specs(checkpoint.args)[OUTPUT].own(partition, rank)[0]
    return None


def materialise(model: Transformer, device: torch.device | str) -> None:
    """Give what of a model lies on "meta" its memory, uninitialised and frozen; what is shared stays shared."""
    placed: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            if parameter not in placed:
                memory = torch.empty_like(parameter, device=device)
                prefer_huge_pages(memory)
                placed[parameter] = nn.Parameter(memory, requires_grad=False)
            setattr(module, name, placed[parameter])
    model.rope_frequencies = rope_frequencies(model.args, device)


def _fill(model: Transformer, checkpoint: Checkpoint, held: dict[str, Spec]) -> None:
    """Read every parameter, quantizing those that are held as integers and stored as numbers."""
    parameters = dict(model.named_parameters())
    total = sum(p.nbytes for p in parameters.values())
    with byte_bar(total, "loading", leave=False) as bar:
        for name, parameter in parameters.items():
            place = held[name].own(model.partition, model.ranks.rank)
            if name in checkpoint.tensors and checkpoint.tensors[name].spec.dtype == held[name].dtype:
                checkpoint.tensors[name].read_into(place, parameter.data)
            elif name.endswith(WEIGHT):
                _read_quantized(model, checkpoint, held[name], parameters)
            bar.update(parameter.nbytes)


def _read_quantized(
    model: Transformer, checkpoint: Checkpoint, spec: Spec, parameters: dict[str, nn.Parameter]
) -> None:
    """Round this rank's part of a matrix of numbers into its integers and scales."""
    if spec.form is None:
        raise CheckpointError(
            f"{checkpoint.path}: {spec.name} is held as the output layer's own integers, but the two differ: "
            "quantize the original checkpoint again"
        )
    source = checkpoint.tensors[spec.name]
    packed, scales = (parameters[name].data for name in (spec.name, spec.name.removesuffix(WEIGHT) + SCALES))
    part = source.spec.own(model.partition, model.ranks.rank)
    for rows, integers, sizes in quantized_chunks(source, spec.form, part, packed.device):
        packed[rows], scales[rows] = integers, sizes
