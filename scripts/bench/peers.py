"""Peers: engines and training loops under comparison, each in processes of its own, driven over pipes.

A peer is a class with `load` and `run`; `engines.py` and `training_peers.py` hold all there are. To add a peer, write
such a class: what its methods import is imported in the peer's own processes only.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
from tqdm import tqdm

from llama.device import choose_device, peak_memory, set_threads
from llama.errors import LlamaError
from llama.quantization.scheme import Scheme

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Setup:
    """The way a peer is started.

    Args:
        folder: of the weights, in a layout that the peer reads.
        dtype: to compute in, one of `llama.device.DTYPES`.
        device: "cpu", "cuda" or "cuda:N".
        threads: CPU threads of the whole peer; ranks share them.
        world_size: ranks that share the model.
        tensor_split: weights of the ranks; None for equal ones.
        scheme: the way our engine quantizes the weights as they are read; None keeps them.
        compile: whether our engine compiles: auto, on or off.
        share_memory: whether our ranks exchange through memory where they can.
        amx: when llama.cpp uses its kernels for the processor's matrix units: always, in decode, or never.
    """

    folder: str
    dtype: str
    device: str
    threads: int
    world_size: int = 1
    tensor_split: str | None = None
    scheme: Scheme | None = field(default=None, kw_only=True)
    compile: str = field(default="auto", kw_only=True)
    share_memory: bool = field(default=True, kw_only=True)
    amx: str = field(default="always", kw_only=True)


@dataclass(frozen=True)
class Timing:
    """One measured run of a batch.

    Args:
        prefill_seconds: from the prompts to the first new token of each.
        decode_seconds: of the new tokens after the first.
        tokens: the new tokens of each prompt.
    """

    prefill_seconds: float
    decode_seconds: float
    tokens: list[list[int]]


class Peer(Protocol):
    """An engine in its own process; `load` comes once, `run` often."""

    def load(self, setup: Any) -> None:
        """Read the weights; `setup` is a `Setup` or a subclass of it."""

    def run(self, *task: Any) -> Any:
        """Measure one run, such as greedy decoding of a first token and `new_tokens` more for every prompt."""


@dataclass(frozen=True)
class Kind:
    """A sort of peer, under the name that the report gives it.

    Args:
        make: its class.
        label: the name in tables and charts.
        package: the package whose version is reported; None for this repository.
    """

    make: type[Peer]
    label: str
    package: str | None = None

    @property
    def version(self) -> str:
        """The installed version of the package behind the peer."""
        try:
            return importlib.metadata.version(self.package or "llama-shards")
        except importlib.metadata.PackageNotFoundError:
            return "not installed"


def choose_bench_device(device: str) -> torch.device:
    """Return the device of all peers: CUDA where there is a card, else the CPU.

    Raises:
        LlamaError: for a device that is not there, or one whose time and memory are not measured.
    """
    chosen = choose_device(device)
    if device == "auto" and chosen.type == "mps":
        return torch.device("cpu")
    if chosen.type == "mps":
        raise LlamaError("device 'mps' is not measured: use --device cpu")
    return chosen


def synchronize(device: torch.device) -> None:
    """Wait until the card has done its work, so that the clock counts it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- memory ----------------------------------------------------------------------------------------


def _resident() -> int:
    """Return the bytes of this process's resident set now, mapped pages counted; 0 where the system does not tell."""
    return _status_bytes("VmRSS") or 0


def _peak(device: torch.device) -> int:
    """Return the bytes at the peak: of the card's allocator on CUDA, else of the resident set.

    `ru_maxrss` is not asked where Linux can tell: a process inherits the peak of the one that started it.
    """
    if device.type == "cuda":
        return peak_memory(device)
    return _status_bytes("VmHWM") or peak_memory(device)


def _status_bytes(name: str) -> int | None:
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith(f"{name}:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


# -- processes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A rank's report on loading: seconds taken, and bytes resident before."""

    seconds: float
    baseline_bytes: int


@dataclass(frozen=True)
class Memory:
    """Bytes that a rank holds, at the peak and now."""

    peak_bytes: int
    resident_bytes: int


def _serve(kind: Kind, setup: Setup, rank: int, port: int, pipe: Connection) -> None:
    """Be one rank of a peer: load, then answer tasks until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends this process
    tqdm.set_lock(threading.RLock())  # tqdm's default lock would be left behind in the system
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(setup.world_size), "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(setup.world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    try:
        device = choose_device(setup.device)
        set_threads(max(1, setup.threads // setup.world_size))
        before, started = _resident(), time.perf_counter()
        peer = kind.make()
        peer.load(setup)
        synchronize(device)
        pipe.send((True, Loaded(time.perf_counter() - started, before)))
        while (task := pipe.recv()) is not None:
            pipe.send((True, Memory(_peak(device), _resident()) if task == "memory" else peer.run(*task)))
    except EOFError:
        pass
    except LlamaError as error:
        pipe.send((False, error))
    except Exception:
        pipe.send((False, RuntimeError(traceback.format_exc())))
    os._exit(0)


class Running:
    """A peer in processes of its own, which a `with` statement starts and ends.

    Args:
        name: a key of `kinds`.
        setup: the way it is started.
        kinds: all sorts of peers by name.
    """

    def __init__(self, name: str, setup: Setup, kinds: Mapping[str, Kind]) -> None:
        self.name, self.setup, self.kind = name, setup, kinds[name]
        self.loaded: list[Loaded] = []
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []

    def __enter__(self) -> Running:
        context = multiprocessing.get_context("spawn")
        port = _free_port()
        try:
            for rank in range(self.setup.world_size):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(self.kind, self.setup, rank, port, theirs), daemon=True)
                process.start()
                theirs.close()
                self.pipes.append(ours)
                self.processes.append(process)
            self.loaded = self._answers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def run(self, prompts: Prompts, new_tokens: int) -> Timing:
        """Measure one run; the slowest rank's time counts."""
        timings = self.ask((prompts, new_tokens))
        return Timing(
            max(timing.prefill_seconds for timing in timings),
            max(timing.decode_seconds for timing in timings),
            timings[0].tokens,
        )

    def memory(self) -> list[Memory]:
        """Return what each rank holds, in order."""
        return self.ask("memory")

    def ask(self, task: Any) -> list[Any]:
        """Call `run(*task)` on each rank; return the answers in order."""
        for pipe in self.pipes:
            pipe.send(task)
        return self._answers()

    def _answers(self) -> list[Any]:
        """Return one answer a rank; raise the first failure."""
        answers: dict[int, Any] = {}
        while len(answers) < len(self.pipes):
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]
            for pipe in multiprocessing.connection.wait(waiting):
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                good, answers[rank] = self._receive(rank)
                if not good:
                    raise answers[rank]
        return [answers[rank] for rank in range(len(self.pipes))]

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            return self.pipes[rank].recv()
        except EOFError:
            self.processes[rank].join(5)
            code = self.processes[rank].exitcode
            raise LlamaError(
                f"the peer '{self.kind.label}' (rank {rank}) ended with code {code}; if it was killed (-9), the "
                "usual reason is memory: take a smaller --geometry or --dtype"
            ) from None


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
