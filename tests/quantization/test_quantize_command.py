"""`scripts/quantize.py` and the flags of the other commands, as they are run."""

import json
from pathlib import Path

import pytest
from launch import ROOT, Command, Outcome
from quantized_support import wide_model
from support import sentencepiece_model, write_meta

pytestmark = pytest.mark.slow


def command(*words: object, script: str = "scripts/quantize.py", ranks: int | None = None) -> Outcome:
    with Command(words, ranks, ROOT / script) as running:
        return running.finish(timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, and records beside it."""
    folder = write_meta(tmp_path_factory.mktemp("base") / "7B", wide_model(), 2)
    sentencepiece_model(folder)
    records = [{"instruction": f"w{n} the quick", "input": "", "output": f"brown fox {n}"} for n in range(40)]
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def test_what_is_written_runs_and_is_split(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "7B-int4"
    written = command(folder, out, "--type", "int4", "--group_size", 64, "--quantize_output", "none")
    assert written.code == 0, written.err
    assert f"wrote {out} (" in written.out
    assert "int4 in groups of 64, output kept" in written.out
    assert f"example.py --ckpt_dir {out}" in written.out
    parts = command("--ckpt_dir", out, "--n", 2, "--output_dir", tmp_path / "parts", script="split_model.py")
    assert parts.code == 0, parts.err
    assert command("verify", tmp_path / "parts", script="split_model.py").code == 0
    asked = ["--prompts", "the quick", "--temperature", 0, "--max_gen_len", 8, "--dtype", "fp32"]
    whole = command("--ckpt_dir", out, *asked, script="example.py")
    split = command("--ckpt_dir", tmp_path / "parts", *asked, script="example.py", ranks=2)
    at_load = command(
        "--ckpt_dir", folder, "--quantize", "int4", "--group_size", 64, "--quantize_output", "none", *asked,
        script="example.py",
    )  # fmt: skip
    assert whole.code == split.code == at_load.code == 0, whole.err + split.err + at_load.err
    assert whole.out == split.out == at_load.out
    assert "int4 in groups of 64, output kept, " in whole.err


MISTAKES = {
    "type": (["--type", "int3"], ["'int3'", "int8, int4"]),
    "no type": ([], ["--type must be given"]),
    "group size": (["--type", "int4", "--group_size", "48"], ["group_size 48", "32, 64, 128"]),
    "rows": (["--type", "int4", "--group_size", "128"], ["rows of 704", "groups of 128", "group_size 32 or 64"]),
    "of rows": (["--type", "int8", "--group_size", "64"], ["nothing is int4"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_told_in_one_line(folder: Path, tmp_path: Path, case: str) -> None:
    words, parts = MISTAKES[case]
    run = command(folder, tmp_path / "out", *words)
    assert run.code == 2
    assert run.out == ""
    (line,) = run.err.strip().splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line
    assert not list(tmp_path.iterdir())


def test_a_quantized_one_is_not_quantized_again(folder: Path, tmp_path: Path) -> None:
    assert command(folder, tmp_path / "int8", "--type", "int8").code == 0
    run = command(tmp_path / "int8", tmp_path / "int4", "--type", "int4")
    assert run.code == 2
    assert "is quantized (int8, output int8)" in run.err
    assert "start from the original checkpoint" in run.err
    assert not (tmp_path / "int4").exists()


@pytest.mark.parametrize("method", ["prompt", "lora"])
def test_ft_main_tunes_over_integers(folder: Path, tmp_path: Path, method: str) -> None:
    words = ["--ckpt_dir", folder, "--dataset", folder / "data.json", "--max_steps", 4, "--method", method]
    words += ["--quantize", "int4", "--quantize_output", "int4", "--threads", 1]
    losses = []
    for ranks in (None, 2):
        out = tmp_path / str(ranks)
        run = command(*words, "--output_dir", out, script="ft_main.py", ranks=ranks)
        assert run.code == 0, run.err
        assert "int4 in groups of 32, output int4 in groups of 32, " in run.err
        assert f"--tuning_ckpt_path {out} --quantize int4 --quantize_output int4" in run.out
        losses.append([json.loads(line).get("loss") for line in (out / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    again = command(*words[:-2], "--group_size", 64, "--output_dir", tmp_path / "2", "--resume", script="ft_main.py")
    assert again.code == 2
    assert "quantization" in again.err
    answered = command(
        "--ckpt_dir", folder, "--tuning_ckpt_path", tmp_path / "2", "--quantize", "int4", "--quantize_output", "int4",
        "--instructions", "w1 the quick", "--max_gen_len", 4, script="example_ft.py",
    )  # fmt: skip
    assert answered.code == 0, answered.err
