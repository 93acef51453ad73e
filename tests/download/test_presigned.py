import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import web as internet
from web import Web, break_off, status

from llama.download import checklist, models, presigned
from llama.download.presigned import Link
from llama.download.transfer import Patience
from llama.errors import CheckpointError, DownloadError, LlamaError

QUICK = Patience(tries=3, pause=0.01, longest_pause=0.02, timeout=60.0)
QUERY = "?Policy=abc&Signature=hush*&Key-Pair-Id=K"
SHARDS = {f"consolidated.{shard:02d}.pth": bytes([shard]) * 150_000 for shard in range(2)}
PARAMS = json.dumps({"dim": 64}).encode()
MODEL = models.find("llama-2-13b-chat")


def sums(files: dict[str, bytes]) -> bytes:
    return "".join(f"{hashlib.md5(body).hexdigest()}  {name}\n" for name, body in files.items()).encode()


@pytest.fixture
def web() -> Iterator[Web]:
    """Meta's server with Llama 2 13B chat, whose tokenizer lies beside the models."""
    model = {**SHARDS, "params.json": PARAMS}
    model["checklist.chk"] = sums(model)
    files = {f"/llama-2-13b-chat/{name}": body for name, body in model.items()}
    files |= {"/tokenizer.model": b"spm", "/tokenizer_checklist.chk": sums({"tokenizer.model": b"spm"})}
    with internet.serving(Web(files)) as web:
        yield web


def download(web: Web, folder: Path, model: models.Published = MODEL) -> None:
    presigned.download(Link.parse(f"{web.url}/*{QUERY}"), model, folder, QUICK)


def fails(web: Web, folder: Path, **options) -> str:
    with pytest.raises(LlamaError) as caught:
        download(web, folder, **options)
    assert "hush" not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_model_arrives_with_its_checklists(web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "ckpts" / "13b"
    download(web, folder)
    assert names(folder) == {*SHARDS, "params.json", "checklist.chk", "tokenizer.model", "tokenizer_checklist.chk"}
    assert checklist.verify(folder) == 4
    assert all(asked.query == QUERY[1:] for asked in web.asked)
    shown = capsys.readouterr().err
    assert "300k" in shown
    assert "hush" not in shown


def test_a_second_run_fetches_nothing(web: Web, tmp_path: Path) -> None:
    download(web, tmp_path)
    web.asked.clear()
    download(web, tmp_path)
    assert {asked.path for asked in web.asked if asked.span != internet.PROBE} == {
        "/llama-2-13b-chat/checklist.chk",
        "/tokenizer_checklist.chk",
    }


def test_an_interrupted_run_is_continued_and_does_not_look_whole(web: Web, tmp_path: Path) -> None:
    second = "/llama-2-13b-chat/consolidated.01.pth"
    web.faults[second] = [break_off(100_000)] + [status(500)] * 9
    assert "consolidated.01.pth" in fails(web, tmp_path)
    assert "params.json" not in names(tmp_path)
    assert "consolidated.01.pth.partial" in names(tmp_path)
    web.faults.clear()
    download(web, tmp_path)
    assert web.spans(second)[-1] == "bytes=65536-"
    assert checklist.verify(tmp_path) == 4


def test_llama_3_has_its_tokenizer_in_the_folder(web: Web, tmp_path: Path) -> None:
    files = {"tokenizer.model": b"bpe", "consolidated.00.pth": b"weights", "params.json": PARAMS}
    files["checklist.chk"] = sums(files)
    web.files = {f"/8b_pre_trained/{name}": body for name, body in files.items()}
    download(web, tmp_path, model=models.find("llama-3-8b"))
    assert names(tmp_path) == set(files)


@pytest.mark.parametrize("name", ["checklist.chk", "consolidated.01.pth", "params.json"])
def test_an_expired_link_is_told(web: Web, tmp_path: Path, name: str) -> None:
    web.statuses[f"/llama-2-13b-chat/{name}"] = (403, {})
    said = fails(web, tmp_path / "new")
    assert "403: the link has expired" in said
    assert "ask for a new one" in said
    assert not (tmp_path / "new").exists()


def test_a_damaged_shard_is_not_kept(web: Web, tmp_path: Path) -> None:
    web.files["/llama-2-13b-chat/consolidated.00.pth"] = b"x" * 150_000
    assert "consolidated.00.pth came damaged" in fails(web, tmp_path)
    assert not [name for name in names(tmp_path) if "consolidated" in name or name == "params.json"]


@pytest.mark.parametrize("name", ["consolidated.00.pth", "checklist.chk", "params.json"])
@pytest.mark.parametrize("length", [5, 150_000])
def test_files_of_something_else_are_left_alone(web: Web, tmp_path: Path, name: str, length: int) -> None:
    (tmp_path / name).write_bytes(b"y" * length)
    assert f"{name} exists and is not the server's" in fails(web, tmp_path)
    assert names(tmp_path) == {name}
    assert (tmp_path / name).read_bytes() == b"y" * length


def test_a_list_of_another_model_is_refused(web: Web, tmp_path: Path) -> None:
    web.files["/llama-2-13b-chat/checklist.chk"] = sums({"consolidated.00.pth": b""})
    with pytest.raises(CheckpointError, match=r"does not name consolidated\.01\.pth"):
        download(web, tmp_path)
    web.files["/llama-2-13b-chat/checklist.chk"] = b"<html>please log in</html>"
    assert "no list of md5 sums" in fails(web, tmp_path)
    assert names(tmp_path) == set()


def test_the_disk_is_asked_first(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=149_500))
    assert "0.00 GB free" in fails(web, tmp_path)
    assert names(tmp_path) == set()
    (tmp_path / "consolidated.00.pth").write_bytes(SHARDS["consolidated.00.pth"])
    (tmp_path / "consolidated.01.pth.partial").write_bytes(SHARDS["consolidated.01.pth"][:1000])
    download(web, tmp_path)


def test_a_folder_that_cannot_be_made_is_told(web: Web, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write" in fails(web, tmp_path / "file" / "folder")


@pytest.mark.parametrize("text", ["https://host/*?Signature=hush", " 'https://host/\\*?Signature=hush'\n",
                                  "https://host/%2A?Signature=hush"])  # fmt: skip
def test_links_are_read_as_they_are_pasted(text: str) -> None:
    link = Link.parse(text)
    assert link.file("7B/params.json").url == "https://host/7B/params.json?Signature=hush"
    assert link.host == "host"
    assert "hush" not in repr(link)


@pytest.mark.parametrize("text", ["", "host/*?Signature=hush", "https://host/?Signature=hush*", "https:///*?Signature=hush",
                                  "ftp://host/*?Signature=hush", "https://[x/*?Signature=hush"])  # fmt: skip
def test_what_is_no_link_is_told_but_not_repeated(text: str) -> None:
    with pytest.raises(DownloadError, match="link") as caught:
        Link.parse(text)
    assert "hush" not in str(caught.value)
