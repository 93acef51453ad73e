"""What a run really allocates: bytes of tensors alive at a time, counted by torch's own profiler.

The profiler sees every allocation and release of torch's allocator, temporaries inside an operator
included. Allocations of libraries below it (oneDNN's scratchpads, gloo's buffers) are not torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from llama.checkpoint.activations import Workload, activation_bytes
from llama.checkpoint.load import materialise
from llama.checkpoint.opening import cut_model
from llama.checkpoint.widening import Kernels
from llama.config import ModelArgs
from llama.generation.adapted import prefix_of
from llama.generation.engine import Engine, Request
from llama.generation.sampling import Sampling
from llama.kernels import products
from llama.model import Transformer
from llama.offload import offload_blocks
from llama.parallel import groups
from llama.quantization.layers import quantize_layers
from llama.quantization.scheme import Scheme


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


GEOMETRIES = {
    "groups": ModelArgs(dim=256, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=2048, ffn_dim=704),
    "no groups": ModelArgs(dim=512, n_layers=2, n_heads=8, vocab_size=2048, ffn_dim=512),
    "wide FFN": ModelArgs(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=1024, ffn_dim=2048),
    "tiny": ModelArgs(dim=64, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=320, ffn_dim=176),
}


def frozen_shard(
    args: ModelArgs, dtype: torch.dtype, scheme: Scheme | None = None, n_offloaded: int = 0
) -> Transformer:
    """This rank's shard of a frozen model with random weights."""
    ranks = groups.current()
    partition = cut_model(args, scheme, ranks.world_size)
    model = Transformer(args, partition, ranks, device="meta", dtype=dtype).requires_grad_(False)
    if scheme is not None:
        quantize_layers(model, scheme)
    offload_blocks(model, n_offloaded)
    materialise(model, ranks.device)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("scales"):
            parameter.fill_(0.02 / 127 if parameter.dim() == 1 else 0.02 / 7)
        elif not parameter.is_floating_point():
            parameter.random_()
        elif parameter.dim() > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(1.0)
    return model


def counted(
    args: ModelArgs,
    work: Workload,
    dtype: torch.dtype,
    sampling: Sampling,
    scheme: Scheme | None = None,
    n_offloaded: int = 0,
) -> tuple[int, int]:
    """Activations of this rank: counted while the engine runs, and planned."""
    model = frozen_shard(args, dtype, scheme, n_offloaded)
    ranks, partition = model.ranks, model.partition
    prefix = prefix_of(model, torch.zeros(work.prefix, args.dim)) if work.prefix else None
    prompt = [1] * (work.length - 1)
    requests = [Request(index, prompt, 1, sampling) for index in range(work.n_prompts)]
    peak = peak_bytes(lambda: list(Engine(model, args.vocab_size, prefix).run(requests, work.n_prompts)))
    kernels = Kernels(dtype.itemsize, torch.get_num_threads(), native=products._loaded)
    held = model.new_cache(work.n_prompts, work.prefix + work.length).nbytes
    return peak - held, activation_bytes(partition, ranks.rank, work, kernels, scheme)
