import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import web as internet
from huggingface_hub import constants
from web import COMMIT, Web

from llama.download import hub
from llama.download.hub import HubFile
from llama.errors import DownloadError

REPO = "meta-llama/Llama-3.2-1B"
TOP = {name: name.encode() * 50 for name in ("config.json", "model.safetensors", "tokenizer.json", "LICENSE.txt")}
ORIGINAL = {f"original/{name}": name.encode() for name in ("consolidated.00.pth", "params.json", "tokenizer.model")}


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Web]:
    """A hub with one repository, which the library takes for the real one."""
    with internet.serving(Web()) as web:
        internet.publish(web, REPO, {**TOP, **ORIGINAL, "picture.png": b"png"})
        template = web.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", web.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield web


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "ckpts" / "1b"


def files(folder: Path) -> dict[str, bytes]:
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {str(path): (folder / path).read_bytes() for path in paths if path.parts[0] != ".cache"}


def fails(folder: Path, repo: str = REPO, **options) -> str:
    with pytest.raises(DownloadError) as caught:
        hub.download(repo, folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_hugging_faces_layout_arrives_without_metas(web: Web, folder: Path) -> None:
    assert hub.download(REPO, folder) == folder
    assert files(folder) == TOP


def test_metas_layout_arrives_alone(web: Web, folder: Path) -> None:
    assert hub.download(REPO, folder, original=True) == folder / "original"
    assert files(folder) == ORIGINAL


def test_one_file_arrives_alone(web: Web, folder: Path) -> None:
    hub.download(REPO, folder, file="tokenizer.json")
    assert list(files(folder)) == ["tokenizer.json"]
    assert "has no file 'nothing'" in fails(folder, file="nothing")


def test_a_second_run_fetches_only_what_is_missing(web: Web, folder: Path) -> None:
    hub.download(REPO, folder)
    (folder / "config.json").unlink()
    web.asked.clear()
    hub.download(REPO, folder)
    assert files(folder) == TOP
    assert {asked.path.split("/")[-1] for asked in web.asked if "/resolve/" in asked.path} == {"config.json"}


def test_what_breaks_off_is_continued(web: Web, folder: Path) -> None:
    weights = b"weights!" * 30_000
    internet.publish(web, REPO, {"model.safetensors": weights})
    path = f"/{REPO}/resolve/{COMMIT}/model.safetensors"
    web.faults[path] = [internet.break_off(100_000)]
    hub.download(REPO, folder)
    assert files(folder) == {"model.safetensors": weights}
    assert len(web.spans(path)) > 2  # with the question for its size


def test_the_token_is_sent(web: Web, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = []
    answer = internet.Handler.answer

    def listen(handler: internet.Handler, *args) -> None:
        tokens.append(handler.headers.get("Authorization"))
        answer(handler, *args)

    monkeypatch.setattr(internet.Handler, "answer", listen)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    hub.download(REPO, folder)
    assert set(tokens) == {"Bearer hf_test"}


def test_bytes_that_differ_from_the_list_are_removed(web: Web, folder: Path) -> None:
    web.files[f"/{REPO}/resolve/{COMMIT}/model.safetensors"] = b"x" * len(TOP["model.safetensors"])
    assert "model.safetensors came damaged" in fails(folder)
    assert "model.safetensors" not in files(folder)


def test_files_of_something_else_are_left_alone(web: Web, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(b"mine")
    assert "config.json exists and is not the repository's" in fails(folder)
    assert files(folder) == {"config.json": b"mine"}


def test_a_name_that_leaves_the_folder_is_refused(web: Web, folder: Path) -> None:
    internet.publish(web, "evil/model", {"original/../../../consolidated.00.pth": b"x"})
    assert "outside its folder" in fails(folder, repo="evil/model", original=True)


GATED = {"X-Error-Code": "GatedRepo"}


@pytest.mark.parametrize(
    ("path", "code", "headers", "message"),
    [
        ("resolve", 403, GATED, "403: the licence of meta-llama/Llama-3.2-1B is not accepted: open"),
        ("resolve", 401, GATED, "401: meta-llama/Llama-3.2-1B is gated and there is no valid token"),
        ("resolve", 403, {}, "403: the licence"),
        ("api", 403, GATED, "403: the licence"),
        ("api", 401, {}, "401: no such repository as"),
        ("api", 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "no valid token"),
        ("api", 404, {"X-Error-Code": "RepoNotFound"}, "404: the hub has no such repository"),
        ("resolve", 404, {"X-Error-Code": "EntryNotFound"}, "404: the hub has no such repository or file"),
    ],
)
def test_a_refusal_is_explained(
    web: Web, folder: Path, path: str, code: int, headers: dict[str, str], message: str
) -> None:
    place = f"/api/models/{REPO}" if path == "api" else f"/{REPO}/resolve/{COMMIT}/model.safetensors"
    web.statuses[place] = (code, headers)
    said = fails(folder)
    assert message in said
    if code != 404:
        assert "'hf auth login', or set HF_TOKEN" in said
    assert "model.safetensors" not in files(folder)


def test_a_folder_that_holds_something_is_no_success_when_the_hub_fails(web: Web, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(TOP["model.safetensors"])
    web.statuses[f"/api/models/{REPO}/tree/{COMMIT}"] = (404, {})
    assert "config.json did not arrive" in fails(folder)


def test_offline_and_unreachable_are_told_apart(web: Web, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in fails(folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in fails(folder)
    assert "write OWNER/NAME" in fails(folder, repo="a/b/c")


def listed(*names: str) -> list[HubFile]:
    return [HubFile(name, 1, hashlib.sha256(b"x").hexdigest()) for name in names]


def chosen(files: list[HubFile], original: bool = False) -> set[str]:
    return {file.name for file in hub.choose(files, original)}


def test_older_repositories_have_their_weights_in_bins() -> None:
    old = ("pytorch_model-1.bin", "pytorch_model.bin.index.json", "config.json")
    assert chosen(listed(*old, "training_args.bin")) == set(old)
    both = (*old, "model-1.safetensors", "model.safetensors.index.json")
    assert chosen(listed(*both)) == {"config.json", "model-1.safetensors", "model.safetensors.index.json"}


def test_metas_layout_may_lie_at_the_top_or_twice() -> None:
    top = ("consolidated.00.pth", "params.json", "tokenizer.model", "checklist.chk", "LICENSE.txt")
    assert chosen(listed(*top, "model.safetensors"), original=True) == set(top)
    twice = [f"original/mp{n}/consolidated.{i:02d}.pth" for n in (16, 8) for i in range(n)]
    assert chosen(listed(*twice), original=True) == {name for name in twice if "mp8" in name}


def test_a_layout_that_is_not_there_is_told() -> None:
    with pytest.raises(DownloadError, match="try --original"):
        chosen(listed("original/consolidated.00.pth"))
    with pytest.raises(DownloadError, match="leave --original out"):
        chosen(listed("model.safetensors"), original=True)
