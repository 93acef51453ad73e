"""Huge pages for large matrices, which cost fewer address translations when a whole matrix is read."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

ADVICE = 14  # MADV_HUGEPAGE, linux/mman-common.h
LEAST_BYTES = 4 << 20


def prefer_huge_pages(tensor: Tensor) -> None:
    """Ask Linux to back a tensor with pages of 2 MiB, before anything is written to it; elsewhere, do nothing.

    Reading all weights once, as a decode step does, was a tenth faster with huge pages (docs/speed.md). The system may
    ignore the advice.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or tensor.nbytes < LEAST_BYTES:
        return
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + tensor.nbytes - first) // page * page
    _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), ctypes.c_int(ADVICE))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
