"""Copies from host memory to a device, begun ahead of use, with a count of the time spent waiting for them.

On CUDA, copies run on a stream of their own, from pinned memory; elsewhere a copy is done when `start` returns.
"""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama.errors import DeviceError

# Pairs of timing events that may pile up before their times are read.
OUTSTANDING = 1024
PORTABLE = 1  # cudaHostRegisterPortable: pinned for every card


@dataclass
class Overlap:
    """Totals of all copies: bytes, seconds, and the seconds not hidden behind other work.

    Args:
        n_bytes: bytes copied.
        copying: seconds that copies took.
        waiting: seconds for which the device was idle until a copy was done.
    """

    n_bytes: int = 0
    copying: float = 0.0
    waiting: float = 0.0

    @property
    def hidden(self) -> float:
        """The fraction of the copying time that nothing waited for, from 0 to 1."""
        return max(0.0, 1 - self.waiting / self.copying) if self.copying else 0.0


class Copies:
    """Copies that are done at once, as everywhere without CUDA.

    Attributes:
        overlap: totals of all copies; complete after `synchronize`.
    """

    def __init__(self) -> None:
        self.overlap = Overlap()

    @torch.no_grad()
    def start(self, target: Tensor, source: Tensor) -> Any:
        """Begin to copy `source` over `target`; return the handle to pass to `wait`."""
        started = time.perf_counter()
        target.copy_(source)
        seconds = time.perf_counter() - started
        self.overlap.n_bytes += source.nbytes
        self.overlap.copying += seconds
        self.overlap.waiting += seconds

    def wait(self, copy: Any) -> None:
        """Order everything issued from here on after the copy."""

    def synchronize(self) -> None:
        """Wait for all copies, so that `overlap` is complete."""


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
        """See `Copies.start`; the copy waits for work issued before, which may still read the target."""
        self.stream.wait_event(_mark(torch.cuda.current_stream(self.device)))
        with torch.cuda.stream(self.stream):
            begun = _mark(self.stream)
            target.copy_(source, non_blocking=True)
            done = _mark(self.stream)
        self.overlap.n_bytes += source.nbytes
        self._copying.append((begun, done))
        return done

    def wait(self, copy: Any) -> None:
        """See `Copies.wait`: the current stream waits, the caller does not."""
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
    """Main memory that is copied to a device: pinned for CUDA, ordinary for other devices.

    torch's own pinned allocator would round each size up to a power of two: up to twice the memory.

    Args:
        nbytes: size.
        device: the device that the memory is copied to.

    Attributes:
        content: [nbytes] uint8.

    Raises:
        DeviceError: when the system refuses to pin that much.
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
            # Runs before `content` is freed; at the end of the program the driver unpins by itself.
            weakref.finalize(self, _unpin, address).atexit = False


def _unpin(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
