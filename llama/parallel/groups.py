"""Process groups: started and stopped, with shared memory, object exchange, and errors raised on all ranks alike.

A single process starts no group, and every collective is the identity. Under torchrun, `start` opens the default group
(NCCL where every rank has a card of its own, else gloo), has fairscale build the model- and data-parallel groups over
it, and opens a gloo control group for commands, which may wait for a person without a timeout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama import env
from llama.env import notice
from llama.errors import LlamaError, PartitionError
from llama.kernels import shared
from llama.parallel import store

# Timeout of the control group: a command may have to wait until a person types.
PATIENCE = timedelta(days=365)


@dataclass(frozen=True)
class Ranks:
    """This process's place among the processes that share one model.

    Args:
        rank, world_size: place in the model-parallel group, and the group's size.
        group: the model-parallel group; None for one process.
        control: a gloo group over the same ranks for commands, without a timeout.
        device: where this rank computes.
        segment: handle of the shared memory of these ranks; None without it. See `share_memory`.
        replicas: place among the processes that hold the same shard in other copies of the model (data parallelism);
            None where there is one copy.
    """

    rank: int = 0
    world_size: int = 1
    group: Any = None
    control: Any = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    segment: int | None = None
    replicas: Ranks | None = None


_current = Ranks()


def current() -> Ranks:
    """Return this process's ranks; a single rank without groups until `start` has run."""
    return _current


def model_size(model_parallel_size: int | None = None) -> int:
    """Return how many ranks share one model: all processes for None, else the size asked for.

    Raises:
        PartitionError: when the size does not divide the number of processes.
    """
    n_processes = env.world_size()
    size = n_processes if model_parallel_size is None else model_parallel_size
    if size < 1 or n_processes % size:
        raise PartitionError(f"model_parallel_size {size} does not divide the {n_processes} processes")
    return size


def start(device: torch.device, model_parallel_size: int | None = None) -> Ranks:
    """Open the process groups of this run; a second call with the same size returns the same ranks.

    Args:
        device: where this rank computes.
        model_parallel_size: ranks that share one model, a divisor of the number of processes; None for all of them.
            The other processes hold copies of the model.

    Raises:
        PartitionError: when the size does not divide the number of processes, or differs from the size of an earlier
            start.
    """
    global _current
    size, n_processes = model_size(model_parallel_size), env.world_size()
    if n_processes == 1:
        _current = Ranks(device=device)
        return _current
    if dist.is_initialized() and _current.control is not None:
        if _current.world_size != size:
            raise PartitionError(f"the groups were started for {_current.world_size} ranks, not {size}")
        return _current
    hosts = store.exchange(f"{socket.gethostname()} {device}", "device")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group(
            choose_backend(hosts), store=store.for_groups(), rank=env.rank(), world_size=n_processes
        )
    _current = _model_groups(device, size)
    return _current


def choose_backend(devices: Sequence[str]) -> str:
    """Return "nccl" where every rank has a CUDA card of its own, which NCCL demands; else "gloo".

    Args:
        devices: every rank's device, as "host cuda:0".
    """
    own_cards = len(set(devices)) == len(devices) and all(" cuda" in device for device in devices)
    return "nccl" if own_cards and dist.is_nccl_available() else "gloo"


