"""Generation over integers, with adapters and without: the tokens of the dequantized model at every world size."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_support import INT4, INT8, rounded, wide_model, write_state
from ranks import RankPools
from support import meta_state, sentencepiece_model, write_meta

from llama import Llama
from llama.adapters.adapter import Adapter, LoraAdapter, PromptAdapter
from llama.checkpoint.quantize import quantize_checkpoint
from llama.checkpoint.source import open_checkpoint
from llama.errors import QuantizationError
from llama.quantization.scheme import Asked, Scheme

pytestmark = pytest.mark.usefixtures("two_threads")

PROMPTS = [[1, 5, 9], [1], [1, *range(40, 110)], [1, 30]]
SCHEMES = {"int8": INT8, "int4": INT4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_meta(tmp_path_factory.mktemp("base") / "m", wide_model())
    sentencepiece_model(folder.parent)
    return folder


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str, Path]:
    """Of each scheme a checkpoint of the numbers that its integers stand for."""
    state = meta_state(wide_model())
    return {name: write_state(folder.parent / name, wide_model(), rounded(state, one)) for name, one in SCHEMES.items()}


@pytest.fixture(scope="module")
def alone(references: dict[str, Path]) -> Callable[[str, str], list[Any]]:
    """What one process makes of a scheme's numbers with an adapter, once."""
    return functools.cache(lambda name, adapter: greedy(references[name], None, adapter))


def adapters() -> dict[str, Adapter | None]:
    generator = torch.Generator().manual_seed(2)
    halves = torch.randn(4, 256, generator=generator) * 0.1, torch.randn(256, 4, generator=generator) * 0.1
    return {
        "none": None,
        "prompt": PromptAdapter(torch.randn(5, 256, generator=generator) * 0.3),
        "lora": LoraAdapter(4, 8.0, ("wq", "wo"), {f"layers.1.attention.{name}": halves for name in ("wq", "wo")}),
    }


def greedy(folder: Path, quantize: Any, adapter: str = "none", tensor_split: str | None = None) -> list[Any]:
    llama = Llama.build(
        folder, dtype="fp32", quantize=quantize, adapter=adapters()[adapter], plan=False, tensor_split=tensor_split,
        max_batch_size=3,
    )  # fmt: skip
    found = llama.collect(PROMPTS, max_gen_len=8, temperature=0.0, stop=[])
    return [(answer.tokens, answer.logprobs) for answer in found]


@pytest.mark.parametrize(("world_size", "tensor_split"), [(1, None), (2, None), (3, None), (4, None), (2, "3,1")])
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("adapter", adapters())
def test_tokens_are_those_of_the_reference(
    pools: RankPools, folder: Path, alone: Callable[[str, str], list[Any]], name: str, adapter: str, world_size: int,
    tensor_split: str | None,
) -> None:  # fmt: skip
    expected = alone(name, adapter)
    for found in pools.run(world_size, greedy, folder, name, adapter, tensor_split):
        for (tokens, scores), (wanted, their_scores) in zip(found, expected, strict=True):
            assert tokens == wanted
            assert scores == pytest.approx(their_scores, abs=1e-4)


def test_it_says_what_it_loaded(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asked = Asked("int4", 64, "none", "int8")
    Llama.build(folder, dtype="fp32", quantize=asked, plan=False)
    assert "float32, int4 in groups of 64, output kept, embedding int8, " in capfd.readouterr().err


def test_a_quantized_checkpoint_runs_as_it_is(folder: Path) -> None:
    stored = quantize_checkpoint(open_checkpoint(folder), folder.parent / "q", INT4)
    expected = greedy(folder, INT4)
    for asked in (None, "int4", Asked("int4", 32, "int8"), Scheme.create("int4")):
        assert greedy(stored, asked) == expected
    for asked in ("int8", Asked(group_size=64)):
        with pytest.raises(QuantizationError, match="is quantized already"):
            greedy(stored, asked)
