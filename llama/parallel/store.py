"""The key-value store of all processes, usable before any group exists and after one has failed; lost ranks."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta

import psutil
import torch.distributed as dist

from llama import env
from llama.errors import LlamaError, RankLostError

# Time that a rank waits for the others to reach the end of a phase (loading may take long).
PHASE_TIMEOUT = timedelta(hours=6)

_store: dist.Store | None = None
_line: dist.Store | None = None
_n_exchanges = 0


def connect() -> None:
    """Join the other processes' store, so that errors can be exchanged before any group exists.

    A single process joins nothing, and a second call does nothing.

    Raises:
        LlamaError: when the environment announces other processes but not the store's address.
    """
    global _store, _line
    if _store is not None or env.world_size() == 1:
        return
    # Two connections: one is blocked for as long as a thread waits on it.
    _store, _line = _join(), _join()
    _store.set_timeout(PHASE_TIMEOUT)
    _line.set(f"who/{env.rank()}", f"{socket.gethostname()} {os.getpid()}")


def _join() -> dist.Store:
    try:
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=timedelta(minutes=5))))
    except ValueError:
        raise LlamaError(
            f"the environment announces {env.world_size()} processes (WORLD_SIZE) but not where they meet: "
            "start them with torchrun, or unset WORLD_SIZE for one process"
        ) from None
    return dist.PrefixStore("llama", store)


def line() -> dist.Store | None:
    """Return a second connection to the store, free while the main thread waits; None for one process."""
    return _line


def exchange(text: str, name: str = "exchange") -> list[str]:
    """Return the `text` of every process, in rank order; a collective call that needs no process group.

    Args:
        text: of this process; lone surrogates become escapes.
        name: subject of the exchange, part of its keys: processes that exchange different subjects do not match.

    Raises:
        RankLostError: when a process goes away meanwhile.
    """
    global _n_exchanges
    if env.world_size() == 1:
        return [text]
    connect()
    assert _store is not None
    _n_exchanges += 1
    keys = [f"{name}/{_n_exchanges}/{rank}" for rank in range(env.world_size())]
    try:
        _store.set(keys[env.rank()], text.encode(errors="backslashreplace").decode())
        _store.wait(keys, PHASE_TIMEOUT)
        return [_store.get(key).decode() for key in keys]
    except dist.DistError as lost:
        raise RankLostError(lost_message()) from lost


def for_groups() -> dist.Store:
    """Return the part of the store for the process groups that are opened next."""
    connect()
    assert _store is not None
    return dist.PrefixStore(f"groups/{_n_exchanges}", _store)


def leave() -> None:
    """Leave the store once every process is ready to."""
    global _store, _line
    if _store is not None:
        exchange("", "end")
    _store = _line = None


# -- ranks that are lost ---------------------------------------------------------------------------


def lost_ranks(patience: float = 0.0) -> list[int]:
    """Return the ranks of this machine whose process has ended, zombies included.

    Args:
        patience: seconds to keep looking for one: a connection may close a moment before its process ends.
    """
    end = time.monotonic() + patience
    while True:
        lost = [rank for rank in range(env.world_size()) if _is_lost(rank)]
        if lost or time.monotonic() >= end:
            return lost
        time.sleep(0.02)


def _is_lost(rank: int) -> bool:
    if _line is None:
        return False
    try:
        if not _line.check([f"who/{rank}"]):
            return False
        host, pid = _line.get(f"who/{rank}").decode().split()
    except dist.DistError:
        return False
    return host == socket.gethostname() and not _is_running(int(pid))


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def lost_message(patience: float = 0.0) -> str:
    """Return one line that names the lost ranks, as far as this machine can tell."""
    lost = lost_ranks(patience)
    who = f"rank {', '.join(map(str, lost))} was lost" if lost else "another rank was lost"
    return (
        f"{who}; if it was killed (SIGKILL, exit code -9), the usual reason is memory: "
        "use more ranks, a smaller --max_batch_size or --max_seq_len, or a smaller --dtype"
    )


def is_lost_peer(error: BaseException) -> bool:
    """Return whether a collective failed because its peer went away, rather than by a bug."""
    if isinstance(error, RankLostError | dist.DistNetworkError | dist.DistStoreError):
        return True
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
