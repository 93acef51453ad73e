"""The same run under transformers' Trainer: the same losses, also where ranks share the model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DIM
from tuning_support import batch_of, claimed, sharded, write_model

from llama.finetuning.hf_trainer import HfTrainer
from llama.finetuning.prompt_tuning import SoftPrompt
from llama.finetuning.settings import TrainSettings
from llama.finetuning.trainer import Trainer

N_STEPS = 50


def run(kind: type[Trainer], model_folder: Path, out: Path, **changes: Any) -> dict[str, dict[int, float]]:
    model = sharded(model_folder)
    settings = TrainSettings(
        **{
            "batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": N_STEPS, "lr": 0.003, "warmup_steps": 5,
            "weight_decay": 0.01, "max_grad_norm": 0.05, "eval_steps": 20, "save_steps": 20, **changes,
        }
    )  # fmt: skip
    start = torch.randn(4, DIM, generator=torch.Generator().manual_seed(1)) * 0.1
    kind(model, SoftPrompt(model, start), settings, batch_of(30), batch_of(5, seed=9), claimed(out)).run()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    keys = ("loss", "lr", "eval_loss", "tokens", "grad_norm")
    return {key: {line["step"]: line[key] for line in lines if key in line} for key in keys}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def ours(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, float]]:
    return run(Trainer, model_folder, tmp_path_factory.mktemp("ours") / "run")


@pytest.mark.parametrize("world_size", [1, 2])
def test_trainer_takes_the_same_steps(
    on_ranks: Any, model_folder: Path, ours: dict[str, dict[int, float]], tmp_path: Path, world_size: int
) -> None:
    theirs = on_ranks(world_size, run, HfTrainer, model_folder, tmp_path / "theirs")[0]
    assert theirs["tokens"] == ours["tokens"]
    for key in ("loss", "eval_loss"):
        assert theirs[key].keys() == ours[key].keys()
        assert max(abs(theirs[key][step] - ours[key][step]) for step in ours[key]) < 1e-4
    assert theirs["lr"] == pytest.approx(ours["lr"], rel=1e-9)
    assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-3)
    assert {path.name for path in (tmp_path / "theirs").glob("checkpoint-*")} == {"checkpoint-40", "checkpoint-50"}
