"""The plan made before a model is loaded: refuse what cannot fit, warn of what may not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import torch

from llama import env
from llama.checkpoint.activations import Workload
from llama.checkpoint.memory import Memory, joined_memory, machine_memory, own_pool
from llama.checkpoint.needs import LASTING, Plan
from llama.checkpoint.plan import Planner, Setting, change, show_bytes
from llama.checkpoint.training import Training
from llama.config import ModelArgs
from llama.console import is_speaker, notice
from llama.errors import LlamaError
from llama.parallel import store
from llama.quantization.scheme import Scheme


def check_fit(
    args: ModelArgs,
    device: torch.device,
    dtype: torch.dtype,
    n_ranks: int,
    tensor_split: str | Sequence[float] | None,
    limits: Workload,
    expected: Workload | None = None,
    *,
    scheme: Scheme | None = None,
    stored: Scheme | None = None,
    offload_layers: int = 0,
) -> None:
    """Whether the model fits into the memory of all processes; every process makes this call.

    Args:
        args, device, dtype, n_ranks, tensor_split: of the run.
        limits: the most that may be run at a time; a `Training` is all of it going to be run.
        expected: what is going to be run, where that is known. The cache is made for the request, so
            without it only a cache for one prompt is sure to be needed.
        scheme: which weights are held as integers.
        stored: which of them the checkpoint itself holds so.
        offload_layers: layers whose weights stay in main memory.

    Raises:
        LlamaError: when weights and cache alone exceed the memory, or all that training needs; it names what
            would fit.
    """
    memory, host = _joined(device, copies=env.world_size() // n_ranks)
    if tensor_split is not None and not isinstance(tensor_split, str):
        tensor_split = ",".join(map(str, tensor_split))
    planner = Planner(args, device.type, memory, host, stored)
    # A request may turn out smaller than it could be; steps of training come by the thousand.
    one = dataclasses.replace(limits, n_prompts=1)
    sure, names = (limits, None) if isinstance(limits, Training) else (expected or one, LASTING)
    needed = planner.plan(Setting(n_ranks, sure, dtype, tensor_split, scheme, offload_layers))
    if not needed.fits(names):
        planner = dataclasses.replace(planner, memory=_all_memory(device, memory))
        raise LlamaError(f"{_too_much(needed, names)}{_advice(planner, needed)}; --no_plan skips this check")
    full = planner.plan(dataclasses.replace(needed.setting, work=expected or limits))
    if not full.fits():
        notice(f"memory may run out: {_too_much(full, None)}{_advice(planner, full)}")


def _joined(device: torch.device, copies: int) -> tuple[Memory, Memory | None]:
    """What all processes have where they compute, and the main memory beside their cards; a collective call."""
    own = [own_pool(device), *([own_pool(torch.device("cpu"))] if device.type == "cuda" else [])]
    told = [json.loads(text) for text in store.exchange(json.dumps(own))]
    memory, *host = (joined_memory([tuple(pool) for pool in pools], copies) for pools in zip(*told, strict=True))
    return memory, host[0] if host else None


def _all_memory(device: torch.device, memory: Memory) -> Memory:
    """The memory of this run, or of all cards where this machine has some to spare; asking them takes a while."""
    alone = is_speaker() and env.world_size() == env.local_world_size()
    spare = device.type == "cuda" and torch.cuda.device_count() > len(memory.sizes)
    return machine_memory(device) if alone and spare else memory


def _too_much(plan: Plan, names: Sequence[str] | None) -> str:
    pool = plan.worst(names)
    items = plan.ranks[pool.ranks[0]].items
    needs = [item for item in items if item.in_host == pool.is_host and (names is None or item.name in names)]
    who = f"rank {pool.ranks[0]} needs" if len(pool.ranks) == 1 else f"each of {len(pool.ranks)} ranks needs about"
    what = ", ".join(f"{show_bytes(item.nbytes)} for {item.name}" for item in needs)
    shared = " between them" if len(pool.ranks) > 1 else ""
    return f"{who} {what} ({plan.setting.work.words()}), but {show_bytes(pool.nbytes)} are there{shared}"


def _advice(planner: Planner, plan: Plan) -> str:
    ways = [change(setting, plan.setting) for setting in planner.advise(plan.setting)]
    if not ways:
        return "; nothing smaller would fit here: use more or larger cards or machines"
    return f"; what fits: {', or '.join(ways)}"
