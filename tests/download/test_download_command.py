import hashlib
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import web as internet
from web import Web

from llama.commands import download as command
from llama.download import hub, models, presigned
from llama.errors import UsageError

COMMAND = [sys.executable, "-m", "llama.download"]
PARAMS = "params.json"
SIGNED = "http://127.0.0.1:9/*?Signature=hush"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What the command asks of the hub and of Meta's server, neither of which is reached."""
    asked: list[tuple] = []
    monkeypatch.setattr(hub, "download", lambda *args: asked.append(args) or args[1])
    monkeypatch.setattr(presigned, "download", lambda link, model, folder: asked.append((link, model.name, folder)))
    return asked


def test_names_become_repositories_and_folders(asked: list[tuple]) -> None:
    command.main(model="llama-3.2-1b")
    command.main(model_size="7B", original=True)
    command.main(repo="someone/Tiny", file="config.json", output_dir="here")
    assert asked == [
        ("meta-llama/Llama-3.2-1B", Path("ckpts/llama-3.2-1b"), False, None),
        ("meta-llama/Llama-2-7b", Path("ckpts/llama-2-7b"), True, None),
        ("someone/Tiny", Path("here"), False, "config.json"),
    ]


def test_a_link_goes_with_a_model(asked: list[tuple]) -> None:
    command.main(model_size="13B-chat", url=SIGNED)
    assert asked[0][1:] == ("llama-2-13b-chat", Path("ckpts/llama-2-13b-chat"))


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"model": "llama-2-7b", "repo": "a/b"},
        {"url": SIGNED},
        {"url": SIGNED, "repo": "a/b"},
        {"url": SIGNED, "model_size": "7B", "original": True},
        {"verify": "ckpts", "model": "llama-2-7b"},
    ],
)
def test_flags_that_do_not_go_together_are_refused(asked: list[tuple], flags: dict) -> None:
    with pytest.raises(UsageError) as caught:
        command.main(**flags)
    assert "hush" not in str(caught.value)
    assert asked == []


def test_a_missing_link_is_asked_for_at_a_terminal_only(asked: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(SIGNED + "\n"))
    with pytest.raises(UsageError, match="or a terminal to ask for it"):
        command.main(model_size="7B", url="")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    command.main(model_size="7B", url="")
    assert asked[0][0] == presigned.Link.parse(SIGNED)
    with pytest.raises(UsageError, match="no link"):
        command.main(model_size="7B", url="")


@pytest.mark.parametrize(
    ("words", "spelled"),
    [
        (["--url", SIGNED, "--model_size", "7B"], [f"--url={SIGNED}", "--model_size", "7B"]),
        (["--url", "--model_size", "7B"], ["--url=", "--model_size", "7B"]),
        (["--model_size", "7B", "--url"], ["--model_size", "7B", "--url="]),
        (["--original", SIGNED], ["--original", f"--url={SIGNED}"]),
        ([f"--url={SIGNED}"], [f"--url={SIGNED}"]),
    ],
)
def test_links_are_never_stray_words(words: list[str], spelled: list[str]) -> None:
    assert command.spell_out(words) == spelled


def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llama.download", *words],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | env,
    )


@pytest.mark.slow
def test_a_checked_folder_that_differs_is_one_line_and_code_2(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{}")
    (tmp_path / "checklist.chk").write_text(f"{hashlib.md5(b'other').hexdigest()}  params.json\n")
    done = run("--verify", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {tmp_path / 'params.json'} differs")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_gated_repository_is_one_line_and_code_2(tmp_path: Path) -> None:
    repo = "meta-llama/Llama-3.2-1B"
    with internet.serving(Web()) as web:
        internet.publish(web, repo, {"model.safetensors": b"weights", "config.json": b"{}"})
        gated = (403, {"X-Error-Code": "GatedRepo"})
        web.statuses = {path: gated for path in web.files if "/resolve/" in path}
        done = run(
            "--model", "llama-3.2-1b", "--output_dir", str(tmp_path / "1b"),
            HF_ENDPOINT=web.url, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "home"),
        )  # fmt: skip
    assert done.returncode == 2
    page = f"https://huggingface.co/{repo}"
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: 403: the licence of {repo} is not accepted: open {page}, accept it")
    assert "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "1b").glob("*")] in ([], [".cache"])


@pytest.mark.slow
def test_a_killed_download_looks_unfinished_and_is_continued(tmp_path: Path) -> None:
    shard, params = b"weights!" * 30_000, b"{}"
    sums = [(hashlib.md5(body).hexdigest(), name) for body, name in ((shard, "consolidated.00.pth"), (params, PARAMS))]
    files = {"consolidated.00.pth": shard, PARAMS: params, "tokenizer.model": b"bpe"}
    files["checklist.chk"] = "".join(f"{md5}  {name}\n" for md5, name in sums).encode()
    path = "/8b_pre_trained/consolidated.00.pth"
    with internet.serving(Web({f"/8b_pre_trained/{name}": body for name, body in files.items()})) as web:
        web.faults[path] = [internet.trickle]
        words = ["--url", f"{web.url}/*?Signature=hush", "--model", "llama-3-8b", "--output_dir", str(tmp_path)]
        partial = tmp_path / "consolidated.00.pth.partial"
        with subprocess.Popen([*COMMAND, *words], stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and not (partial.exists() and partial.stat().st_size):
                time.sleep(0.05)
            process.kill()
        assert 0 < partial.stat().st_size < len(shard)
        assert {file.name for file in tmp_path.iterdir()} == {"checklist.chk", "tokenizer.model", partial.name}
        presigned.download(presigned.Link.parse(words[1]), models.find("llama-3-8b"), tmp_path)
        assert web.spans(path)[1].startswith("bytes=")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files


@pytest.mark.slow
def test_an_expired_link_is_one_line_and_code_2_and_stays_secret(tmp_path: Path) -> None:
    with internet.serving(Web(statuses={"/llama-2-7b/checklist.chk": (403, {})})) as web:
        link = f"{web.url}/*?Policy=p&Signature=hush"
        done = run("--url", link, "--model_size", "7B", "--output_dir", str(tmp_path / "7b"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: llama-2-7b/checklist.chk: 403: the link has expired")
    assert len(done.stderr.splitlines()) == 1
    assert "hush" not in done.stdout + done.stderr
    assert not (tmp_path / "7b").exists()
