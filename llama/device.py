"""Device, dtype and threads to compute with: chosen automatically or by name."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import torch

from llama import env
from llama.errors import DeviceError

DTYPES = {
    "fp32": torch.float32, "float32": torch.float32, "f32": torch.float32, "float": torch.float32,
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp16": torch.float16, "float16": torch.float16, "f16": torch.float16, "half": torch.float16,
}  # fmt: skip
# A model this small gains nothing from 16 bits on a CPU, and float32 gives the same text at every world size.
SMALL_MODEL_BYTES = 1 << 30


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """Return this rank's device: its own CUDA card, else MPS for one process, else the CPU.

    Args:
        device: "auto", "cpu", "cuda" (one card per local rank, shared when there are more ranks than cards),
            "cuda:N" or "mps".

    Raises:
        DeviceError: when the named device is not there.
    """
    if str(device) == "auto":
        if torch.cuda.is_available():
            return _own_card()
        return torch.device("mps" if torch.backends.mps.is_available() and env.world_size() == 1 else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda", "mps"):
        raise DeviceError(f"device {str(device)!r} is not one of auto, cpu, cuda, cuda:N, mps")
    if chosen.type == "cuda":
        return _check_cuda(chosen)
    if chosen.type == "mps":
        _check_mps()
    return chosen


def _own_card() -> torch.device:
    return torch.device("cuda", env.local_rank() % torch.cuda.device_count())


def _check_cuda(device: torch.device) -> torch.device:
    if not torch.cuda.is_available():
        raise DeviceError("device 'cuda' was asked for, but torch sees no CUDA card here: use --device cpu")
    if device.index is None:
        return _own_card()
    if device.index >= torch.cuda.device_count():
        raise DeviceError(f"device '{device}' was asked for, but there are {torch.cuda.device_count()} CUDA cards")
    return device


def _check_mps() -> None:
    if not torch.backends.mps.is_available():
        raise DeviceError("device 'mps' was asked for, but torch sees none here: use --device cpu")
    if env.world_size() > 1:
        raise DeviceError(f"device 'mps' serves one process, not {env.world_size()}: use --device cpu")


def choose_dtype(dtype: str | torch.dtype, device: torch.device, stored: torch.dtype, n_params: int) -> torch.dtype:
    """Return the dtype to compute in.

    "auto" is bfloat16 where the hardware computes it, else float16 on CUDA and MPS and float32 on a CPU. A CPU also
    keeps float32 for weights stored in float32, and for models under 1 GiB of float32.

    Args:
        dtype: "auto", "fp32", "bf16", "fp16" or a torch dtype.
        device: where to compute.
        stored: dtype of the weights on disk.
        n_params: parameters of the whole model.

    Raises:
        DeviceError: for an unknown name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        return parse_dtype(dtype, "auto, fp32, bf16, fp16")
    if device.type != "cpu":
        return torch.bfloat16 if has_native_bf16(device) else torch.float16
    small = n_params * torch.float32.itemsize < SMALL_MODEL_BYTES
    keep = small or stored in (torch.float32, torch.float64)
    return torch.float32 if keep or not has_native_bf16(device) else torch.bfloat16


def parse_dtype(name: str, known: str = "fp32, bf16, fp16") -> torch.dtype:
    """Return the dtype called `name`.

    Args:
        name: a key of `DTYPES`.
        known: the names that the error message offers.

    Raises:
        DeviceError: for an unknown name.
    """
    if name not in DTYPES:
        raise DeviceError(f"dtype {name!r} is not one of {known}")
    return DTYPES[name]


def has_native_bf16(device: torch.device) -> bool:
    """Return whether the hardware computes bfloat16; `torch.cuda.is_bf16_supported` also counts emulation."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        return "AVX512" in capability and bool(torch.cpu._is_avx512_bf16_supported())
    return False


def set_threads(threads: int | None = None) -> int:
    """Set this rank's threads, and return their number; torchrun alone would leave one thread to each rank.

    Args:
        threads: threads of this rank; None for the cores that this process may use, divided by the local ranks.
    """
    if threads is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cores // env.local_world_size())
    torch.set_num_threads(threads)
    return threads


def peak_memory(device: torch.device) -> int:
    """Return the peak in bytes: of the card's allocator on CUDA, else of the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        # The kernel's own high-water mark of this program; getrusage would include the program that started it.
        marks = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
        return next(int(words[1]) * 1024 for words in marks if words[0] == "VmHWM:")
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on a Mac


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for long sums: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
