"""Every mistake a person can make: one line that says what is wrong and what to do, code 2, no traceback."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import EXAMPLE, Outcome, run_command, run_forked
from support import hf_model, sentencepiece_model, write_hf, write_meta

from llama.checkpoint.quantize import quantize_checkpoint
from llama.checkpoint.source import open_checkpoint
from llama.quantization.scheme import Scheme

pytestmark = pytest.mark.slow

# Name of the case: flags, and what the line must say. Paths are those of the fixture `folder`.
CASES: dict[str, tuple[list[str], list[str]]] = {
    "missing folder": (["--ckpt_dir", "nowhere"], ["nowhere", "no such folder"]),
    "empty folder": (["--ckpt_dir", "empty"], ["empty holds no checkpoint", "consolidated.NN.pth"]),
    "a file as folder": (["--ckpt_dir", "latin.txt"], ["latin.txt is a file", "--ckpt_dir"]),
    "truncated shard": (["--ckpt_dir", "truncated"], ["truncated/consolidated.00.pth", "cut off"]),
    "truncated safetensors": (["--ckpt_dir", "truncated_hf"], ["truncated_hf/model.safetensors", "cut off"]),
    "empty shard": (["--ckpt_dir", "zero"], ["zero/consolidated.00.pth is empty"]),
    "unreadable shard": (["--ckpt_dir", "dangling"], ["cannot read dangling/consolidated.00.pth"]),
    "garbage": (["--ckpt_dir", "garbage"], ["garbage/consolidated.00.pth", "damaged"]),
    "a pickle with code": (["--ckpt_dir", "evil"], ["evil/consolidated.00.pth", "could run code", "refused"]),
    "first shard missing": (["--ckpt_dir", "lacks_first"], ["lacks consolidated.00.pth"]),
    "last shard missing": (["--ckpt_dir", "lacks_last"], ["lacks_last", "[160, 64]", "[320, 64]", "shard missing"]),
    "unknown params key": (["--ckpt_dir", "unknown"], ["params.json", "sliding_window"]),
    "params against tensors": (["--ckpt_dir", "contradicts"], ["contradicts", "missing", "layers.2."]),
    "params that are no JSON": (["--ckpt_dir", "nojson"], ["params.json", "not JSON"]),
    "no params": (["--ckpt_dir", "noparams"], ["noparams has no params.json"]),
    "tokenizer of no kind": (["--tokenizer_path", "junk.model"], ["junk.model is no tokenizer"]),
    "weights as tokenizer": (["--tokenizer_path", "good/consolidated.00.pth"], ["is no tokenizer"]),
    "missing tokenizer": (["--tokenizer_path", "nowhere"], ["no tokenizer at nowhere"]),
    "larger tokenizer": (["--tokenizer_path", "large/tokenizer.model"], ["400 tokens", "320"]),
    "long tensor_split": (["--tensor_split", "3,1"], ["'3,1' has 2 entries for 1 rank"]),
    "zero in tensor_split": (["--tensor_split", "0"], ["'0'", "above zero"]),
    "no numbers in tensor_split": (["--tensor_split", "a,b"], ["'a,b'", "3,1"]),
    "unknown flag": (["--temprature", "0"], ["unknown flag --temprature", "did you mean --temperature?"]),
    "missing value": (["--seed"], ["--seed needs a value"]),
    "stray word": (["Hello"], ["stray word 'Hello'"]),
    "negative temperature": (["--temperature", "-1"], ["temperature", "-1.0"]),
    "temperature nan": (["--temperature", "nan"], ["temperature", "nan"]),
    "top_p": (["--top_p", "1.5"], ["top_p", "1.5"]),
    "top_k": (["--top_k", "0"], ["top_k", "0"]),
    "max_gen_len": (["--max_gen_len", "-1"], ["max_gen_len", "-1"]),
    "max_seq_len": (["--max_seq_len", "0"], ["max_seq_len", "0"]),
    "max_batch_size": (["--max_batch_size", "-2"], ["max_batch_size", "-2"]),
    "layers to offload": (["--offload_layers", "3"], ["--offload_layers 3", "2 layers"]),
    "fewer layers than none": (["--offload_layers", "-1"], ["--offload_layers -1", "2 layers"]),
    "threads": (["--threads", "0"], ["threads", "0"]),
    "dtype": (["--dtype", "int8"], ["'int8'", "auto, fp32, bf16, fp16"]),
    "no such precision": (["--quantize", "int3"], ["--quantize 'int3'", "int8, int4"]),
    "no such group": (["--quantize", "int4", "--group_size", "48"], ["group_size 48", "32, 64, 128"]),
    "a group of nothing": (["--group_size", "64"], ["--group_size needs --quantize"]),
    "a group of rows": (["--quantize", "int8", "--group_size", "64"], ["--group_size 64", "nothing is int4"]),
    "groups that do not divide": (["--quantize", "int4"], ["rows of 176", "groups of 32", "use int8"]),
    "no such output": (["--quantize", "int8", "--quantize_output", "fp8"], ["--quantize_output 'fp8'", "none"]),
    "quantized otherwise": (["--ckpt_dir", "int8", "--quantize", "int4"], ["int8 is quantized already", "original"]),
    "no such device": (["--device", "cuda"], ["no CUDA card", "--device cpu"]),
    "no such kind of device": (["--device", "tpu"], ["'tpu'", "auto, cpu, cuda"]),
    "chat format": (["--chat_format", "llama9"], ["'llama9'", "llama2"]),
    "empty list": (["--prompts", "[]"], ["--prompts is an empty list"]),
    "list of numbers": (["--prompts", "[1, 2]"], ["--prompts must be a JSON list of texts"]),
    "half a surrogate pair": (["--prompts", '["\\ud800"]'], ["--prompts", "Unicode"]),
    "empty prompt file": (["--prompt_file", "blank.txt"], ["blank.txt holds no prompt"]),
    "empty list in a file": (["--prompt_file", "list.json"], ["list.json is an empty list"]),
    "broken JSON": (["--prompt_file", "broken.json"], ["broken.json is not JSON"]),
    "missing prompt file": (["--prompt_file", "nowhere"], ["cannot read nowhere"]),
    "folder as prompt file": (["--prompt_file", "empty"], ["cannot read empty"]),
    "not UTF-8": (["--prompt_file", "latin.txt"], ["latin.txt is not UTF-8", "byte 3"]),
    "no dialogs": (["--dialogs", "list.json"], ["list.json holds no dialog"]),
    "dialogs that are no JSON": (["--dialogs", "blank.txt"], ["blank.txt is not JSON"]),
    "two sources": (["--prompts", "a", "--interactive"], ["--prompts and --interactive", "choose one"]),
    "echo of dialogs": (["--dialogs", "list.json", "--echo"], ["--echo", "leave it out"]),
    "output into no folder": (["--output_json", "nowhere/o.json"], ["nowhere/o.json", "no folder"]),
    "output onto a folder": (["--output_json", "empty"], ["empty", "is a folder"]),
}  # fmt: skip
# What only the tokenizer or the chat format can tell.
LATER: dict[str, tuple[list[str], list[str]]] = {
    "over-long prompt": (["--prompts", "the quick " * 9, "--max_seq_len", "5"], ["prompt 0 has", "max_seq_len is 5"]),
    "unknown role": (["--dialogs", "bob.json"], ["dialog 0, turn 0", "'bob'"]),
}


class RunsCode:
    """What a hostile checkpoint unpickles to."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("PWNED",)


