"""Starting and ending the ranks: process groups, errors told by one voice, ranks that are lost.

A single process needs none of this: no group is started, every collective is the identity. Under
torchrun, `start` opens the default group (NCCL on cards of one's own, gloo otherwise), has fairscale
build the model- and data-parallel groups over it, and keeps a gloo group of its own for commands,
which may wait for a person for as long as they like.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

from llama import env
from llama.errors import LlamaError, PartitionError, RankLostError

# A command may be waited for while somebody thinks, or sleeps.
PATIENCE = timedelta(days=365)
# How long a rank waits for the others to reach the end of a phase (loading may take long).
PHASE_TIMEOUT = timedelta(hours=6)


@dataclass(frozen=True)
class Ranks:
    """This process among those that share one model.

    Args:
        rank, world_size: place within the model-parallel group and its size.
        group: the model-parallel group, None for one process.
        control: a gloo group over the same ranks for commands, with endless patience.
        device: where this rank computes.
    """

    rank: int = 0
    world_size: int = 1
    group: Any = None
    control: Any = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


_current = Ranks()
_store: Any = None
_phase = 0


def current() -> Ranks:
    """The ranks of this process's model; one rank without groups until `start` has run."""
    return _current


def connect() -> None:
    """Join the other processes' store, so that errors can be exchanged before any group exists.

    Does nothing for one process, and nothing a second time.
    """
    global _store
    if _store is not None or env.world_size() == 1:
        return
    store, rank, _ = next(iter(dist.rendezvous("env://", timeout=timedelta(minutes=5))))
    _store = dist.PrefixStore("llama", store)
    _store.set_timeout(PHASE_TIMEOUT)
    _store.set(f"who/{rank}", f"{socket.gethostname()} {os.getpid()}")
    _watch_for_sigterm()


def model_size(model_parallel_size: int | None = None) -> int:
    """Ranks that share one model: all processes, or a number that divides them.

    Raises:
        PartitionError: when it does not.
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
        model_parallel_size: ranks that share one model; None for all of them. It divides the
            number of processes; beyond one, the others hold copies of the model.

    Raises:
        PartitionError: when the size does not divide the number of processes, or differs from
            that of an earlier start.
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
    connect()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        store = dist.PrefixStore("groups", _store)
        rank = env.rank()
        dist.init_process_group(_backend(device), store=store, rank=rank, world_size=n_processes)
    _current = _model_groups(device, size)
    return _current


def _backend(device: torch.device) -> str:
    """NCCL where each local rank has a card of its own; two NCCL ranks cannot share one."""
    own_card = device.type == "cuda" and env.local_world_size() <= torch.cuda.device_count()
    return "nccl" if own_card and dist.is_nccl_available() else "gloo"


def _model_groups(device: torch.device, size: int) -> Ranks:
    from fairscale.nn.model_parallel import initialize as fairscale_groups

    # fairscale announces its groups on stdout, which belongs to the command's result.
    with contextlib.redirect_stdout(io.StringIO()):
        fairscale_groups.initialize_model_parallel(size)
    rank = fairscale_groups.get_model_parallel_rank()
    # Every process takes part in making every group, its own or not.
    control = None
    for first in range(0, dist.get_world_size(), size):
        members = list(range(first, first + size))
        group = dist.new_group(members, backend="gloo", timeout=PATIENCE)
        if dist.get_rank() in members:
            control = group
    if size == 1:
        return Ranks(device=device, control=control)
    return Ranks(rank, size, fairscale_groups.get_model_parallel_group(), control, device)


def stop() -> None:
    """Leave the groups; ranks that are done wait for each other so that none tears the others down."""
    global _current, _store
    if dist.is_initialized():
        from fairscale.nn.model_parallel import initialize as fairscale_groups

        fairscale_groups.destroy_model_parallel()
        dist.destroy_process_group()
    _current, _store = Ranks(), None


def broadcast_object(value: Any = None) -> Any:
    """Rank 0's `value` on every rank of the model, however long rank 0 takes."""
    ranks = current()
    if ranks.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=ranks.control, group_src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """The `value` of every rank of the model, in order, on every rank."""
    ranks = current()
    if ranks.world_size == 1:
        return [value]
    values: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(values, value, group=ranks.control)
    return values


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """A stretch of work that all processes finish together or not at all.

    An error that any of them meets is raised on all of them, with the words of the lowest rank that
    met one, so that no rank goes on to wait for ranks that have given up.

    Raises:
        LlamaError: this process's own error, or another's.
    """
    error: LlamaError | None = None
    try:
        yield
    except LlamaError as raised:
        error = raised
    agreed = _agree(name, error)
    if agreed is not None:
        raise agreed


