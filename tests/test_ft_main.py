"""`ft_main.py` as a person starts it: a killed run goes on, mistakes get one line."""

import json
import signal
from pathlib import Path

import pytest
import torch
from launch import ROOT, Command, Outcome, run_forked
from safetensors.torch import load_file
from support import hf_model, sentencepiece_model, write_meta

FT_MAIN = ROOT / "ft_main.py"


def train(*words: object, ranks: int) -> Outcome:
    with Command(words, ranks, FT_MAIN, forked=True) as command:
        return command.finish()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model too small to learn much, with a tokenizer and records beside it."""
    folder = write_meta(tmp_path_factory.mktemp("base") / "7B", hf_model("2"))
    sentencepiece_model(folder)
    records = [{"instruction": f"w{n} the quick", "input": "", "output": f"brown fox {n}"} for n in range(40)]
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def flags(base: Path, out: Path, **changes: object) -> list[object]:
    options = {"ckpt_dir": base, "dataset": base / "data.json", "output_dir": out, "max_steps": 12, "threads": 1}
    return [word for name, value in (options | changes).items() for word in (f"--{name}", value)]


def adapter(out: Path) -> torch.Tensor:
    return load_file(out / "adapter_model.safetensors")["prompt_embeddings"]


# ft_main.py, killed while it writes its second checkpoint.
DYING = """
import os, signal
from llama.cli import run
from llama.commands.tune import main as train

def sync(descriptor):
    if "checkpoint-8" in os.readlink(f"/proc/self/fd/{descriptor}"):
        os.kill(os.getpid(), signal.SIGKILL)
    to_disk(descriptor)

if __name__ == "__main__":
    to_disk, os.fsync = os.fsync, sync
    run(train)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux which file is written")
def test_a_run_killed_by_sigkill_goes_on_to_the_same_bits(base: Path, tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    options = {"save_steps": 4, "eval_fraction": 0.1, "eval_steps": 5}
    whole, broken = (flags(base, tmp_path / name, **options) for name in ("whole", "broken"))
    first = run_forked({"whole": [FT_MAIN, *whole], "broken": [tmp_path / "dying.py", *broken]})
    assert (first["whole"].code, first["broken"].code) == (0, -signal.SIGKILL), first
    left = {path.name for path in (tmp_path / "broken").iterdir()}
    assert {"checkpoint-4", "checkpoint-8.partial"} <= left
    assert "adapter_model.safetensors" not in left
    resumed = run_forked({"resumed": [FT_MAIN, *broken, "--resume"]})["resumed"]
    assert resumed.code == 0, resumed.err
    assert "going on from" in resumed.err
    assert torch.equal(adapter(tmp_path / "broken"), adapter(tmp_path / "whole"))


@pytest.mark.slow
def test_three_ranks_and_the_trainer_of_transformers(base: Path, tmp_path: Path) -> None:
    ours = train(*flags(base, tmp_path / "ours"), ranks=3)
    assert ours.code == 0, ours.err
    theirs = train(*flags(base, tmp_path / "theirs", trainer="hf"), ranks=2)
    assert theirs.code == 0, theirs.err
    assert "transformers' Trainer takes the steps" in theirs.err
    assert "transformers' Trainer" not in ours.err
    assert (adapter(tmp_path / "ours") - adapter(tmp_path / "theirs")).abs().max() < 1e-3


BAD = {
    "lr": ({"lr": 0}, "--lr must be above 0, is 0.0"),
    "lr beyond float32": ({"lr": 1e39}, "--lr must be 1e+30 at most, is 1e+39"),
    "method": ({"method": "prefix"}, "--method takes prompt or lora, not 'prefix'"),
    "no data": ({"dataset": "none.json"}, "none.json"),
    "target": ({"method": "lora", "lora_targets": "wq,wx"}, "--lora_targets names 'wx', which matches no linear"),
    "tp": ({"tp": 3}, "--tp 3 does not divide the 1 processes"),
    "hf lora": ({"trainer": "hf", "method": "lora"}, "--trainer hf"),
    "hf fp16": ({"trainer": "hf", "dtype": "fp16"}, "--trainer hf has no loss scaling"),
    "blank text": ({"init_text": " "}, "--init_text is blank"),
    "nothing left to learn": ({"max_seq_len": 8}, "8 tokens"),
}


@pytest.fixture(scope="module")
def refused(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Outcome], Path]:
    """How every mistake ends, and where the runs would have lain."""
    out = tmp_path_factory.mktemp("refused")
    commands = {name: [FT_MAIN, *flags(base, out / name, **changes)] for name, (changes, _) in BAD.items()}
    return run_forked(commands), out


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_mistakes_get_one_line(refused: tuple[dict[str, Outcome], Path], case: str) -> None:
    outcome = refused[0][case]
    assert outcome.code == 2
    assert len(outcome.errors) == 1
    assert BAD[case][1] in outcome.errors[0]
    assert not outcome.has_our_traceback
    assert not (refused[1] / case).exists()


@pytest.mark.slow
def test_a_finished_run_is_not_overwritten(base: Path, tmp_path: Path) -> None:
    once = [FT_MAIN, *flags(base, tmp_path / "saved", max_steps=1)]
    assert run_forked({"first": once})["first"].code == 0
    before = (tmp_path / "saved" / "adapter_model.safetensors").read_bytes()
    twice = [FT_MAIN, *flags(base, tmp_path / "saved", max_steps=2), "--resume"]
    later = run_forked({"again": once, "other": twice})
    assert (later["again"].code, later["other"].code) == (2, 2)
    assert "holds a run already: add --resume" in later["again"].errors[0]
    assert "max_steps 1, now 2" in later["other"].errors[0]
    assert (tmp_path / "saved" / "adapter_model.safetensors").read_bytes() == before