def write_cases(folder: Path) -> None:
    model = hf_model("2")
    good = write_meta(folder / "good", model)
    pair = write_meta(folder / "lacks_first", model, 2)
    shutil.copytree(pair, folder / "lacks_last")
    (pair / "consolidated.00.pth").unlink()
    (folder / "lacks_last" / "consolidated.01.pth").unlink()
    for name in ("truncated", "zero", "dangling", "garbage", "evil", "unknown", "contradicts", "nojson", "noparams"):
        shutil.copytree(good, folder / name)
    os.truncate(folder / "truncated" / "consolidated.00.pth", 100_000)
    os.truncate(folder / "zero" / "consolidated.00.pth", 0)
    (folder / "dangling" / "consolidated.00.pth").unlink()
    (folder / "dangling" / "consolidated.00.pth").symlink_to("nothing")
    (folder / "garbage" / "consolidated.00.pth").write_bytes(bytes(range(256)) * 999)
    torch.save({"tok_embeddings.weight": RunsCode()}, folder / "evil" / "consolidated.00.pth")
    for name, change in (("unknown", {"sliding_window": 4}), ("contradicts", {"n_layers": 3})):
        params = json.loads((good / "params.json").read_text())
        (folder / name / "params.json").write_text(json.dumps(params | change))
    (folder / "nojson" / "params.json").write_text("{")
    (folder / "noparams" / "params.json").unlink()
    truncated = write_hf(folder / "truncated_hf", model) / "model.safetensors"
    os.truncate(truncated, truncated.stat().st_size - 5000)
    quantize_checkpoint(open_checkpoint(good), folder / "int8", Scheme.create("int8"))
    write_meta(
        folder / "onehead", hf_model("1", hidden_size=64, num_attention_heads=1, num_key_value_heads=1, head_dim=64)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    write_cases(folder)
    sentencepiece_model(folder)
    sentencepiece_model(folder / "large", 400)
    (folder / "empty").mkdir()
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "blank.txt").write_text("\n \n")
    (folder / "list.json").write_text("[]")
    (folder / "broken.json").write_text('["one",')
    (folder / "bob.json").write_text('[[{"role": "bob", "content": "hi"}]]')
    (folder / "junk.model").write_text("hello " * 99)
    return folder


