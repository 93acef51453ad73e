"""A model of several layers, some of them offloaded and some of its matrices quantized."""

from __future__ import annotations

from pathlib import Path

import torch
from support import hf_model, write_meta

from llama.checkpoint.load import load_model
from llama.checkpoint.source import open_checkpoint
from llama.model import Transformer
from llama.offload import Offload, offload_of
from llama.parallel import groups
from llama.parallel.partition import Partition
from llama.quantization.scheme import Scheme

N_LAYERS, HALF = 6, 3


def write_deep(folder: Path) -> Path:
    """A checkpoint of `N_LAYERS` layers, with FFN columns for groups of 32 on two ranks."""
    return write_meta(folder, hf_model("2", num_hidden_layers=N_LAYERS, intermediate_size=192))


def loaded(
    folder: Path,
    n_offloaded: int,
    kind: str | None = None,
    split: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """This rank's shard, its linears quantized if a kind is given."""
    checkpoint, ranks = open_checkpoint(folder), groups.current()
    scheme = None if kind is None else Scheme.create(kind)
    partition = Partition.create(checkpoint.args, ranks.world_size, split, None if scheme is None else scheme.block)
    return load_model(checkpoint, partition, ranks, dtype, scheme, n_offloaded)


def streaming(model: Transformer) -> Offload:
    offload = offload_of(model)
    assert offload is not None
    return offload


def buffer_bytes(offload: Offload) -> int:
    """Bytes of the buffers on the device."""
    return sum(buffer.memory.nbytes for buffer in offload.buffers)
