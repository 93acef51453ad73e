"""The benchmarks as a person starts them, on toy models: tables, files and charts, and that the peers agree."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from launch import ROOT, Outcome, run_forked
from support import hf_model, write_meta

from llama.errors import LlamaError

pytestmark = pytest.mark.slow

PARTS = {"tokens_per_second", "seconds"}


def bench(root: Path, *flags: str, script: str = "inference") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"scripts/bench/{script}.py", *flags]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=500)


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
        "date", "command", "machine", "model", "settings", "limits", "peers", "ratio", "same_tokens", "equal_tokens",
        "scaling", "not_run",
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
    assert set(report["ratio"]) == {"ours / hf"}
    assert set(report["ratio"]["ours / hf"]) == {"prefill", "decode", "peak_memory"}
    assert set(report["peers"]["ours"]["of_limits"]) == {"prefill", "decode"}
    assert min(report["limits"].values()) > 0
    assert report["scaling"] is None
    assert report["same_tokens"] is True
    assert report["equal_tokens"] == {"ours / hf": 9}
    assert {file.name for file in (tmp_path / "w").iterdir()} == {"config.json", "model.safetensors"}


def test_precisions_beside_llama_cpp(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    path, picture = tmp_path / "report.json", tmp_path / "chart.png"
    flags = ("--quick", "--precisions", "fp32,int8,int4", "--scaling", "--repeats", "1", "--threads", "2")
    run = bench(root, *flags, "--device", "cpu", "--output_json", str(path), "--chart", str(picture))
    assert run.returncode == 0, run.stderr
    assert "2 ranks of a thread each" in run.stdout
    assert "not run: decode beside a card's copy bandwidth" in run.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    report = json.loads(path.read_text())
    ours, theirs = ("ours_fp32", "ours_int8", "ours_int4"), ("llamacpp_f32", "llamacpp_q8_0", "llamacpp_q4_0")
    assert set(report["peers"]) == {*ours, "hf", *theirs}
    pairs = [f"{one} / {other}" for one, other in zip(ours, theirs, strict=True)]
    assert set(report["ratio"]) == {*pairs, *(f"{one} / hf" for one in ours)}
    assert report["equal_tokens"] == {"ours_fp32 / hf": 9, "ours_fp32 / llamacpp_f32": 9}
    assert all(report["peers"][name]["amx"] in ("always", "decode", "never") for name in theirs)
    assert set(report["scaling"]["ratio"]) == {"ranks", "gloo_ranks", "batch"}
    assert len(report["scaling"]["batch"]["decode"]["seconds"]) == 1


def test_a_meta_checkpoint_on_two_ranks(root: Path, tmp_path: Path) -> None:
    # Scaled RoPE past its threshold of 64 tokens.
    ckpt = write_meta(tmp_path / "meta", hf_model("3.1"), n_shards=2)
    flags = ("--ckpt_dir", str(ckpt), "--prompt_tokens", "80", "--repeats", "1", "--world_size", "2")
    report = report_of(root, tmp_path, "--quick", *flags)
    assert report["model"]["read_by"] == {"ours": "meta", "hf": "hf"}
    assert len(report["peers"]["ours"]["memory"]["peak_bytes"]) == 2
    assert report["same_tokens"] is True


MISTAKES = {
    "inference": (("--world_size", "9", "--device", "cpu"), "9 ranks but only 8 attention heads"),
    "collectives": (("--world_sizes", "1,9"), "9 ranks but only 8 attention heads"),
    "memory": (("--geometry", "7B"), "no published geometry is called '7B'"),
    "training": (("--dataset", "records.json", "--device", "cpu"), "--dataset and --tokenizer_path belong together"),
}


@pytest.fixture(scope="module")
def refused() -> dict[str, Outcome]:
    scripts = ROOT / "scripts" / "bench"
    return run_forked({name: [scripts / f"{name}.py", "--quick", *flags] for name, (flags, _) in MISTAKES.items()})


@pytest.mark.parametrize("script", MISTAKES)
def test_a_mistake_is_told_in_one_line(refused: dict[str, Outcome], script: str) -> None:
    run = refused[script]
    assert run.code == 2
    assert run.err.splitlines()[-1].startswith(f"error: {MISTAKES[script][1]}")
    assert "Traceback" not in run.err


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("inference", ("--precisions", "bf16,int3"), "--precisions 'int3' is not one of fp32, fp16, bf16, int8, int4"),
        ("inference", ("--precisions", "int4", "--group_size", "48"), "group_size 48 is not one of 32, 64, 128"),
        ("inference", ("--peers", "vllm"), "--peers 'vllm' is not one of hf, hf_static, llamacpp"),
        ("inference", ("--compile", "maybe"), "compile 'maybe' is not one of auto, on, off"),
        ("inference", ("--scaling", "yes", "--threads", "1"), "--scaling compares one rank of N threads with N ranks"),
        ("memory", ("--tokens", "2"), "tokens must be at least 3"),
        ("memory", ("--tensor_split", "3,x"), "tensor_split '3,x' is not a list of numbers"),
        ("collectives", ("--links", "string"), "no link is called 'string'"),
        ("collectives", ("--world_sizes", "2,4"), "--world_sizes begins with 1"),
        ("collectives", ("--chart", "missing/chart.png"), "cannot write missing/chart.png"),
    ],
)
def test_bad_arguments(root: Path, script: str, flags: tuple[str, ...], words: str) -> None:
    # What a command makes of a LlamaError is the test before this one's.
    main = importlib.import_module(f"scripts.bench.{script}").main
    values = dict(zip(flags[::2], flags[1::2], strict=True))
    typed = {name.removeprefix("--"): int(value) if value.isdecimal() else value for name, value in values.items()}
    with pytest.raises(LlamaError) as told:
        main(quick=True, **typed)
    assert str(told.value).startswith(words)


def test_memory(root: Path, tmp_path: Path) -> None:
    path, picture = tmp_path / "report.json", tmp_path / "chart.png"
    run = bench(root, "--quick", "--output_json", str(path), "--chart", str(picture), script="memory")
    assert run.returncode == 0, run.stderr
    assert "within one unit of their weights" in run.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    report = json.loads(path.read_text())
    assert set(report) == {"date", "command", "machine", "model", "settings", "cases", "split"}
    for case in report["cases"]:
        assert set(case) == {
            "world_size", "batch_size", "precision", "limit_bytes", "fork_bytes", "planned_bytes", "ranks"
        }  # fmt: skip
        for rank in case["ranks"]:
            assert set(rank) == {"rank", "weights", "cache", "prefill", "decode", "total"}
            assert rank["total"] == rank["weights"] + rank["cache"] + max(rank["prefill"], rank["decode"])
    assert set(report["split"]) == {
        "tensor_split", "batch_size", "precision", "ranks", "shares", "wanted", "unit_bytes", "misfit_bytes"
    }  # fmt: skip


def test_collectives(root: Path, tmp_path: Path) -> None:
    path, picture = tmp_path / "report.json", tmp_path / "chart.png"
    flags = ("--links", "PCIe 4 x16,string=1000us@0.001", "--output_json", str(path), "--chart", str(picture))
    run = bench(root, "--quick", *flags, script="collectives")
    assert run.returncode == 0, run.stderr
    assert "every run: two all-reduces a layer" in run.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    report = json.loads(path.read_text())
    assert set(report) == {"date", "command", "machine", "model", "settings", "runs"}
    assert len(report["runs"]) == 4 * 3
    for entry in report["runs"]:
        assert set(entry) == {
            "stage", "batch_size", "world_size", "calls", "count", "bytes", "expected", "compute_seconds", "links"
        }  # fmt: skip
        assert entry["expected"] is True
        assert set(entry["links"]) == {"PCIe 4 x16", "string"}
        assert entry["links"]["string"]["speedup"] <= 1
        assert (entry["count"] == 0) == (entry["world_size"] == 1)


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