def with_defaults(words: list[str]) -> list[str]:
    """The case's flags, the good checkpoint where they name none, and no thousand tokens should it run."""
    defaults = {"--ckpt_dir": "good", "--max_gen_len": "1"}
    return [*words, *(word for flag, value in defaults.items() if flag not in words for word in (flag, value))]


@pytest.fixture(scope="module")
def verdicts(folder: Path) -> dict[str, Outcome]:
    """How every case ends."""
    before = sorted(folder.rglob("*"))
    # A flag without its value must stay the last word.
    cases = {
        name: [EXAMPLE, *(with_defaults([]) + words if words[-1].startswith("--") else with_defaults(words))]
        for name, (words, _) in (CASES | LATER).items()
    }
    outcomes = run_forked(cases, folder, CUDA_VISIBLE_DEVICES="")
    assert sorted(folder.rglob("*")) == before, "a refused command leaves nothing behind"
    return outcomes


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_told_in_one_line(verdicts: dict[str, Outcome], case: str) -> None:
    outcome = verdicts[case]
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1, outcome.err
    for part in CASES[case][1]:
        assert part in outcome.err


@pytest.mark.parametrize("case", LATER)
def test_what_shows_after_loading_is_told_too(verdicts: dict[str, Outcome], case: str) -> None:
    outcome = verdicts[case]
    assert (outcome.code, outcome.out) == (2, "")
    (told,) = [line for line in outcome.err.splitlines() if not line.startswith("loaded ")]
    assert told.startswith("error: ")
    for part in LATER[case][1]:
        assert part in told


def test_the_driver_can_tell_success(folder: Path) -> None:
    run = run_command(["--ckpt_dir", folder / "good", "--prompts", "the", "--max_gen_len", 1])
    assert run.code == 0, run.err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--ckpt_dir", "onehead"], ["2 ranks", "1 attention head"]),
        (["--ckpt_dir", "evil"], ["evil/consolidated.00.pth", "could run code"]),
        (["--ckpt_dir", "good", "--tensor_split", "3,0"], ["'3,0'", "above zero"]),
    ],
)
def test_rank_0_speaks_and_all_ranks_leave_with_2(folder: Path, words: list[str], parts: list[str]) -> None:
    run = run_command(words, 2, forked=True, cwd=folder)
    assert run.code == 1  # torchrun's own
    assert run.rank_codes == [2, 2]
    assert len(run.errors) == 1
    assert not run.has_our_traceback
    assert run.out == ""
    assert not (folder / "PWNED").exists()
    for part in parts:
        assert part in run.errors[0]


ONE_RANK = """
import torch
from llama import env
from llama.cli import run
from llama.errors import CheckpointError
from llama.parallel import groups

def main(phase: bool = False) -> None:
    ranks = groups.start(torch.device("cpu"))
    if phase:
        with groups.phase("load"):
            if env.rank() == 1:
                raise CheckpointError("shard 1 cannot be read: copy it again")
    if env.rank() == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. More words.")
    torch.distributed.all_reduce(torch.ones(1), group=ranks.group)

run(main)
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--phase"], "error: shard 1 cannot be read: copy it again"),
        ([], "error: rank 1 is out of memory (CUDA out of memory. Tried to allocate 2.50 GiB)"),
    ],
)
def test_what_one_rank_meets_is_told_once_and_ends_all(tmp_path: Path, words: list[str], said: str) -> None:
    script = tmp_path / "one_rank.py"
    script.write_text(ONE_RANK)
    run = run_command(words, 3, script=script, forked=True)
    assert run.code == 1
    assert run.rank_codes == [2, 2, 2]
    assert len(run.errors) == 1
    assert run.errors[0].startswith(said)
    assert not run.has_our_traceback
