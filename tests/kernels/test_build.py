"""Building the kernels: once, and never a reason to stop."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llama.kernels import build

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_SHARDS_CACHE", str(tmp_path / "cache"))
    build.load_kernels.cache_clear()


def fake_compiler(folder: Path, script: str) -> str:
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_without_a_compiler_it_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert not build.load_kernels()
    assert "no C++ compiler found" in capsys.readouterr().err


def test_a_compiler_that_fails_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "echo 'cpu.cpp:1: fatal error: no such header' >&2; exit 1"))
    assert not build.load_kernels()
    told = capsys.readouterr().err
    assert "could not be built, decoding goes on without: cpu.cpp:1: fatal error: no such header" in told
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["build.lock"]


def test_it_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tmp_path / "calls"
    script = f'echo x >> {calls}\nsleep 0.3\nwhile [ "$1" != -o ]; do shift; done\necho library > "$2"'
    tool = fake_compiler(tmp_path, script)
    with ThreadPoolExecutor(3) as ranks:  # as they come: one compiles, and the others wait for it
        first, second, _ = ranks.map(build._built, [tool] * 3)
    assert first == second
    assert first.read_text() == "library\n"
    assert calls.read_text() == "x\n"
    monkeypatch.setattr(build, "_processor", lambda: "another")
    assert build._built(tool) != first
