"""Large pages are advice: given for large tensors on Linux, and what lies there is as it was."""

import sys
from pathlib import Path

import pytest
import torch

from llama.kernels import pages


@pytest.mark.skipif(sys.platform != "linux", reason="advice for Linux")
def test_a_large_tensor_is_backed_by_large_pages() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system has no transparent large pages")
    tensor = torch.empty(64 << 20, dtype=torch.uint8)
    pages.prefer_huge_pages(tensor)
    tensor.fill_(3)
    assert _huge_bytes(tensor.data_ptr() + (32 << 20)) >= 32 << 20
    assert (tensor == 3).all()


def _huge_bytes(address: int) -> int:
    """Bytes in large pages of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition("-")
        if rest and " " in rest and not first.endswith(":"):
            inside = int(first, 16) <= address < int(rest.split()[0], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    return 0


def test_small_tensors_and_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("no advice was due")

    monkeypatch.setattr(pages, "_libc", refuse)
    pages.prefer_huge_pages(torch.empty(1000))
    pages.prefer_huge_pages(torch.empty(8 << 20, device="meta"))
    monkeypatch.setattr(sys, "platform", "darwin")
    pages.prefer_huge_pages(torch.empty(8 << 20))
