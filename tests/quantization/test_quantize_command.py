"""`scripts/quantize.py` and the flags of the other commands, as they are run."""

import json
from pathlib import Path

import pytest
from launch import ROOT, Command, Outcome, run_forked
from quantized_support import wide_model
from support import sentencepiece_model, write_meta

pytestmark = pytest.mark.slow


QUANTIZE, SPLIT = ROOT / "scripts" / "quantize.py", ROOT / "split_model.py"
EXAMPLE, EXAMPLE_FT, FT_MAIN = ROOT / "example.py", ROOT / "example_ft.py", ROOT / "ft_main.py"


def on_two_ranks(script: Path, *words: object) -> Outcome:
    with Command(words, 2, script, forked=True) as running:
        return running.finish()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, and records beside it."""
    folder = write_meta(tmp_path_factory.mktemp("base") / "7B", wide_model(), 2)
    sentencepiece_model(folder)
    records = [{"instruction": f"w{n} the quick", "input": "", "output": f"brown fox {n}"} for n in range(40)]
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def test_what_is_written_runs_and_is_split(folder: Path, tmp_path: Path) -> None:
    out, parts = tmp_path / "7B-int4", tmp_path / "parts"
    scheme = ["int4", "--group_size", 64, "--quantize_output", "none"]
    asked = ["--prompts", "the quick", "--temperature", 0, "--max_gen_len", 8, "--dtype", "fp32"]
    done = run_forked(
        {
            "written": [QUANTIZE, folder, out, "--type", *scheme],
            "parts": [SPLIT, "--ckpt_dir", out, "--n", 2, "--output_dir", parts],
            "verified": [SPLIT, "verify", parts],
            "whole": [EXAMPLE, "--ckpt_dir", out, *asked],
            "at load": [EXAMPLE, "--ckpt_dir", folder, "--quantize", *scheme, *asked],
        }
    )
    done["split"] = on_two_ranks(EXAMPLE, "--ckpt_dir", parts, *asked)
    assert [outcome.code for outcome in done.values()] == [0] * 6, done
    assert f"wrote {out} (" in done["written"].out
    assert "int4 in groups of 64, output kept" in done["written"].out
    assert f"example.py --ckpt_dir {out}" in done["written"].out
    assert done["whole"].out == done["split"].out == done["at load"].out
    assert "the quick" in done["whole"].out
    assert "int4 in groups of 64, output kept, " in done["whole"].err


MISTAKES = {
    "type": (["--type", "int3"], ["--type 'int3'", "int8, int4"]),
    "no type": ([], ["--type must be given"]),
    "group size": (["--type", "int4", "--group_size", "48"], ["group_size 48", "32, 64, 128"]),
    "rows": (["--type", "int4", "--group_size", "128"], ["rows of 704", "groups of 128", "group_size 32 or 64"]),
    "of rows": (["--type", "int8", "--group_size", "64"], ["nothing is int4"]),
}


@pytest.fixture(scope="module")
def refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Outcome], Path]:
    """How every mistake ends, and where files would have lain."""
    place = tmp_path_factory.mktemp("refused")
    return run_forked({name: [QUANTIZE, folder, place / name, *words] for name, (words, _) in MISTAKES.items()}), place


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_told_in_one_line(refused: tuple[dict[str, Outcome], Path], case: str) -> None:
    run = refused[0][case]
    assert run.code == 2
    assert run.out == ""
    (line,) = run.err.strip().splitlines()
    assert line.startswith("error: ")
    for part in MISTAKES[case][1]:
        assert part in line
    assert not list(refused[1].iterdir())


def test_a_quantized_one_is_not_quantized_again(folder: Path, tmp_path: Path) -> None:
    runs = run_forked(
        {
            "first": [QUANTIZE, folder, tmp_path / "int8", "--type", "int8"],
            "again": [QUANTIZE, tmp_path / "int8", tmp_path / "int4", "--type", "int4"],
        }
    )
    assert (runs["first"].code, runs["again"].code) == (0, 2)
    assert "is quantized (int8, output int8)" in runs["again"].err
    assert "start from the original checkpoint" in runs["again"].err
    assert not (tmp_path / "int4").exists()


@pytest.mark.parametrize("method", ["prompt", "lora"])
def test_ft_main_tunes_over_integers(folder: Path, tmp_path: Path, method: str) -> None:
    integers = ["--quantize", "int4", "--quantize_output", "int4"]
    words = ["--ckpt_dir", folder, "--dataset", folder / "data.json", "--max_steps", 4, "--method", method]
    words += [*integers, "--threads", 1, "--output_dir"]
    one, two = tmp_path / "1", tmp_path / "2"
    asked = ["--ckpt_dir", folder, "--tuning_ckpt_path", two, "--instructions", "w1 the quick", "--max_gen_len", 4]
    tuned = {two: on_two_ranks(FT_MAIN, *words, two)}
    runs = run_forked(
        {
            "alone": [FT_MAIN, *words, one],
            "again": [FT_MAIN, *words, two, "--group_size", 64, "--resume"],
            "answered": [EXAMPLE_FT, *asked, *integers],
        }
    )
    tuned[one] = runs["alone"]
    losses = []
    for out, run in tuned.items():
        assert run.code == 0, run.err
        assert "int4 in groups of 32, output int4 in groups of 32, " in run.err
        assert f"--tuning_ckpt_path {out} --quantize int4 --quantize_output int4" in run.out
        losses.append([json.loads(line).get("loss") for line in (out / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert runs["again"].code == 2
    assert "quantization" in runs["again"].err
    assert runs["answered"].code == 0, runs["answered"].err
