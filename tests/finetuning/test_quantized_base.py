"""Tuning over integers: as over the numbers that they stand for, and the same at every world size."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_support import INT4, INT8, rounded, shard, wide_model, write_state
from support import meta_state, write_meta
from torch import Tensor
from tuning_support import batch_of

from llama.adapters.lora import add_lora
from llama.finetuning.prompt_tuning import SoftPrompt
from llama.finetuning.step import Stepper
from llama.finetuning.trainer import checkpoint_blocks, compile_blocks
from llama.quantization.scheme import Scheme

N_STEPS = 4
SCHEMES = {"int8": INT8, "int4": INT4}
TARGETS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_meta(tmp_path_factory.mktemp("base") / "m", wide_model())


@pytest.fixture(scope="module")
def references(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each scheme a checkpoint of the numbers that its integers stand for."""
    place, state = tmp_path_factory.mktemp("references"), meta_state(wide_model())
    return {name: write_state(place / name, wide_model(), rounded(state, one)) for name, one in SCHEMES.items()}


def train(
    folder: Path, scheme: Scheme | None, method: str, tensor_split: str | None = None, how: str = "plain"
) -> dict[str, Any]:
    """Losses of a few steps, and what was trained in the end, whole."""
    model = shard(folder, scheme, tensor_split)
    start = torch.randn(5, model.args.dim, generator=torch.Generator().manual_seed(5)) * 0.15
    tuning: Any = (
        SoftPrompt(model, start)
        if method == "prompt"
        else add_lora(model, 4, 8.0, TARGETS, dropout=0.1, use_rslora=False, seed=3)
    )
    if how == "checkpointed":
        checkpoint_blocks(model)
    if how == "compiled":
        compile_blocks(model)
    optimizer = torch.optim.AdamW([one.parameter for one in tuning.trained], lr=0.003, weight_decay=0.0)
    stepper, examples = Stepper(model, tuning, optimizer, max_grad_norm=1e6), batch_of(4 * N_STEPS)
    losses = [stepper.run(step, [examples[4 * step : 4 * step + 4]]).loss for step in range(N_STEPS)]
    return {"loss": losses, "trained": {one.name: one.whole(one.parameter.detach()) for one in tuning.trained}}


@pytest.fixture(scope="module")
def alone(folder: Path, references: dict[str, Path]) -> Callable[..., dict[str, Any]]:
    """`alone(method, name)`: what one process makes of the scheme's numbers, or with None of the original's."""

    @functools.cache
    def trained(method: str, name: str | None) -> dict[str, Any]:
        return train(folder if name is None else references[name], None, method)

    return trained


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert max(abs(a - b) for a, b in zip(found["loss"], expected["loss"], strict=True)) < 1e-4
    for name, tensor in expected["trained"].items():
        assert relative(found["trained"][name], tensor) < 1e-3, name


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("world_size", "tensor_split"), [(1, None), (2, None), (3, None), (4, None), (2, "3,1")])
@pytest.mark.parametrize("method", ["prompt", "lora"])
@pytest.mark.parametrize("name", SCHEMES)
def test_it_is_tuning_over_the_numbers(
    on_ranks: Callable[..., list], folder: Path, alone: Callable[..., dict[str, Any]], name: str, method: str,
    world_size: int, tensor_split: str | None,
) -> None:  # fmt: skip
    expected, original = alone(method, name), alone(method, None)
    for found in on_ranks(world_size, train, folder, SCHEMES[name], method, tensor_split):
        assert_close(found, expected)
    assert max(abs(a - b) for a, b in zip(original["loss"], expected["loss"], strict=True)) > 1e-3
    assert expected["loss"][0] != expected["loss"][-1]


@pytest.mark.parametrize("method", ["prompt", "lora"])
@pytest.mark.parametrize("how", ["checkpointed", pytest.param("compiled", marks=pytest.mark.slow)])
def test_however_it_is_run(folder: Path, how: str, method: str) -> None:
    assert_close(train(folder, INT4, method, how=how), train(folder, INT4, method))
