"""Perplexity: transformers' own loss on the same windows, at every world size and in every batch; the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import Command, run_forked
from ranks import RankPools
from support import hf_model, sentencepiece_model, write_meta

from llama import Llama
from llama.checkpoint.quantize import quantize_checkpoint
from llama.checkpoint.source import open_checkpoint
from llama.commands.perplexity import main
from llama.errors import LlamaError
from llama.flags import arguments_of
from llama.generation.perplexity import FEWEST, Scores, read_windows, score
from llama.quantization.scheme import Scheme
from llama.tokenizer.texts import windows

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "perplexity.py"
TEXT = " ".join(f"the quick brown fox number {n * n} wab w{chr(97 + n % 26)}" for n in range(150))
LENGTH = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose FFN falls into groups of 32, its tokenizer and a text."""
    folder = tmp_path_factory.mktemp("perplexity")
    sentencepiece_model(folder)
    (folder / "text.txt").write_text(TEXT)
    return write_meta(folder, hf_model("2", intermediate_size=192))


def command(ckpt_dir: Path, text_file: Path, **flags: Any) -> None:
    """`scripts/perplexity.py`, in this process."""
    main(**arguments_of(main, {"ckpt_dir": str(ckpt_dir), "text_file": str(text_file), **flags}))


def measured(
    folder: Path, max_batch_size: int = 8, tensor_split: str | None = None, quantize: str | None = None
) -> Scores:
    """On every rank."""
    threads = torch.get_num_threads()
    llama = Llama.build(
        folder, dtype="fp32", device="cpu", max_seq_len=LENGTH, max_batch_size=max_batch_size,
        tensor_split=tensor_split, plan=False, quantize=quantize,
    )  # fmt: skip
    torch.set_num_threads(threads)
    return score(llama, read_windows(folder / "text.txt", llama.tokenizer, LENGTH))


@pytest.fixture(scope="module")
def alone(folder: Path) -> Scores:
    return measured(folder)


def test_it_is_the_loss_of_transformers(folder: Path, alone: Scores) -> None:
    tokenizer = Llama.build(folder, dtype="fp32", device="cpu").tokenizer
    tokens = tokenizer.encode(TEXT, bos=False, eos=False)
    model, losses = hf_model("2", intermediate_size=192), []
    # Cut here anew: each window begins with BOS and sees nothing before it.
    for first in range(0, len(tokens), LENGTH - 1):
        window = torch.tensor([[1, *tokens[first : first + LENGTH - 1]]])
        with torch.no_grad():
            losses.append(model(window, labels=window).loss.item() * (window.shape[1] - 1))
    assert len(alone.log_probs) == len(tokens)
    assert alone.n_windows == len(losses) > 8
    assert alone.nats == pytest.approx(sum(losses) / len(tokens), rel=1e-5)
    assert alone.perplexity == pytest.approx(math.exp(sum(losses) / len(tokens)), rel=1e-4)


@pytest.mark.parametrize(("world_size", "tensor_split"), [(2, None), (3, None), (4, None), (2, "3,1")])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_the_world_size_changes_nothing(
    pools: RankPools, folder: Path, alone: Scores, world_size: int, tensor_split: str | None, quantize: str | None
) -> None:
    expected = alone if quantize is None else measured(folder, quantize=quantize)
    for found in pools.run(world_size, measured, folder, 8, tensor_split, quantize):
        assert found.nats == pytest.approx(expected.nats, rel=1e-6)
        assert found.log_probs == pytest.approx(expected.log_probs, abs=1e-4)


