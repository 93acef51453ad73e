"""Flags from words to values; and how each kind of error ends a command."""

import errno
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llama import cli
from llama.errors import CheckpointError, LlamaError, UsageError
from llama.parallel import groups


class Left(BaseException):
    """Stands in for the end of the process."""

    def __init__(self, text: str = "", code: int = 2, at_once: bool = False):
        super().__init__(text, code, at_once)
        self.text, self.code = text, code


@pytest.fixture
def _stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(text: str = "", code: int = 2, *, at_once: bool = False) -> None:
        raise Left(text, code, at_once)

    monkeypatch.setattr(cli, "leave", leave)


def command(
    text: str = "none given",
    path: str | None = None,
    count: int = 3,
    limit: int | None = None,
    heat: float = 0.5,
    loud: bool = False,
) -> None:
    """Say things.

    Args:
        text: what to say.
        path: where to.
        count: how often.
        limit: at most so often.
        heat: of the words.
        loud: shout,
            and go on.
    """


def values_of(*words: str) -> dict[str, Any]:
    """What `main` receives for a command line."""
    received: dict[str, Any] = {}

    def main(
        text: str = "none given",
        path: str | None = None,
        count: int = 3,
        limit: int | None = None,
        heat: float = 0.5,
        loud: bool = False,
    ) -> None:
        received.update(locals())

    cli.run(main, words)
    return {name: value for name, value in received.items() if name != "received"}


def complaint(*words: str) -> str:
    with pytest.raises(Left) as left:
        values_of(*words)
    assert left.value.code == 2
    assert left.value.text.startswith("error: ")
    return left.value.text.removeprefix("error: ")


TEXTS = [
    "Hello, world", "abc # def", "1e3", "1_000", "0x10", "[1, 2", "[1, 2]", '["a", "b"]', "True", "None", "null", "-1",
    "-h", "-", "{'a': 1}", "(1,)", "a=b", "=", "", " ", "'quoted'", '"twice"', 'it\'s "so"', "back\\slash",
    "two\nlines\n", "tab\t", "日本語 Ünï 🦙", "%s {0}", "a -- b", "lambda: 0", "$HOME", "caf\udce9",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.usefixtures("_stay")
def test_text_reaches_main_as_typed(text: str) -> None:
    assert values_of(f"--text={text}")["text"] == text
    assert values_of("--text", text, "--loud")["text"] == text
    assert values_of("--path", text)["path"] == text


@pytest.mark.usefixtures("_stay")
def test_text_that_looks_like_a_flag_needs_the_equals_sign() -> None:
    assert values_of("--text=--count")["text"] == "--count"
    assert values_of("--text=--help")["text"] == "--help"
    assert values_of("--text=--")["text"] == "--"
    said = complaint("--text", "--count")
    assert "--text needs a value" in said
    assert "--text=--count" in said


@pytest.mark.usefixtures("_stay")
def test_values_are_what_annotations_say() -> None:
    given = values_of("--count", "7", "--heat=1e3", "--limit", "None", "--loud")
    assert given == {"text": "none given", "path": None, "count": 7, "limit": None, "heat": 1000.0, "loud": True}
    assert type(given["heat"]) is float
    assert values_of("--limit=-4", "--heat", "-1") == values_of() | {"limit": -4, "heat": -1.0}


@pytest.mark.usefixtures("_stay")
@pytest.mark.parametrize(
    ("words", "loud"),
    [
        ((), False), (("--loud",), True), (("--noloud",), False), (("--loud", "false"), False), (("--loud=YES",), True),
        (("--loud=0",), False), (("--loud", "--count", "2"), True),
    ],
)  # fmt: skip
def test_switches(words: tuple[str, ...], loud: bool) -> None:
    assert values_of(*words)["loud"] is loud


@pytest.mark.usefixtures("_stay")
def test_dashes_and_underscores_are_the_same() -> None:
    seen: list[int] = []

    def main(max_gen_len: int = 1) -> None:
        seen.append(max_gen_len)

    cli.run(main, ["--max-gen-len", "5"])
    cli.run(main, ["--max_gen_len=6"])
    assert seen == [5, 6]


@pytest.mark.usefixtures("_stay")
@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--cuont", "1"), ("unknown flag --cuont", "did you mean --count?")),
        (("--zzz",), ("unknown flag --zzz", "--text", "--loud")),
        (("--noloud=1",), ("unknown flag --noloud",)),
        (("--nocount",), ("unknown flag --nocount",)),
        (("word",), ("stray word 'word'",)),
        (("--loud", "maybe"), ("stray word 'maybe'",)),
        (("-x",), ("stray word '-x'",)),
        (("--",), ("stray word '--'",)),
        (("--count",), ("--count needs a value",)),
        (("--count", "1.5"), ("--count takes a whole number", "'1.5'")),
        (("--count", "none"), ("--count takes a whole number",)),
        (("--count=",), ("--count takes a whole number", "''")),
        (("--heat", "hot"), ("--heat takes a number", "'hot'")),
        (("--loud=maybe",), ("--loud takes true, false, yes or no", "'maybe'")),
        (("--count=1", "--count=2"), ("--count is given twice",)),
    ],
)
def test_a_misshapen_command_line_is_refused_before_main_runs(words: tuple[str, ...], parts: tuple[str, ...]) -> None:
    said = complaint(*words)
    assert "\n" not in said
    for part in parts:
        assert part in said


