"""The command that answers with what was tuned, as a person types it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import ROOT, Outcome, run_command, run_forked
from support import DIM, hf_model, sentencepiece_model, write_meta

from llama import Llama
from llama.adapters.adapter import PromptAdapter
from llama.adapters.files import write_adapter
from llama.chat import Llama2Format, alpaca_prompt
from llama.checkpoint.source import open_checkpoint

pytestmark = pytest.mark.slow

INSTRUCTIONS = ["the quick brown fox", "number 12, # and [all]"]
EXACT = ("--dtype", "fp32", "--device", "cpu", "--max_gen_len", 6, "--max_seq_len", 1024)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in four shards and a soft prompt for it, laid out as the original fork's were."""
    folder = tmp_path_factory.mktemp("ft")
    write_meta(folder / "ckpts" / "7B_fs4", hf_model("2"), 4, embedding_dim=1, stem="fs_consolidated")
    sentencepiece_model(folder / "ckpts")
    prompt = torch.randn(5, DIM, generator=torch.Generator().manual_seed(6)) * 0.3
    (folder / "saved").mkdir()
    write_adapter(folder / "saved", PromptAdapter(prompt), open_checkpoint(folder / "ckpts" / "7B_fs4").args)
    return folder


@pytest.fixture(scope="module")
def tuned(folder: Path) -> Llama:
    return Llama.build(
        folder / "ckpts" / "7B_fs4", dtype="fp32", device="cpu", max_seq_len=1024, adapter=folder / "saved"
    )


def answer(folder: Path, *words: object, script: str = "example_ft.py", ranks: int | None = None) -> Outcome:
    common = (
        "--ckpt_dir", folder / "ckpts" / "7B_fs4", "--tokenizer_path", folder / "ckpts" / "tokenizer.model",
        "--tuning_ckpt_path", folder / "saved" / "adapter_model.bin",
    )  # fmt: skip
    if ranks is None:
        return run_forked({"alone": [ROOT / script, *common, *EXACT, *words]})["alone"]
    return run_command([*common, *EXACT, *words], ranks, script=ROOT / script, forked=True)


def results(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("ranks", [None, 4])
def test_instructions_go_into_alpacas_template(folder: Path, tuned: Llama, tmp_path: Path, ranks: int | None) -> None:
    """The original fork's command, at its four ranks and at one; its .bin may have become .safetensors."""
    file = tmp_path / "out.json"
    run = answer(folder, "--instructions", json.dumps(INSTRUCTIONS), "--output_json", file, ranks=ranks)
    assert run.code == 0, run.err
    assert run.err.count("with a soft prompt of 5 tokens") == 1
    prompts = [alpaca_prompt(instruction) for instruction in INSTRUCTIONS]
    expected = tuned.collect(prompts, max_gen_len=6, temperature=0)
    for record, instruction, completion in zip(results(file), INSTRUCTIONS, expected, strict=True):
        assert (record["instruction"], record["input"]) == (instruction, "")
        assert record["token_ids"] == completion.tokens
        assert f"{instruction}\n> {completion.text}\n" in run.out
    assert "### Response" not in run.out


def test_an_input_another_template_and_a_stream(folder: Path, tuned: Llama, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    words = ("--instructions", "the fox", "--input", "w11 w12", "--template", "llama2", "--stream")
    run = answer(folder, *words, "--output_json", file)
    assert run.code == 0, run.err
    (record,) = results(file)
    ids = Llama2Format(tuned.tokenizer).encode([{"role": "user", "content": "the fox\n\nw11 w12"}])
    assert record["token_ids"] == tuned.generate([ids], 6, temperature=0)[0][0]
    assert f"the fox\nw11 w12\n> {record['generation']}\n" in run.out


def test_example_takes_an_adapter_too(folder: Path, tuned: Llama, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    words = ("--prompts", "the quick", "--temperature", 0, "--output_json", file)
    assert answer(folder, *words, script="example.py").code == 0
    assert results(file)[0]["token_ids"] == tuned.collect(["the quick"], max_gen_len=6, temperature=0)[0].tokens


MISTAKES = {
    "template": (("--template", "vicuna"), "unknown template 'vicuna': use alpaca, llama2, llama3, plain"),
    "input": (("--input", "x"), "--input is what an instruction is about: add --instructions"),
    "two sources": (("--interactive", "--instructions", "x"), "--interactive reads instructions from the keyboard"),
    "no adapter": (("--tuning_ckpt_path", "nowhere"), "no adapter at nowhere"),
}


@pytest.fixture(scope="module")
def refused(folder: Path) -> dict[str, Outcome]:
    common = (ROOT / "example_ft.py", "--ckpt_dir", folder / "ckpts" / "7B_fs4")
    return run_forked({case: [*common, *words] for case, (words, _) in MISTAKES.items()})


@pytest.mark.parametrize("case", MISTAKES)
def test_refusals(refused: dict[str, Outcome], case: str) -> None:
    run = refused[case]
    assert run.code == 2
    assert len(run.err.splitlines()) == 1
    assert run.err.startswith(f"error: {MISTAKES[case][1]}")
