"""The benchmarks as a person starts it, on toy models: what it prints and writes, and that its peers agree."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import hf_model, write_meta

pytestmark = pytest.mark.slow

PARTS = {"tokens_per_second", "seconds"}


def bench(root: Path, *flags: str, script: str = "inference") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"scripts/bench/{script}.py", *flags]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)


def report_of(root: Path, tmp_path: Path, *flags: str) -> dict:
    path = tmp_path / "report.json"
    run = bench(root, *flags, "--dtype", "fp32", "--device", "cpu", "--threads", "1", "--output_json", str(path))
    assert run.returncode == 0, run.stderr
    assert "prefill tokens/s" in run.stdout
    return json.loads(path.read_text())


def test_quick(root: Path, tmp_path: Path) -> None:
    report = report_of(
        root, tmp_path, "--quick", "--repeats", "2", "--batch_size", "2", "--keep_dir", str(tmp_path / "w")
    )
    assert set(report) == {
        "date", "command", "machine", "model", "settings", "peers", "ratio", "same_tokens", "equal_tokens"
    }  # fmt: skip
    assert {"cpu", "cores", "memory_bytes", "card", "torch"} <= set(report["machine"])
    assert report["model"]["n_params"] == 3_672_320
    assert set(report["peers"]) == {"ours", "hf"}
    for peer in report["peers"].values():
        assert set(peer["prefill"]) == set(peer["decode"]) == PARTS
        assert len(peer["prefill"]["seconds"]) == 2
        speed = peer["decode"]["tokens_per_second"]
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
        assert peer["memory"]["baseline_bytes"][0] < peer["memory"]["peak_bytes"][0]
    assert set(report["ratio"]["hf"]) == {"prefill", "decode", "peak_memory"}
    assert report["same_tokens"] is True
    assert report["equal_tokens"] == {"hf": 9}
    assert {file.name for file in (tmp_path / "w").iterdir()} == {"config.json", "model.safetensors"}


def test_a_meta_checkpoint_on_two_ranks(root: Path, tmp_path: Path) -> None:
    # Scaled RoPE past its threshold of 64 tokens.
    ckpt = write_meta(tmp_path / "meta", hf_model("3.1"), n_shards=2)
    flags = ("--ckpt_dir", str(ckpt), "--prompt_tokens", "80", "--repeats", "1", "--world_size", "2")
    report = report_of(root, tmp_path, "--quick", *flags)
    assert report["model"]["read_by"] == {"ours": "meta", "hf": "hf"}
    assert len(report["peers"]["ours"]["memory"]["peak_bytes"]) == 2
    assert report["same_tokens"] is True


def test_a_mistake_is_told_in_one_line(root: Path) -> None:
    run = bench(root, "--quick", "--world_size", "9", "--device", "cpu")
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("error: 9 ranks but only 8 attention heads")
    assert "Traceback" not in run.stderr


def test_training_follows_trainer(root: Path, tmp_path: Path) -> None:
    path, picture = tmp_path / "report.json", tmp_path / "chart.png"
    flags = ("--quick", "--rounds", "2", "--batch_sizes", "3", "--device", "cpu", "--threads", "1")
    run = bench(root, *flags, "--output_json", str(path), "--chart_path", str(picture), script="training")
    assert run.returncode == 0, run.stderr
    assert "examples/s" in run.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    report = json.loads(path.read_text())
    assert set(report) == {"date", "command", "machine", "model", "settings", "trial", "batches"}
    batch = report["batches"]["3"]
    assert set(batch["loops"]) == {"ours", "hf", "hf_padded"}
    assert batch["n_examples"] == [9, 9]
    for loop in batch["loops"].values():
        assert len(loop["seconds"]) == len(loop["cpu_seconds"]) == 2
        assert len(loop["losses"]) == 9
        assert 0 < loop["examples_per_second"]["min"] <= loop["examples_per_second"]["max"]
        assert loop["memory"]["baseline_bytes"] < loop["memory"]["peak_bytes"]
    for ratio in batch["ratio"].values():
        # In float32, with steps taken: the same loss, gradient, clipping and optimiser on both sides.
        assert ratio["loss_difference"] < 1e-4
    losses = batch["loops"]["ours"]["losses"]
    assert len(set(losses)) == len(losses)


def test_training_names_a_missing_tokenizer(root: Path) -> None:
    run = bench(root, "--quick", "--dataset", "records.json", "--device", "cpu", script="training")
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("error: --dataset and --tokenizer_path belong together")
