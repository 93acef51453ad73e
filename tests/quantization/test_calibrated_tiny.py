"""What quantizing the bundled model costs, on text of the kind that it was trained on, calibrated and not.

The text that is measured and the one that is calibrated on are drawn apart, and neither was trained on.
"""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

import pytest
import torch
from launch import Command, run_forked

from llama import Llama
from llama.generation.perplexity import Scores, read_windows, score
from scripts.tiny.corpus import documents, story

pytestmark = pytest.mark.slow

MODEL = Path(__file__).parent.parent.parent / "ckpts" / "tiny"


def mixed_text(seed: int, n_documents: int, n_stories: int) -> str:
    """Documents as in training, then stories."""
    drawn = islice(documents(seed), n_documents)
    tasks = ["\n".join(f"{turn.prompt} {turn.completion}".strip() for turn in document) for document in drawn]
    rng = random.Random(f"stories {seed}")
    return "\n\n".join(tasks) + "\n" + "\n".join(story(rng) for _ in range(n_stories))


def story_text(seed: int, n_stories: int) -> str:
    rng = random.Random(f"measured {seed}")
    return "\n".join(story(rng) for _ in range(n_stories))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    contents = {
        "calibration": mixed_text(3003, 200, 70),
        "tasks": mixed_text(2002, 200, 0),
        "stories": story_text(5, 80),
    }
    for name, content in contents.items():
        (folder / name).write_text(content)
    return {name: folder / name for name in contents}


def command(script: str, *words: object) -> str:
    path = MODEL.parent.parent / "scripts" / script
    with Command(words, script=path) as running:
        done = running.finish(timeout=600)
    assert done.code == 0, done.err
    return done.out


@pytest.fixture(scope="module")
def calibrated(texts: dict[str, Path]) -> Path:
    """As a person makes it: the real command."""
    out = texts["calibration"].parent / "int4"
    said = command(
        "quantize.py", MODEL, out, "--type", "int4", "--group_size", "32", "--quantize_output", "none",
        "--calibrate", texts["calibration"], "--device", "cpu",
    )  # fmt: skip
    assert "int4 in groups of 32, output kept, calibrated" in said
    return out


Measured = dict[str, dict[str, Scores]]


@pytest.fixture(scope="module")
def measured(texts: dict[str, Path], calibrated: Path) -> Measured:
    """Scores of each text under each model."""
    from llama.quantization.scheme import Scheme

    int4 = Scheme.create("int4", 32, "none")
    ways = {
        "original": (MODEL, None),
        "int8": (MODEL, "int8"),
        "plain": (MODEL, int4),
        "calibrated": (calibrated, None),
    }
    found: Measured = {}
    for way, (folder, quantize) in ways.items():
        llama = Llama.build(
            folder, MODEL / "tokenizer.model", dtype="fp32", device="cpu", max_batch_size=8, quantize=quantize
        )
        found[way] = {
            name: score(llama, read_windows(texts[name], llama.tokenizer, 512)) for name in ("tasks", "stories")
        }
    return found


def cost(measured: Measured, way: str, text: str) -> float:
    """By how much a text's perplexity rises."""
    return measured[way][text].perplexity / measured["original"][text].perplexity - 1


def change(measured: Measured, way: str, text: str) -> float:
    return measured[way][text].change(measured["original"][text])


@pytest.mark.parametrize("text", ["tasks", "stories"])
def test_int8_costs_less_than_half_a_per_cent(measured: Measured, text: str) -> None:
    assert abs(cost(measured, "int8", text)) < 0.005


@pytest.mark.parametrize("text", ["tasks", "stories"])
def test_calibrated_int4_costs_less_than_six_per_cent(measured: Measured, text: str) -> None:
    assert abs(cost(measured, "calibrated", text)) < 0.06


def test_and_clearly_less_than_plain_rounding(measured: Measured) -> None:
    assert cost(measured, "plain", "stories") > 0.02
    assert cost(measured, "calibrated", "stories") < 0.6 * cost(measured, "plain", "stories")


@pytest.mark.parametrize("text", ["tasks", "stories"])
def test_single_tokens_change_half_as_much(measured: Measured, text: str) -> None:
    """A sharper look than the mean: roundings that help some tokens and harm others cancel in a perplexity."""
    assert change(measured, "calibrated", text) < 0.6 * change(measured, "plain", text)


def test_what_is_written_says_so(calibrated: Path) -> None:
    from llama.checkpoint.source import open_checkpoint

    scheme = open_checkpoint(calibrated).scheme
    assert scheme is not None
    assert scheme.calibrated


def test_calibration_is_the_same_whoever_asks(texts: dict[str, Path], calibrated: Path) -> None:
    """The numbers in the file are those that the function gives."""
    from llama.checkpoint.calibrate import calibrated as chosen
    from llama.checkpoint.calibrate import read_calibration
    from llama.checkpoint.source import open_checkpoint
    from llama.quantization.scheme import Scheme
    from llama.tokenizer import load_tokenizer

    sequences = read_calibration(texts["calibration"], load_tokenizer(MODEL / "tokenizer.model"))
    stored = open_checkpoint(calibrated).tensors
    name, packed, scales = next(chosen(open_checkpoint(MODEL), Scheme.create("int4", 32, "none"), sequences))
    for key, values in ((name, packed), (name.replace(".weight", ".scales"), scales)):
        out = torch.empty_like(values)
        stored[key].read_into(stored[key].spec.whole, out)
        assert torch.equal(out, values)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--type", "int4", "--calibrate", "short"], ["short has", "2044 at least"]),
        (["--type", "int8", "--calibrate", "calibration"], ["nothing is int4"]),
    ],
)
def test_what_cannot_be_calibrated_is_said_in_one_line(
    texts: dict[str, Path], tmp_path: Path, words: list[str], said: list[str]
) -> None:
    folder = texts["calibration"].parent
    (folder / "short").write_text("Once upon a time")
    script = MODEL.parent.parent / "scripts" / "quantize.py"
    done = run_forked({"calibrate": [script, MODEL, tmp_path / "out", *words]}, folder)["calibrate"]
    assert done.code == 2
    assert len(done.errors) == 1
    assert all(word in done.errors[0] for word in said), done.errors
    assert not list(tmp_path.iterdir())