@pytest.mark.usefixtures("_stay")
def test_a_flag_without_default_must_be_given() -> None:
    def main(source: str, target: str, n: int = 1) -> None:
        raise AssertionError("ran")

    with pytest.raises(Left, match="--target must be given"):
        cli.run(main, ["--source", "x"])


@pytest.mark.usefixtures("_stay")
def test_help_tells_every_flag_once_and_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["--count", "3", "-h"]):
        cli.run(command, words)
        out, err = capsys.readouterr()
        assert err == ""
        assert out.startswith("Say things.\n")
        flags = [line.split()[0] for line in out.splitlines() if line.strip().startswith("--")]
        assert flags == ["--text", "--path", "--count", "--limit", "--heat", "--loud"]
        assert "how often. [3]" in out
        assert "of the words. [0.5]" in out
        assert "shout, and go on.\n" in out


@pytest.mark.usefixtures("_stay")
def test_an_unknown_flag_is_told_rather_than_help() -> None:
    assert "unknown flag --wrong" in complaint("--wrong", "--help")


def ends_with(error: BaseException) -> Left:
    def main() -> None:
        raise error

    with pytest.raises(Left) as left:
        cli.run(main, [])
    return left.value


OUT_OF_MEMORY: list[Callable[[], BaseException]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has little left."),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    lambda: MemoryError(),
]


@pytest.mark.usefixtures("_stay")
@pytest.mark.parametrize("make", OUT_OF_MEMORY)
def test_out_of_memory_says_what_helps(make: Callable[[], BaseException]) -> None:
    left = ends_with(make())
    assert left.code == 2
    assert "rank 0 is out of memory" in left.text
    assert "--max_batch_size" in left.text
    assert "2.50 GiB" in left.text or "CUDA" not in left.text


@pytest.mark.usefixtures("_stay")
def test_how_each_kind_of_error_ends(capfd: pytest.CaptureFixture[str]) -> None:
    assert ends_with(UsageError("no such thing")).args[:2] == ("error: no such thing", 2)
    assert ends_with(KeyboardInterrupt()).args[:2] == ("interrupted", 130)
    assert ends_with(BrokenPipeError(errno.EPIPE, "Broken pipe")).args[:2] == ("", 1)
    gloo = "[third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4"
    lost = ends_with(RuntimeError(gloo))
    assert lost.code == 2
    assert "SIGKILL" in lost.text
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("_stay")
def test_a_mistake_of_ours_keeps_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    left = ends_with(ZeroDivisionError("ours"))
    assert (left.text, left.code) == ("", 1)
    err = capfd.readouterr().err
    assert "Traceback" in err
    assert "ZeroDivisionError: ours" in err


def test_a_file_that_the_system_refuses_is_a_users_error() -> None:
    with pytest.raises(LlamaError, match="cannot use some/file: No space left on device"), groups.phase("any"):
        raise OSError(errno.ENOSPC, "No space left on device", "some/file")
    with pytest.raises(ConnectionError), groups.phase("any"):
        raise ConnectionError("no file")
    with pytest.raises(CheckpointError, match="as it was"), groups.phase("any"):
        raise CheckpointError("as it was")


def test_words_after_a_command_are_its_parameters_in_order() -> None:
    def verify(folder: str, deep: bool = False) -> None: ...

    assert cli.name_words(verify, ["a b", "--deep"]) == ["--folder=a b", "--deep"]
    assert cli.name_words(verify, ["--folder", "x"]) == ["--folder", "x"]
    assert cli.name_words(verify, ["a", "True", "c"]) == ["--folder=a", "--deep=True", "c"]
