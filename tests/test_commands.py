"""The commands of an installed package: every word starts the main of its file, under torchrun too."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from llama.__main__ import COMMANDS, overview
from llama.errors import UsageError
from llama.flags import flags_of
from llama.runtime import RunOptions, model_or_bundled


@pytest.mark.parametrize("word", COMMANDS)
def test_a_word_is_a_module_with_a_typed_main(word: str) -> None:
    module = importlib.import_module(f"llama.commands.{word}")
    assert callable(module.start)
    assert all(flag.told for flag in flags_of(module.main)), "a flag without a word of help"
    assert f"  {word} " in overview()


def test_there_is_no_command_without_a_word(root: Path) -> None:
    assert {path.stem for path in (root / "llama" / "commands").glob("*.py")} - {"__init__"} == set(COMMANDS)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "llama", *words], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_words_are_listed_and_mistakes_are_one_line() -> None:
    assert run().stdout == run("--help").stdout == overview() + "\n"
    wrong = run("compelte", "--prompts", "x")
    assert wrong.returncode == 2
    assert wrong.stderr == "error: unknown command 'compelte': did you mean complete?\n"
    assert run("complete", "--prompt", "x").stderr.startswith("error: unknown flag --prompt: did you mean --prompts?")


@pytest.mark.slow
def test_torchrun_starts_a_word_with_m() -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "llama", "complete"]
    done = subprocess.run(
        [*launch, "--prompts", "3 + 4 =", "--temperature", "0"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "> 7" in done.stdout


def test_a_package_without_the_bundled_model_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert model_or_bundled("some/folder") == "some/folder"
    monkeypatch.setattr("llama.runtime.BUNDLED_MODEL", tmp_path / "tiny")
    with pytest.raises(UsageError, match="--ckpt_dir must be given"):
        model_or_bundled(None)


def test_an_option_is_declared_once(root: Path) -> None:
    """Nothing but its dataclass and what uses it names a field of `RunOptions`: no signature hands it on."""
    for path in (root / "llama" / "commands").glob("*.py"):
        module = importlib.import_module(f"llama.commands.{path.stem}")
        parameters = inspect.signature(module.main).parameters if hasattr(module, "main") else {}
        if "options" in parameters:
            again = set(parameters) & set(RunOptions.__dataclass_fields__)
            assert not again, f"{path.name} declares {again} anew"
