"""Runs: what they write, that they go on exactly where they were killed, and what may not happen to them."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import DIM
from tuning_support import batch_of, claimed, sharded, write_model

from llama.adapters.lora import add_lora
from llama.errors import LlamaError, TrainingError
from llama.finetuning import logs
from llama.finetuning.logs import RunLog
from llama.finetuning.prompt_tuning import SoftPrompt
from llama.finetuning.run_folder import RunFolder
from llama.finetuning.settings import TrainSettings
from llama.finetuning.trainer import Trainer

SETTINGS = {
    "batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_steps": 9,
    "lr": 0.003,
    "save_steps": 2,
    "eval_steps": 3,
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def trainer(model_folder: Path, out: Path, method: str = "prompt", **changes: Any) -> Trainer:
    model = sharded(model_folder)
    settings = TrainSettings(**{**SETTINGS, "method": method, **changes})
    torch.manual_seed(0)
    tuning: Any = (
        SoftPrompt(model, torch.randn(4, DIM, generator=torch.Generator().manual_seed(1)) * 0.1)
        if method == "prompt"
        else add_lora(model, 2, 4.0, ("wq", "wk", "wo", "w2"), dropout=0.1, seed=1)
    )
    folder = claimed(out, lr=settings.lr)
    return Trainer(model, tuning, settings, batch_of(14), batch_of(5, seed=9), folder, base_model="base")


def go_on(model_folder: Path, out: Path, method: str = "prompt", hf: bool = False) -> Trainer:
    run = trainer(model_folder, out, method)
    run.restore(run.folder.load(run.folder.checkpoints()[-1]))
    run.run()
    return run


class Killed(BaseException):
    """As sudden as SIGKILL: nothing of ours catches it."""


def train_and_die(model_folder: Path, out: Path, method: str, at: int) -> None:
    run = trainer(model_folder, out, method)
    take = run.stepper.run

    def step(number: int, batches: Any) -> Any:
        if number == at:
            raise Killed
        return take(number, batches)

    run.stepper.run = step
    try:
        run.run()
    except Killed:
        return
    raise RuntimeError("the run should have died")


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter_model.safetensors")


def losses(out: Path, key: str = "loss") -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


@pytest.mark.parametrize("method", ["prompt", "lora"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_that_was_killed_ends_with_the_same_bits(
    on_ranks: Any, model_folder: Path, tmp_path: Path, method: str, world_size: int
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    on_ranks(world_size, _run_whole, model_folder, whole, method)
    on_ranks(world_size, train_and_die, model_folder, broken, method, 7)
    assert losses(broken).keys() == set(range(1, 8))
    on_ranks(world_size, _go_on, model_folder, broken, method)
    ours, theirs = weights(broken), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert losses(broken) == losses(whole)
    assert losses(broken, "eval_loss") == losses(whole, "eval_loss")


@pytest.mark.parametrize("method", ["prompt", "lora"])
def test_a_run_goes_on_at_another_world_size(on_ranks: Any, model_folder: Path, tmp_path: Path, method: str) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _run_whole(model_folder, whole, method)
    on_ranks(3, train_and_die, model_folder, broken, method, 5)
    on_ranks(2, _go_on, model_folder, broken, method)
    ours, theirs = losses(broken), losses(whole)
    assert ours.keys() == theirs.keys() == set(range(1, 10))
    assert max(abs(ours[step] - theirs[step]) for step in theirs) < 1e-4


def _run_whole(model_folder: Path, out: Path, method: str) -> None:
    trainer(model_folder, out, method).run()


def _go_on(model_folder: Path, out: Path, method: str) -> None:
    go_on(model_folder, out, method)


@pytest.fixture(scope="module")
def done(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    out = tmp_path_factory.mktemp("done") / "saved"
    run = trainer(model_folder, out)
    run.run()
    return run, out


def test_what_a_run_leaves(done: tuple[Trainer, Path]) -> None:
    _run, out = done
    names = {entry.name for entry in out.iterdir()}
    assert names == {
        "run.json", "adapter_config.json", "adapter_model.safetensors", "best", "checkpoint-8", "checkpoint-9",
        "metrics.jsonl", "loss.png", "tensorboard",
    }  # fmt: skip
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "tensorboard").iterdir())


def test_metrics_are_those_of_the_steps(done: tuple[Trainer, Path]) -> None:
    run, out = done
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 10))
    assert set(steps[0]) == {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "seconds", "memory"}
    # 14 examples, 6 a step: an epoch has three steps, the last of two examples.
    assert [line["epoch"] for line in steps[:3]] == [0.3333, 0.6667, 1.0]
    first = [run.examples[i] for batch in run.order.step_batches(0) for i in batch]
    assert steps[0]["tokens"] == sum(len(example.tokens) for example in first)
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6, 9]


def test_the_result_is_the_best_by_eval_loss(model_folder: Path, tmp_path: Path) -> None:
    run = trainer(model_folder, tmp_path / "saved", max_steps=6, eval_steps=2)
    found = iter([3.0, 1.0, 2.0])
    run.stepper.evaluate = lambda _: next(found)
    run.run()
    assert run.best == (1.0, 4)
    kept = weights(tmp_path / "saved" / "checkpoint-4")
    assert torch.equal(weights(tmp_path / "saved")["prompt_embeddings"], kept["prompt_embeddings"])
    assert not torch.equal(
        weights(tmp_path / "saved")["prompt_embeddings"],
        weights(tmp_path / "saved" / "checkpoint-6")["prompt_embeddings"],
    )


def test_a_full_disk_leaves_the_last_good_checkpoint(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(model_folder, tmp_path / "saved")
    sync = os.fsync

    def full(descriptor: int) -> None:
        if run.n_done > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LlamaError, match="No space left on device"):
        run.run()
    assert run.folder.checkpoints() == [2]
    assert run.folder.load(2).step == 2
    assert not list((tmp_path / "saved").glob("*.partial"))


def test_a_log_that_cannot_be_written_stops_no_run(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("_append", "_plot"):
        monkeypatch.setattr(RunLog, name, full)
    monkeypatch.setattr(logs, "draw", full)
    trainer(model_folder, tmp_path / "saved", max_steps=2).run()
    assert weights(tmp_path / "saved")
    told = [line for line in capsys.readouterr().err.splitlines() if "No space left" in line]
    assert sorted(Path(line.partition(" is written")[0]).name for line in told) == [
        "loss.png", "metrics.jsonl", "tensorboard"
    ]  # fmt: skip


def test_a_loss_that_is_no_number_saves_what_was_good(model_folder: Path, tmp_path: Path) -> None:
    run = trainer(model_folder, tmp_path / "saved", eval_steps=100)
    take = run.stepper.run

    def poison(number: int, batches: Any) -> Any:
        if number == 5:
            with torch.no_grad():
                run.model.norm.weight[0] = float("nan")
        return take(number, batches)

    run.stepper.run = poison
    with pytest.raises(TrainingError, match="the loss is no finite number at step 6"):
        run.run()
    # Checkpoints are due every two steps; the fifth is saved too, and pushes none of them out.
    assert run.folder.checkpoints() == [2, 4, 5]
    assert all(value.isfinite().all() for value in run.folder.load(5).tensors.values())


def test_weights_that_are_no_numbers_are_not_saved(model_folder: Path, tmp_path: Path) -> None:
    run = trainer(model_folder, tmp_path / "saved", eval_steps=100, save_total_limit=1)
    take = run.stepper.run

    def spoil(number: int, batches: Any) -> Any:
        result = take(number, batches)
        if number == 4:
            with torch.no_grad():
                run.tuning.trained[0].parameter[0, 0] = float("nan")
        return result

    run.stepper.run = spoil
    with pytest.raises(TrainingError, match=r"the loss is no finite number at step 6: .*checkpoint-4 is kept$"):
        run.run()
    assert run.folder.checkpoints() == [4]


def test_an_eval_loss_that_is_no_number_is_no_best(model_folder: Path, tmp_path: Path) -> None:
    run = trainer(model_folder, tmp_path / "saved")
    run.stepper.evaluate = lambda _: float("nan")
    with pytest.raises(TrainingError, match="the eval loss is no finite number after step 3"):
        run.run()
    assert run.best is None
    assert run.folder.checkpoints() == [2, 3]


def test_a_folder_where_a_run_was_killed_as_it_began_is_free(tmp_path: Path) -> None:
    (tmp_path / "run.json.partial").write_text("{")
    RunFolder(tmp_path).check({}, resume=False)


def test_a_folder_of_another_run_is_refused(done: tuple[Trainer, Path], tmp_path: Path) -> None:
    _, out = done
    folder = RunFolder(out)
    with pytest.raises(TrainingError, match="holds a run already: add --resume"):
        folder.check({"lr": 0.003}, resume=False)
    with pytest.raises(TrainingError, match=r"cannot go on: lr 0\.003, now 0\.01$"):
        folder.check({"lr": 0.01}, resume=True)
    folder.check({"lr": 0.003}, resume=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TrainingError, match="holds other files"):
        RunFolder(tmp_path).check({}, resume=True)
    with pytest.raises(TrainingError, match="is a file"):
        RunFolder(tmp_path / "notes.txt").check({}, resume=False)
    with pytest.raises(TrainingError, match=r"cannot be made in .*notes\.txt: it is a file"):
        RunFolder(tmp_path / "notes.txt" / "a" / "saved").check({}, resume=False)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nothing", b"{}"])
def test_a_damaged_checkpoint_is_named(done: tuple[Trainer, Path], tmp_path: Path, content: bytes) -> None:
    folder = RunFolder(tmp_path)
    folder.folder(3).mkdir()
    (folder.folder(3) / "state.pt").write_bytes(content)
    with pytest.raises(TrainingError, match=r"state\.pt cannot be read .*delete .*checkpoint-3 and --resume goes on"):
        folder.load(3)


def test_activation_checkpointing_changes_no_bit(model_folder: Path, tmp_path: Path) -> None:
    from llama.finetuning.trainer import checkpoint_blocks

    plain = trainer(model_folder, tmp_path / "plain", "lora", max_steps=3)
    plain.run()
    again = trainer(model_folder, tmp_path / "again", "lora", max_steps=3)
    checkpoint_blocks(again.model)
    again.run()
    ours, theirs = weights(tmp_path / "again"), weights(tmp_path / "plain")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
