"""`ft_main.py` as a person starts it: the bundled run learns, a killed run goes on, mistakes get one line."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from launch import ROOT, Command, Outcome
from safetensors.torch import load_file
from support import hf_model, sentencepiece_model, write_meta

from llama import Llama
from llama.data.records import read_records
from llama.data.templates import find_template

FT_MAIN = ROOT / "ft_main.py"
TINY = ROOT / "ckpts" / "tiny"


def train(*words: object, ranks: int | None = None, timeout: float = 300) -> Outcome:
    with Command(words, ranks, FT_MAIN) as command:
        return command.finish(timeout=timeout)


def exact_match(adapter: Path | None) -> float:
    """The part of held-out records that the bundled model answers exactly right, greedily."""
    llama = Llama.build(TINY, adapter=adapter)
    records = read_records(ROOT / "datasets" / "alpaca_tiny_heldout.json")
    template = find_template("alpaca", llama.tokenizer)
    prompts = [template.encode_prompt(record) for record in records]
    answers = llama.collect(prompts, max_gen_len=24, temperature=0)
    return sum(a.text.strip() == r.output for a, r in zip(answers, records, strict=True)) / len(records)


@pytest.mark.slow
def test_the_bundled_run_shows_something(tuned_tiny: Path) -> None:
    assert exact_match(None) < 0.2
    assert exact_match(tuned_tiny) > 0.8


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


@pytest.mark.slow
def test_a_run_killed_by_sigkill_goes_on_to_the_same_bits(base: Path, tmp_path: Path) -> None:
    slow = {"max_steps": 120, "save_steps": 5, "eval_fraction": 0.1, "eval_steps": 10}
    assert train(*flags(base, tmp_path / "whole", **slow)).code == 0
    with Command(flags(base, tmp_path / "broken", **slow), None, FT_MAIN) as command:
        end = time.monotonic() + 120
        while not (tmp_path / "broken" / "checkpoint-5").exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        command.process.send_signal(signal.SIGKILL)
        command.process.wait()
    assert not (tmp_path / "broken" / "adapter_model.safetensors").exists()
    resumed = train(*flags(base, tmp_path / "broken", **slow), "--resume")
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


BAD = [
    pytest.param({"lr": 0}, "--lr must be above 0, is 0.0", id="lr"),
    pytest.param({"lr": 1e39}, "--lr must be 1e+30 at most, is 1e+39", id="lr beyond float32"),
    pytest.param({"method": "prefix"}, "--method takes prompt or lora, not 'prefix'", id="method"),
    pytest.param({"dataset": "none.json"}, "none.json", id="no data"),
    pytest.param(
        {"method": "lora", "lora_targets": "wq,wx"}, "--lora_targets names 'wx', which matches no linear", id="target"
    ),
    pytest.param({"tp": 3}, "--tp 3 does not divide the 1 processes", id="tp"),
    pytest.param({"trainer": "hf", "method": "lora"}, "--trainer hf", id="hf lora"),
    pytest.param({"trainer": "hf", "dtype": "fp16"}, "--trainer hf has no loss scaling", id="hf fp16"),
    pytest.param({"init_text": " "}, "--init_text is blank", id="blank text"),
    pytest.param({"max_seq_len": 8}, "8 tokens", id="nothing left to learn"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_mistakes_get_one_line(base: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    outcome = train(*flags(base, tmp_path / "saved", **changes), timeout=60)
    assert outcome.code == 2
    assert len(outcome.errors) == 1
    assert message in outcome.errors[0]
    assert not outcome.has_our_traceback
    assert not (tmp_path / "saved").exists()


def test_a_finished_run_is_not_overwritten(base: Path, tmp_path: Path) -> None:
    assert train(*flags(base, tmp_path / "saved", max_steps=1)).code == 0
    before = (tmp_path / "saved" / "adapter_model.safetensors").read_bytes()
    again = train(*flags(base, tmp_path / "saved", max_steps=1))
    assert again.code == 2
    assert "holds a run already: add --resume" in again.errors[0]
    other = train(*flags(base, tmp_path / "saved", max_steps=2), "--resume")
    assert other.code == 2
    assert "max_steps 1, now 2" in other.errors[0]
    assert (tmp_path / "saved" / "adapter_model.safetensors").read_bytes() == before
