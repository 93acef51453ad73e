"""What a run really allocates: bytes of tensors alive at a time, counted by torch's own profiler.

The profiler sees every allocation and release of torch's allocator, temporaries inside an operator
included. Allocations of libraries below it (oneDNN's scratchpads, gloo's buffers) are not torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from llama.config import ModelArgs
from llama.model import Transformer
from llama.parallel import groups
from llama.parallel.partition import Partition


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes that were alive at once while `function` ran, beyond those alive before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as recorded:
        function()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def frozen_shard(args: ModelArgs, dtype: torch.dtype) -> Transformer:
    """This rank's shard of a frozen model with random weights."""
    ranks = groups.current()
    model = Transformer(args, Partition.create(args, ranks.world_size), ranks, dtype=dtype).requires_grad_(False)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)
    return model
