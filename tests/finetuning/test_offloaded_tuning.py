"""Training over offloaded layers takes the very same steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from offloading import HALF, N_LAYERS, loaded, write_deep
from support import DIM
from tuning_support import batch_of

from llama.adapters.lora import add_lora
from llama.commands.tune import main as train
from llama.errors import UsageError
from llama.finetuning.prompt_tuning import SoftPrompt
from llama.finetuning.step import Stepper
from llama.finetuning.trainer import checkpoint_blocks
from llama.flags import arguments_of

WORLD_SIZES = (1, 2, 3, 4)
ALL = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deep(tmp_path_factory.mktemp("model"))


def trained(
    folder: Path, n_offloaded: int, method: str, kind: str | None, checkpointing: bool = False
) -> dict[str, Any]:
    """Losses of three steps of two batches, gradients of the first and what was trained in the end."""
    model = loaded(folder, n_offloaded, kind)
    if checkpointing:
        checkpoint_blocks(model)
    tuning: Any = (
        SoftPrompt(model, torch.randn(5, DIM, generator=torch.Generator().manual_seed(2)) * 0.15)
        if method == "prompt"
        else add_lora(model, 4, 8.0, ALL if method == "lora" else ("wo",), dropout=0.1, seed=3)
    )
    stepper = Stepper(model, tuning, torch.optim.AdamW([t.parameter for t in tuning.trained], lr=0.01), 1.0)
    losses, gradients = [], {}
    for step in range(3):
        losses.append(stepper.run(step, [batch_of(3, seed=2 * step), batch_of(2, seed=2 * step + 1)]).loss)
        if step == 0:
            gradients = {t.name: t.parameter.grad.clone() for t in tuning.trained}
    losses.append(stepper.evaluate([batch_of(3, seed=9)]))
    return {"losses": losses, **gradients, **{f"{t.name} then": t.parameter.detach() for t in tuning.trained}}


@pytest.mark.parametrize(
    ("world_size", "method", "kind"),
    [*((size, method, None) for size in WORLD_SIZES for method in ("prompt", "lora")), (1, "lora of wo", None),
     (1, "lora", "int4"), (2, "prompt", "int4"), (3, "lora", "int8")],
)  # fmt: skip
def test_training_is_the_same(
    on_ranks: Callable[..., list], folder: Path, world_size: int, method: str, kind: str | None
) -> None:
    wanted = on_ranks(world_size, trained, folder, 0, method, kind)
    # Which layers a rank streams has nothing to do with the number of ranks.
    for n_offloaded in (1, HALF, N_LAYERS) if world_size == 1 else (HALF,):
        for ours, expected in zip(
            on_ranks(world_size, trained, folder, n_offloaded, method, kind), wanted, strict=True
        ):
            assert ours["losses"] == expected["losses"]
            for name in expected.keys() - {"losses"}:
                assert torch.equal(ours[name], expected[name]), name
    assert wanted[0]["losses"][0] != wanted[0]["losses"][1]
    assert any(wanted[0][name].norm() > 0 for name in wanted[0].keys() - {"losses"})


def test_beside_activation_checkpointing(folder: Path) -> None:
    expected = trained(folder, 0, "lora", None)
    for n_offloaded in (HALF, N_LAYERS):
        ours = trained(folder, n_offloaded, "lora", None, checkpointing=True)
        assert ours["losses"] == expected["losses"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"offload_layers": 5}, "--offload_layers 5: the model has 4 layers"),
        ({"offload_layers": -1}, "--offload_layers -1: the model has 4 layers"),
        ({"offload_layers": 2, "compile": True}, "--compile and --offload_layers are given together"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(tmp_path: Path, flags: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        train(output_dir=str(tmp_path / "saved"), **arguments_of(train, flags))
    assert not (tmp_path / "saved").exists()