@pytest.mark.parametrize("max_batch_size", [1, 3])
def test_the_batch_changes_nothing(
    folder: Path, alone: Scores, max_batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama.generation.engine.MAX_SCORED_LOGITS", 2000)
    assert measured(folder, max_batch_size).log_probs == pytest.approx(alone.log_probs, abs=1e-5)


def test_windows_hold_every_token_once() -> None:
    assert windows(range(10, 17), 1, 4) == [[1, 10, 11, 12], [1, 13, 14, 15], [1, 16]]
    assert windows(range(10, 16), 1, 4) == [[1, 10, 11, 12], [1, 13, 14, 15]]
    assert windows([], 1, 4) == []


def test_the_change_is_of_tokens_not_of_the_mean() -> None:
    left, right = Scores((-1.0, -2.0, -3.0), 1), Scores((-2.0, -1.0, -3.0), 1)
    assert left.perplexity == right.perplexity == pytest.approx(math.exp(2))
    assert left.change(right) == pytest.approx(2 / 3)


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_before_and_after_at_two_ranks(folder: Path, alone: Scores, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = [folder, "--text_file", folder / "text.txt", "--max_seq_len", LENGTH, "--quantize", "int4",
             "--quantize_output", "none", "--dtype", "fp32", "--device", "cpu", "--output_json", out]  # fmt: skip
    with Command(words, ranks=2, script=SCRIPT, forked=True) as command:
        done = command.finish()
    assert done.code == 0, done.err
    content = json.loads(out.read_text())
    assert (content["n_tokens"], content["n_windows"]) == (len(alone.log_probs), alone.n_windows)
    assert (content["world_size"], content["device"], content["max_seq_len"]) == (2, "cpu", LENGTH)
    before, after = content["results"]
    assert before["nats"] == pytest.approx(alone.nats, rel=1e-6)
    assert (before["quantization"], before["ratio"], before["change"]) == (None, 1.0, 0.0)
    assert after["quantization"] == "int4 in groups of 32, output kept"
    assert after["ratio"] == pytest.approx(after["perplexity"] / before["perplexity"])
    assert after["change"] > 0.01
    table = done.out.splitlines()
    assert f"{len(alone.log_probs):,} tokens in {alone.n_windows} windows of {LENGTH}" in table[0]
    assert table[1].split() == ["perplexity", "nats", "a", "token", "ratio", "change"]
    assert table[2].split()[-2:] == [f"{before['perplexity']:.4f}", f"{before['nats']:.5f}"]
    assert table[3].split()[-2:] == [f"{after['ratio']:.4f}", f"{after['change']:.4f}"]
    assert len(table) == 4


def test_beside_another_checkpoint(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Quantized as it is loaded or read as quantized: the same figures."""
    written = quantize_checkpoint(open_checkpoint(folder), tmp_path / "int8", Scheme.create("int8"))
    options = {"max_seq_len": LENGTH, "dtype": "fp32", "device": "cpu"}
    command(folder, folder / "text.txt", compare=str(written), quantize="int8", **options)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[3].split()[-4:] == lines[4].split()[-4:]
    command(folder, folder / "text.txt", **options)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["perplexity", "nats", "a", "token"]


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (b"", {}, ["text is empty"]),
        (b" \n\n", {}, ["text is empty"]),
        ("é".encode("latin-1") * 99, {}, ["text is not UTF-8", "byte 0"]),
        (b"the fox", {}, ["2 tokens", str(FEWEST)]),
        (None, {}, ["cannot read", "text"]),
        (TEXT.encode(), {"max_seq_len": 1}, ["max_seq_len", "2", "1"]),
        (TEXT.encode(), {"max_batch_size": 0}, ["max_batch_size", "0"]),
        (TEXT.encode(), {"quantize": "int3"}, ["int3"]),
        (TEXT.encode(), {"group_size": 32}, ["--group_size", "--quantize"]),
        (TEXT.encode(), {"compare": "nowhere"}, ["nowhere"]),
        (TEXT.encode(), {"output_json": "nowhere/x.json"}, ["cannot write nowhere/x.json"]),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(
    folder: Path, tmp_path: Path, content: bytes | None, options: dict[str, object], words: list[str]
) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises(LlamaError) as caught:
        command(folder, tmp_path / "text", **options)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_a_quantized_checkpoint_is_not_quantized_anew(folder: Path, tmp_path: Path) -> None:
    written = quantize_checkpoint(open_checkpoint(folder), tmp_path / "int8", Scheme.create("int8"))
    with pytest.raises(LlamaError, match=r"is quantized .*before and after"):
        command(written, folder / "text.txt", quantize="int8")


@pytest.mark.slow
def test_the_command_leaves_with_code_2(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    done = run_forked({"empty": [SCRIPT, folder, "--text_file", tmp_path / "empty.txt"]})["empty"]
    assert done.code == 2
    assert done.errors == [line for line in done.err.splitlines() if line]
    assert len(done.errors) == 1
    assert not done.out
