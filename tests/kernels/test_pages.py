"""Large pages are advice: given for large tensors on Linux, and what lies there is as it was."""

import sys
from pathlib import Path

import pytest
import torch

from llama.kernels import pages

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.mark.skipif(sys.platform != "linux", reason="advice for Linux")
def test_a_large_tensor_is_advised_to_lie_in_large_pages() -> None:
    """The advice is what is ours: whether the system follows it depends on its free memory."""
    if not Path("/sys/kernel/mm/transparent_hugepage").is_dir():
        pytest.skip("this system has no transparent large pages")
    tensor = torch.empty(64 << 20, dtype=torch.uint8)
    pages.prefer_huge_pages(tensor)
    tensor.fill_(3)
    assert "hg" in _flags(tensor.data_ptr() + (32 << 20))
    assert (tensor == 3).all()


def _flags(address: int) -> list[str]:
    """Flags of the mapping that holds an address; `hg`: large pages were advised (proc(5), smaps)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition("-")
        if rest and " " in rest and not first.endswith(":"):
            inside = int(first, 16) <= address < int(rest.split()[0], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


def test_small_tensors_and_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("no advice was due")

    monkeypatch.setattr(pages, "_libc", refuse)
    pages.prefer_huge_pages(torch.empty(1000))
    pages.prefer_huge_pages(torch.empty(8 << 20, device="meta"))
    monkeypatch.setattr(sys, "platform", "darwin")
    pages.prefer_huge_pages(torch.empty(8 << 20))
