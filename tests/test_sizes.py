"""Sizes as people write them, and as they are told."""

import shutil
from pathlib import Path

import pytest

from llama.errors import DownloadError, LlamaError
from llama.sizes import UNITS, check_space, parse_bytes, show_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("8GB", 8e9), ("8GiB", 8 * 2**30), ("8000MB", 8e9), ("1.5 gb", 1.5e9), ("24G", 24e9), ("512KiB", 2**19)],
)
def test_sizes(text: str, nbytes: float) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["8", "", "GB", "-8GB", "0GB", "8GBit", "8XB", "nan GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(LlamaError, match="is not a size"):
        parse_bytes(text)


def test_a_bare_number_is_bytes_where_the_units_say_so() -> None:
    assert parse_bytes("7", UNITS) == 7
    assert parse_bytes("8MB", UNITS) == 8_000_000


def test_units_that_are_not_taken_are_refused() -> None:
    with pytest.raises(LlamaError, match="is not a size"):
        parse_bytes("5 TB", ("GB", "GIB"))


def test_small_sizes_are_shown_in_megabytes() -> None:
    assert [show_bytes(n) for n in (13_476_831_232, 1e8, 99_999_999, -2e9)] == [
        "13.48 GB", "0.10 GB", "100.00 MB", "-2.00 GB"
    ]  # fmt: skip


def test_the_disk_is_that_of_the_nearest_folder_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def usage(place: Path) -> object:
        asked.append(place)
        return shutil._ntuple_diskusage(10**10, 10**10 - 1000, 1000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    check_space(tmp_path / "new" / "folder", 1000, "", "")
    assert asked == [tmp_path.resolve()]
    with pytest.raises(DownloadError) as caught:
        check_space(tmp_path, 1001, "too much", "stop", DownloadError)
    assert str(caught.value) == f"too much, but {tmp_path.resolve()} has 0.00 GB free: stop or make room"