def exchange(text: str) -> list[str]:
    """The `text` of every process, in order, before any group exists; every process makes this call.

    Raises:
        RankLostError: when a process goes away meanwhile.
    """
    global _phase
    size = env.world_size()
    if size == 1:
        return [text]
    connect()
    assert _store is not None
    _phase += 1
    key = f"exchange/{_phase}"
    _store.set(f"{key}/{env.rank()}", text)
    try:
        _store.wait([f"{key}/{other}" for other in range(size)], PHASE_TIMEOUT)
        return [_store.get(f"{key}/{other}").decode() for other in range(size)]
    except dist.DistError as lost:
        raise RankLostError(lost_message()) from lost


def _agree(name: str, error: LlamaError | None) -> LlamaError | None:
    """The error of the lowest rank that has one, the same on every process."""
    global _phase
    if env.world_size() == 1:
        return error
    connect()
    _phase += 1
    key, rank, size = f"phase/{_phase}/{name}", env.rank(), env.world_size()
    _store.set(f"{key}/{rank}", "" if error is None else f"{type(error).__name__}:{error}")
    try:
        _store.wait([f"{key}/{other}" for other in range(size)], PHASE_TIMEOUT)
    except dist.DistError as lost:
        raise RankLostError(lost_message(f"while waiting for the end of '{name}'")) from lost
    for other in range(size):
        text = _store.get(f"{key}/{other}").decode()
        if text:
            return error if other == rank else _rebuild(text)
    return None


def _rebuild(text: str) -> LlamaError:
    from llama import errors

    kind, _, message = text.partition(":")
    return getattr(errors, kind, LlamaError)(message)


def announce_spoken() -> None:
    """Rank 0: tell the others that the last line is printed, so that they may leave."""
    if _store is not None and env.rank() == 0:
        with contextlib.suppress(dist.DistError):
            _store.set("spoken", "yes")


def wait_for_speaker(seconds: float = 20.0) -> bool:
    """Other ranks: wait until rank 0 has spoken, since torchrun ends every rank as soon as one is gone.

    Returns:
        Whether it has; otherwise this rank must speak for itself.
    """
    if _store is None:
        return False
    try:
        _store.wait(["spoken"], timedelta(seconds=seconds))
    except dist.DistError:
        return False
    return True


# -- ranks that are lost ---------------------------------------------------------------------------


def lost_ranks() -> list[int]:
    """Ranks of this machine whose process is gone (or only waits to be buried)."""
    if _store is None:
        return []
    lost = []
    for rank in range(env.world_size()):
        try:
            if not _store.check([f"who/{rank}"]):
                continue
            host, pid = _store.get(f"who/{rank}").decode().split()
        except dist.DistError:
            break
        if host == socket.gethostname() and not _is_running(int(pid)):
            lost.append(rank)
    return lost


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def lost_message(when: str = "") -> str:
    """One line that names the ranks that are gone, as far as this machine can tell."""
    lost = lost_ranks()
    who = f"rank {', '.join(map(str, lost))} was lost" if lost else "another rank was lost"
    return (
        f"{who}{' ' + when if when else ''}; if it was killed (SIGKILL, exit code -9), the usual reason is "
        "memory: use more ranks, a smaller --max_batch_size or --max_seq_len, or a smaller --dtype"
    )


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because its peer went away, rather than by a bug."""
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return True
    signs = ("Connection closed by peer", "Connection reset by peer", "gloo", "Broken pipe", "NCCL")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _watch_for_sigterm() -> None:
    """Speak before torchrun's SIGTERM ends this rank, even while it is stuck in a collective.

    A signal handler in Python waits for the main thread to come back from C; a thread that reads
    the signal's wake-up pipe does not.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.siginterrupt(signal.SIGTERM, False)
    threading.Thread(target=_speak_at_sigterm, args=(read_end,), daemon=True).start()


def _speak_at_sigterm(read_end: int) -> None:
    while signal.SIGTERM not in os.read(read_end, 1):
        pass
    lost, me = lost_ranks(), env.rank()
    survivors = [rank for rank in range(env.world_size()) if rank not in lost]
    if lost and me == survivors[0]:
        print(f"error: {lost_message()}", file=sys.stderr, flush=True)
    elif survivors and me != survivors[0]:
        time.sleep(0.5)  # the first survivor speaks
    os._exit(2)