def _model_groups(device: torch.device, size: int) -> Ranks:
    from fairscale.nn.model_parallel import initialize as fairscale_groups

    # fairscale prints its groups to stdout, which is kept for the command's result.
    with contextlib.redirect_stdout(io.StringIO()):
        fairscale_groups.initialize_model_parallel(size)
    rank = fairscale_groups.get_model_parallel_rank()
    # torch wants every process in every `new_group` call, member or not.
    control = None
    for first in range(0, dist.get_world_size(), size):
        members = list(range(first, first + size))
        group = dist.new_group(members, backend="gloo", timeout=PATIENCE)
        if dist.get_rank() in members:
            control = group
    replicas = None
    if dist.get_world_size() > size:
        place, group = fairscale_groups.get_data_parallel_rank(), fairscale_groups.get_data_parallel_group()
        replicas = Ranks(place, dist.get_world_size() // size, group, None, device)
    if size == 1:
        return Ranks(device=device, control=control, replicas=replicas)
    return Ranks(rank, size, fairscale_groups.get_model_parallel_group(), control, device, replicas=replicas)


def share_memory(wanted: bool = True) -> Ranks:
    """Switch the model's collectives to shared memory where all ranks can; return the ranks as they are from now on.

    All ranks can where they compute on the CPU of one Linux machine that has a C++ compiler. A collective call: no code
    before it may fail on one rank alone.

    Args:
        wanted: whether this rank wants shared memory, which is used only where all ranks do.
    """
    global _current
    ranks = _current
    if ranks.world_size == 1 or ranks.segment is not None:
        return ranks
    able = wanted and ranks.device.type == "cpu" and shared.available()
    told = gather_objects((socket.gethostname() if able else "", os.getpid()))
    hosts, pids = {host for host, _ in told}, [pid for _, pid in told]
    if "" in hosts or len(hosts) > 1:
        return ranks
    path = broadcast_object(_create_segment(ranks.world_size) if ranks.rank == 0 else None)
    if path is None:
        return ranks
    segment = _open_segment(path, ranks, pids)
    everybody = None not in gather_objects(segment)
    if ranks.rank == 0:
        path.unlink()
    if everybody:
        _current = dataclasses.replace(ranks, segment=segment)
    elif segment is not None:
        shared.close_segment(segment)
    return _current


def _create_segment(world_size: int) -> Path | None:
    try:
        return shared.create_segment(world_size)
    except OSError as error:
        notice(f"no memory for ranks to share ({error.strerror}): they exchange through gloo, slower")
        return None


def _open_segment(path: Path, ranks: Ranks, pids: Sequence[int]) -> int | None:
    """Open the segment; None in a container of its own, which has other files or does not see the other processes."""
    if not all(Path("/proc", str(pid)).exists() for pid in pids):
        return None
    try:
        return shared.open_segment(path, ranks.rank, ranks.world_size)
    except RuntimeError:
        return None


def stop() -> None:
    """Leave the groups, once every rank is ready to: the first to go would break the others' connections."""
    global _current
    store.leave()
    if _current.segment is not None:
        shared.close_segment(_current.segment)
    if dist.is_initialized():
        from fairscale.nn.model_parallel import initialize as fairscale_groups

        fairscale_groups.destroy_model_parallel()
        dist.destroy_process_group()
    _current = Ranks()


def broadcast_object(value: Any = None) -> Any:
    """Return rank 0's `value` on every rank of the model, however long rank 0 takes."""
    ranks = current()
    if ranks.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=ranks.control, group_src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Return the `value` of every rank of the model, in rank order, on every rank."""
    ranks = current()
    if ranks.world_size == 1:
        return [value]
    values: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(values, value, group=ranks.control)
    return values


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Run the body on all processes, which finish it together or not at all.

    A `LlamaError` on any process is raised on all processes, with the message of the lowest rank that met one, so that
    no rank waits for ranks that have given up. An `OSError` that names a file counts as such an error.

    Raises:
        LlamaError: this process's own error, or another process's.
    """
    error: LlamaError | None = None
    try:
        yield
    except LlamaError as raised:
        error = raised
    except OSError as raised:
        if raised.filename is None:
            raise
        error = LlamaError(f"cannot use {raised.filename}: {raised.strerror}")
    agreed = _agree(name, error)
    if agreed is not None:
        raise agreed


def _agree(name: str, error: LlamaError | None) -> LlamaError | None:
    """Return the error of the lowest rank that has one, the same on every process; None where no rank has."""
    if env.world_size() == 1:
        return error
    texts = store.exchange("" if error is None else f"{type(error).__name__}:{error}", f"phase/{name}")
    first = next((rank for rank, text in enumerate(texts) if text), None)
    if first is None:
        return None
    return error if first == env.rank() else _rebuild(texts[first])


def _rebuild(text: str) -> LlamaError:
    from llama import errors

    kind, _, message = text.partition(":")
    return getattr(errors, kind, LlamaError)(message)
