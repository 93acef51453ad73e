"""What a run really allocates: bytes of tensors alive at a time, counted by torch's own profiler.

The profiler sees every allocation and release of torch's allocator, temporaries inside an operator
included. Allocations of libraries below it (oneDNN's scratchpads, gloo's buffers) are not torch's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from llama.checkpoint.load import materialise
from llama.model import Transformer
from llama.offload import offload_blocks
from llama.parallel.groups import Ranks
from llama.parallel.partition import Partition
from llama.quantization.layers import quantize_layers
from llama.quantization.scheme import Scheme

DTYPE = torch.bfloat16  # what 16 bit is counted in
STAGE = "counted stage"
# The profiler would tell on stderr when it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes that were alive at once while `function` ran, beyond those alive before it."""
    return peaks(function)[0]


def peaks(*functions: Callable[[], Any]) -> list[int]:
    """The most bytes alive at once while each function ran, one after another, beyond those alive before the first."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as recorded:
        for function in functions:
            with record_function(STAGE):
                function()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() in ("[memory]", STAGE)]
    alive, found = 0, []
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == STAGE:
            found.append(alive)
            continue
        alive += event.nbytes()
        if found:
            found[-1] = max(found[-1], alive)
    return found


def empty_shard(
    partition: Partition, ranks: Ranks, dtype: torch.dtype, scheme: Scheme | None = None, n_offloaded: int = 0
) -> Transformer:
    """A rank's shard as it is held, its weights uninitialised: what they are does not change what a run takes."""
    model = Transformer(partition.args, partition, ranks, device="meta", dtype=dtype)
    if scheme is not None:
        quantize_layers(model, scheme)
    offload_blocks(model, n_offloaded)
    materialise(model, ranks.device)
    return model.eval()


def held_bytes(model: Transformer) -> int:
    """Bytes of the storages behind a model's parameters and buffers, each counted once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
