"""Fill this rank's shard of a model from an open checkpoint, reading only what it owns."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from tqdm import tqdm

from llama.checkpoint.layout import specs
from llama.checkpoint.source import Checkpoint, shares_output
from llama.config import ModelArgs
from llama.console import is_speaker
from llama.model import Transformer
from llama.offload import offload_blocks
from llama.parallel.groups import Ranks
from llama.parallel.partition import Partition
from llama.rope import rope_frequencies

# Below this a progress bar would only flicker.
PROGRESS_BYTES = 256 << 20


def load_model(
    checkpoint: Checkpoint,
    partition: Partition,
    ranks: Ranks,
    dtype: torch.dtype,
    *,
    offload_layers: int = 0,
) -> Transformer:
    """The model of this rank, its weights read from `checkpoint` straight into place.

    Args:
        checkpoint: from `open_checkpoint`, at any shard count and in any layout.
        partition: the cut of the model; of this rank only its own part is read.
        ranks: this process's place and device.
        dtype: what the weights are converted to, piece by piece.
        offload_layers: layers that are read into host memory and streamed from there; see `llama.offload`.

    Raises:
        CheckpointError: when a file ends early.
        UsageError: when the model has fewer layers.
    """
    args = settle_tie(checkpoint, partition, ranks.rank)
    model = Transformer(args, partition, ranks, device="meta", dtype=dtype).requires_grad_(False)
    offload_blocks(model, offload_layers)
    materialise(model, ranks.device)
    parameters = dict(model.named_parameters())
    total = sum(p.nbytes for p in parameters.values())
    quiet = not is_speaker() or total < PROGRESS_BYTES
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=quiet, leave=False) as bar:
        for name, parameter in parameters.items():
            tensor = checkpoint.tensors[name]
            tensor.read_into(tensor.spec.own(partition, ranks.rank), parameter.data)
            bar.update(parameter.nbytes)
    return model.eval()


def materialise(model: Transformer, device: torch.device | str) -> None:
    """Give what of a model still lies on "meta" its memory, uninitialised and frozen; what is shared stays shared."""
    placed: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            if parameter not in placed:
                placed[parameter] = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
            setattr(module, name, placed[parameter])
    model.rope_frequencies = rope_frequencies(model.args, device)


def settle_tie(checkpoint: Checkpoint, partition: Partition, rank: int) -> ModelArgs:
    """Whether the output layer shares the embedding's memory.

    Meta's Llama 3.2 files hold the tied weight twice: one copy is kept where both are equal in this
    rank's rows, and both where tuning has set them apart (as transformers does).
    """
    args = checkpoint.args
    if not args.tied or shares_output(checkpoint, specs(args)["output.weight"].own(partition, rank)):
        return args
    return dataclasses.replace(args, tied=False)
