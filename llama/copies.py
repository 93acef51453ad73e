"""Copies from host memory to a device, begun ahead of use, and how long they were waited for.

On CUDA they run on a stream of their own, from pinned memory; elsewhere they are done when `start` returns.
"""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama.errors import DeviceError

# Pairs of events whose times may be outstanding before they are looked at.
OUTSTANDING = 1024
PORTABLE = 1  # cudaHostRegisterPortable: pinned for every card


@dataclass
class Overlap:
    """How much of the copying was hidden behind other work.

    Args:
        n_bytes: bytes that were copied.
        copying: seconds that they took.
        waiting: seconds for which the device stood still until one was done.
    """

    n_bytes: int = 0
    copying: float = 0.0
    waiting: float = 0.0

    @property
    def hidden(self) -> float:
        """The part of the copying that nobody waited for, from 0 to 1."""
        return max(0.0, 1 - self.waiting / self.copying) if self.copying else 0.0


class Copies:
    """Copies that are done at once: what there is without CUDA.

    Attributes:
        overlap: what was copied; complete after `synchronize`.
    """

    def __init__(self) -> None:
        self.overlap = Overlap()

    @torch.no_grad()
    def start(self, target: Tensor, source: Tensor) -> Any:
        """Begin to copy `source` over `target`; what is to be handed to `wait`."""
        started = time.perf_counter()
        target.copy_(source)
        seconds = time.perf_counter() - started
        self.overlap.n_bytes += source.nbytes
        self.overlap.copying += seconds
        self.overlap.waiting += seconds

    def wait(self, copy: Any) -> None:
        """What is issued from here on finds the copy done."""

    def synchronize(self) -> None:
        """Wait until all times are known."""


class StreamedCopies(Copies):
    """Copies on a stream of their own, timed by events on the card.

    Args:
        device: the card.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.stream = device, torch.cuda.Stream(device)
        self._copying: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._waiting: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @torch.no_grad()
    def start(self, target: Tensor, source: Tensor) -> Any:
        """See `Copies.start`; what was issued before may still read the target."""
        self.stream.wait_event(_mark(torch.cuda.current_stream(self.device)))
        with torch.cuda.stream(self.stream):
            begun = _mark(self.stream)
            target.copy_(source, non_blocking=True)
            done = _mark(self.stream)
        self.overlap.n_bytes += source.nbytes
        self._copying.append((begun, done))
        return done

    def wait(self, copy: Any) -> None:
        """See `Copies.wait`: the stream waits, the caller does not."""
        stream = torch.cuda.current_stream(self.device)
        before = _mark(stream)
        stream.wait_event(copy)
        self._waiting.append((before, _mark(stream)))
        if len(self._waiting) > OUTSTANDING:
            self.synchronize()

    def synchronize(self) -> None:
        """See `Copies.synchronize`."""
        torch.cuda.synchronize(self.device)
        self.overlap.copying += _seconds(self._copying)
        self.overlap.waiting += _seconds(self._waiting)
        self._copying, self._waiting = [], []


def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


def _seconds(pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> float:
    return sum(begun.elapsed_time(done) for begun, done in pairs) / 1000


class HostMemory:
    """Main memory from which a device is fed: pinned for CUDA, else as any other.

    torch's own pinned allocator would round each size up to a power of two: up to twice the memory.

    Args:
        nbytes: how much.
        device: what is fed from it.

    Attributes:
        content: [nbytes] uint8.

    Raises:
        DeviceError: when the system does not pin so much.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.content = torch.empty(nbytes, dtype=torch.uint8)
        if device.type == "cuda":
            address = self.content.data_ptr()
            error = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, PORTABLE))
            if error:
                raise DeviceError(
                    f"the system would not pin {nbytes / 1e6:.0f} MB of main memory for a layer (CUDA error {error}): "
                    "offload fewer layers with --offload_layers"
                )
            # Called while `content` is still there; at the end of the program the driver does it.
            weakref.finalize(self, _unpin, address).atexit = False


def _unpin(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
