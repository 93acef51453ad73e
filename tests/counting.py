"""Shards with random weights, and the bytes that a run of them allocates beside those that are planned."""

from __future__ import annotations

import torch

from llama.adapters.soft_prompt import prefix_of
from llama.checkpoint.load import cut_model
from llama.config import ModelArgs
from llama.generation.engine import Engine, Request
from llama.generation.sampling import Sampling
from llama.kernels import products
from llama.model import Transformer
from llama.parallel import groups
from llama.plan.inference import Kernels, Workload, activation_bytes
from llama.quantization.scheme import Scheme
from scripts.bench.counters import empty_shard, peak_bytes

GEOMETRIES = {
    "groups": ModelArgs(dim=256, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=2048, ffn_dim=704),
    "no groups": ModelArgs(dim=512, n_layers=2, n_heads=8, vocab_size=2048, ffn_dim=512),
    "wide FFN": ModelArgs(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=1024, ffn_dim=2048),
    "tiny": ModelArgs(dim=64, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=320, ffn_dim=176),
}


def frozen_shard(
    args: ModelArgs, dtype: torch.dtype, scheme: Scheme | None = None, n_offloaded: int = 0
) -> Transformer:
    """Return this rank's shard of a frozen model with random weights."""
    ranks = groups.current()
    model = empty_shard(cut_model(args, scheme, ranks.world_size), ranks, dtype, scheme, n_offloaded)
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
    """Return the bytes of this rank's activations, counted while the engine runs and planned."""
    model = frozen_shard(args, dtype, scheme, n_offloaded)
    ranks, partition = model.ranks, model.partition
    prefix = prefix_of(model, torch.zeros(work.prefix, args.dim)) if work.prefix else None
    prompt = [1] * (work.length - 1)
    requests = [Request(index, prompt, 1, sampling) for index in range(work.n_prompts)]
    peak = peak_bytes(lambda: list(Engine(model, args.vocab_size, prefix).run(requests, work.n_prompts)))
    kernels = Kernels(dtype.itemsize, torch.get_num_threads(), native=products._loaded)
    held = model.new_cache(work.n_prompts, work.prefix + work.length).nbytes
    return peak - held, activation_bytes(partition, ranks.rank, work, kernels, scheme)
