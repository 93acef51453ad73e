"""Every command of the README runs, on small checkpoints laid out as it shows them; the bundled run learns."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import VOCAB, hf_model, sentencepiece_model, write_meta
from transformers import LlamaForCausalLM

from llama import Llama
from llama.data.records import read_records
from llama.data.templates import find_template

ROOT = Path(__file__).parent.parent
# Run by whoever runs this test: `make test` itself, and the installation that it begins with; or against a server
# of their own: tests/download; or once for all tests: `tuned_tiny`.
BY_OTHERS = ("make test", "pip install", "python -m llama.download", "python ft_main.py")


def blocks(readme: str, language: str) -> list[str]:
    text = (ROOT / readme).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(readme: str) -> list[str]:
    lines = [line for block in blocks(readme, "bash") for line in block.splitlines() if line.strip()]
    return [line for line in lines if not (line in BY_OTHERS or line.startswith(BY_OTHERS[:3]))]


def brief_model() -> LlamaForCausalLM:
    """Random weights that end a text after some ten tokens; others would go on to the end of the cache."""
    model = hf_model("1", intermediate_size=192)  # whole groups of 32, as 7B has
    with torch.no_grad():
        # One feature that every token has and that the end of a text, token 2, is read from.
        model.model.embed_tokens.weight[:, 0] = 8.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[2] = torch.eye(1, model.config.hidden_size)
    return model


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory, tuned_tiny: Path) -> Path:
    """The repository as a user has it, with checkpoints where the README puts them."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in (
        "example.py",
        "example_ft.py",
        "ft_main.py",
        "split_model.py",
        "Makefile",
        "requirements.txt",
        "pyproject.toml",
        "setup.py",
        "llama",
        "scripts",
    ):
        (folder / name).symlink_to(ROOT / name)
    if (ROOT / ".venv" / "installed").exists():
        (folder / ".venv").symlink_to(ROOT / ".venv")
    ckpts = folder / "ckpts"
    ckpts.mkdir()
    (ckpts / "tiny").symlink_to(ROOT / "ckpts" / "tiny")
    model = brief_model()
    write_meta(ckpts / "7B", model, embedding_dim=1)
    write_meta(ckpts / "7B_fs4", model, n_shards=4, embedding_dim=1, stem="fs_consolidated")
    sentencepiece_model(ckpts, VOCAB)
    (folder / "datasets").mkdir()
    records = [{"instruction": f"Say w{n}", "input": "", "output": f"fox {n}"} for n in range(24)]
    (folder / "datasets" / "alpaca_data.json").write_text(json.dumps(records))
    (folder / "book.txt").write_text("the quick brown fox jumps over the lazy dog and runs away again " * 40)
    (folder / "saved").symlink_to(tuned_tiny)
    return folder


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """One line of the README, by this interpreter's own environment."""
    bin_folder = Path(sys.executable).parent
    env = os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("command", commands("README.md"))
def test_the_command_runs(checkout: Path, command: str) -> None:
    if command == "make demo" and not (checkout / ".venv").exists():
        command = "torchrun --nproc_per_node 2 example.py"  # its work, where make has not made the environment
    finished = run(command, checkout)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip()


def exact_match(adapter: Path | None) -> float:
    """The part of held-out records that the bundled model answers exactly right, greedily."""
    llama = Llama.build(ROOT / "ckpts" / "tiny", adapter=adapter)
    records = read_records(ROOT / "datasets" / "alpaca_tiny_heldout.json")
    template = find_template("alpaca", llama.tokenizer)
    prompts = [template.encode_prompt(record) for record in records]
    answers = llama.collect(prompts, max_gen_len=24, temperature=0)
    return sum(a.text.strip() == r.output for a, r in zip(answers, records, strict=True)) / len(records)


@pytest.mark.slow
def test_the_bundled_run_shows_something(tuned_tiny: Path) -> None:
    assert exact_match(None) < 0.2
    assert exact_match(tuned_tiny) > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("README.md", "python"))
def test_the_python_runs(checkout: Path, block: str) -> None:
    finished = run(f"{shlex.quote(sys.executable)} -c {shlex.quote(block)}", checkout)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip()


def test_both_languages_show_the_same() -> None:
    for language in ("bash", "python", "text"):
        assert blocks("README.zh.md", language) == blocks("README.md", language)


def test_the_bundled_dialogs_are_what_the_readme_says() -> None:
    dialogs = json.loads((ROOT / "ckpts" / "tiny" / "dialogs.json").read_text())
    assert all(message["role"] in ("system", "user", "assistant") for dialog in dialogs for message in dialog)


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_links_lead_somewhere(readme: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / readme).read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target
