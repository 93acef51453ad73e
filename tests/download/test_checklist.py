import hashlib
from pathlib import Path

import pytest

from llama.download import checklist
from llama.errors import CheckpointError


def md5(body: bytes) -> str:
    return hashlib.md5(body).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("consolidated.00.pth", "params.json", "tokenizer.model"):
        (tmp_path / name).write_bytes(name.encode())
    lines = [f"{md5(name.encode())}  {name}\n" for name in ("consolidated.00.pth", "params.json")]
    (tmp_path / "checklist.chk").write_text("".join(lines))
    (tmp_path / "tokenizer_checklist.chk").write_text(f"{md5(b'tokenizer.model').upper()} *tokenizer.model\n\n")
    return tmp_path


def test_a_good_folder_passes(folder: Path) -> None:
    told: list[int] = []
    assert checklist.verify(folder, told.append) == 3
    assert sum(told) == checklist.total_bytes(folder)


@pytest.mark.parametrize("name", ["consolidated.00.pth", "params.json", "tokenizer.model"])
def test_the_first_file_that_differs_or_is_missing_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"{name} differs"):
        checklist.verify(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        checklist.verify(folder)


def test_one_list_is_enough_and_none_is_not(folder: Path) -> None:
    (folder / "checklist.chk").unlink()
    assert checklist.verify(folder) == 1
    (folder / "tokenizer_checklist.chk").unlink()
    with pytest.raises(CheckpointError, match="neither"):
        checklist.verify(folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        checklist.verify(folder / "nowhere")


@pytest.mark.parametrize("name", ["../params.json", "/etc/passwd", "a/../../b", "..\\b"])
def test_names_stay_in_the_folder(folder: Path, name: str) -> None:
    (folder / "checklist.chk").write_text(f"{md5(b'')}  {name}\n")
    with pytest.raises(CheckpointError, match="outside its folder"):
        checklist.verify(folder)


@pytest.mark.parametrize("content", [b"", b"\n", b"<html>", b"abc  params.json", b"\xff\xfe"])
def test_what_is_no_list_is_told(folder: Path, content: bytes) -> None:
    (folder / "checklist.chk").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checklist\.chk (is no list|names no files)"):
        checklist.verify(folder)
