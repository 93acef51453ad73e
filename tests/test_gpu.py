"""What needs a card: `pytest -m gpu`. The same model on the card, alone and shared between ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import GENERATIONS, hf_model, sentencepiece_model, write_meta

from llama import Llama
from llama.device import choose_device, choose_dtype, has_native_bf16

pytestmark = pytest.mark.gpu

PROMPTS = [[1, 5, 9], [1], [1, *range(40, 110)]]
# float32 on a card, TF32 off: products are summed in another order than on a CPU.
NATS = 1e-3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    sentencepiece_model(folder)
    return write_meta(folder, hf_model("2"))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_card_gives_the_cpus_logprobs(tmp_path: Path, generation: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    sentencepiece_model(tmp_path)
    folder = write_meta(tmp_path, hf_model(generation))
    results = [
        Llama.build(folder, dtype="fp32", device=device).generate(PROMPTS, 0, echo=True, logprobs=True)[1]
        for device in ("cpu", "cuda")
    ]
    assert all(results)
    for scores, expected in zip(results[1] or [], results[0] or [], strict=True):
        assert scores == pytest.approx(expected, abs=NATS)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sixteen_bit_runs_and_stays_near(checkpoint: Path, dtype: str) -> None:
    full, half = (
        Llama.build(checkpoint, dtype=d, device="cuda").generate(PROMPTS, 0, echo=True, logprobs=True)[1]
        for d in ("fp32", dtype)
    )
    for scores, expected in zip(half or [], full or [], strict=True):
        assert scores == pytest.approx(expected, abs=0.3)


def test_the_card_and_its_native_dtype_are_chosen_by_themselves() -> None:
    device = choose_device()
    assert device.type == "cuda"
    expected = torch.bfloat16 if has_native_bf16(device) else torch.float16
    assert choose_dtype("auto", device, torch.float16, 7_000_000_000) == expected


def run_example(root: Path, checkpoint: Path, n_ranks: int, output: Path) -> list[dict]:
    """The command under torchrun: NCCL where each rank has a card, gloo where they share one."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n_ranks)]
    flags = {
        "ckpt_dir": checkpoint, "device": "cuda", "dtype": "fp32", "temperature": 0, "max_gen_len": 16,
        "prompts": '["the quick", "number"]', "output_json": output,
    }  # fmt: skip
    command = [*torchrun, "example.py", *(f"--{name}={value}" for name, value in flags.items())]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, env=os.environ | {"CI": "1"})
    assert run.returncode == 0, run.stderr
    return json.loads(output.read_text())


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_ranks_give_what_one_gives(root: Path, checkpoint: Path, tmp_path: Path, n_ranks: int) -> None:
    alone = run_example(root, checkpoint, 1, tmp_path / "1.json")
    together = run_example(root, checkpoint, n_ranks, tmp_path / "n.json")
    for one, other in zip(alone, together, strict=True):
        assert other["token_ids"] == one["token_ids"]
        assert other["logprobs"] == pytest.approx(one["logprobs"], abs=NATS)
