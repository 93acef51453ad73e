"""A step is the same at every world size, and PEFT's: losses, gradients, and what may not be trained on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import DIM, hf_model
from tuning_support import batch_of, peft_loss, peft_prompt, peft_twin, sharded, write_model

from llama.adapters.lora import add_lora
from llama.data.batches import Order
from llama.data.examples import Example
from llama.errors import TrainingError
from llama.finetuning.prompt_tuning import SoftPrompt
from llama.finetuning.step import GROWTH_STEPS, LossScale, Stepper, check_same_batch

N_STEPS, LR, N_VIRTUAL = 50, 0.003, 6
LAYOUTS = [(1, None), (2, None), (3, None), (4, None), (4, 2)]


def start() -> torch.Tensor:
    return torch.randn(N_VIRTUAL, DIM, generator=torch.Generator().manual_seed(5)) * 0.15


def batches(step: int, examples: list[Example]) -> list[list[Example]]:
    order = Order(len(examples), 4, seed=1, accumulation=2)
    return [[examples[i] for i in batch] for batch in order.step_batches(step)]


def train(
    folder: Path, method: str, n_steps: int = N_STEPS, dtype: torch.dtype = torch.float32, dropout: float = 0.0
) -> dict[str, Any]:
    """Losses and norms of each step, the whole gradients of the first."""
    model = sharded(folder, dtype)
    tuning: Any = (
        SoftPrompt(model, start())
        if method == "prompt"
        else add_lora(model, 4, 8.0, ("wq", "wk", "wv", "wo", "w1", "w2", "w3"), dropout=dropout, seed=3)
    )
    optimizer = torch.optim.AdamW([tensor.parameter for tensor in tuning.trained], lr=LR, weight_decay=0.0)
    stepper = Stepper(model, tuning, optimizer, max_grad_norm=1e6)
    examples, results, gradients = batch_of(40), [], {}
    for step in range(n_steps):
        results.append(stepper.run(step, batches(step, examples)))
        if step == 0:
            gradients = {t.name: t.whole(t.parameter.grad) for t in tuning.trained}
    return {"loss": [r.loss for r in results], "norm": [r.grad_norm for r in results], "gradients": gradients}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def peft_run(n_steps: int) -> dict[str, Any]:
    model = peft_twin("2", start())
    prompt = peft_prompt(model)
    optimizer = torch.optim.AdamW([prompt], lr=LR, weight_decay=0.0)
    examples, losses, gradient = batch_of(40), [], None
    for step in range(n_steps):
        parts = batches(step, examples)
        counts = [sum(one.n_learnt for one in part) for part in parts]
        loss = sum(peft_loss(model, part) * count for part, count in zip(parts, counts, strict=True)) / sum(counts)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            gradient = prompt.grad.clone()
        optimizer.step()
    return {"loss": losses, "gradient": gradient}


@pytest.fixture(scope="module")
def peft() -> dict[str, Any]:
    return peft_run(N_STEPS)


def close(a: torch.Tensor, b: torch.Tensor, relative: float) -> bool:
    return float((a - b).norm() / b.norm()) < relative


@pytest.mark.parametrize(("world_size", "model_ranks"), LAYOUTS)
def test_prompt_tuning_is_pefts_at_every_world_size(
    on_ranks: Any, folder: Path, peft: dict[str, Any], world_size: int, model_ranks: int | None
) -> None:
    for ours in on_ranks(world_size, train, folder, "prompt", model_ranks=model_ranks):
        assert max(abs(a - b) for a, b in zip(ours["loss"], peft["loss"], strict=True)) < 1e-4
        assert close(ours["gradients"]["prompt_embeddings"], peft["gradient"], 1e-5)
    # And it learns, epoch by epoch of five steps: a gradient of zero would agree as well.
    assert sum(peft["loss"][-5:]) < sum(peft["loss"][:5]) - 0.05


@pytest.fixture(scope="module")
def lora_alone(folder: Path) -> dict[float, dict[str, Any]]:
    return {dropout: train(folder, "lora", 12, dropout=dropout) for dropout in (0.0, 0.3)}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("world_size", "model_ranks"), LAYOUTS[1:])
def test_lora_is_the_same_at_every_world_size(
    on_ranks: Any, folder: Path, lora_alone: Any, world_size: int, model_ranks: int | None, dropout: float
) -> None:
    alone = lora_alone[dropout]
    for ours in on_ranks(world_size, train, folder, "lora", 12, torch.float32, dropout, model_ranks=model_ranks):
        assert max(abs(a - b) for a, b in zip(ours["loss"], alone["loss"], strict=True)) < 1e-4
        for a, b in zip(ours["norm"], alone["norm"], strict=True):
            assert abs(a - b) < 1e-4 * b
        for name, gradient in alone["gradients"].items():
            if gradient.norm():  # A's is zero while B is
                assert close(ours["gradients"][name], gradient, 1e-5), name
    assert abs(lora_alone[0.0]["loss"][0] - lora_alone[0.3]["loss"][0]) < 1e-6  # B is zero
    assert abs(lora_alone[0.0]["loss"][5] - lora_alone[0.3]["loss"][5]) > 1e-5


def test_bfloat16_learns_with_float32_weights(folder: Path) -> None:
    losses = train(folder, "prompt", 30, torch.bfloat16)["loss"]
    assert sum(losses[-5:]) < sum(losses[:5])  # an epoch has five steps, whose batches differ


def test_float16_scales_its_loss_and_reports_it_unscaled(folder: Path) -> None:
    half, whole = train(folder, "prompt", 5, torch.float16), train(folder, "prompt", 5)
    assert half["loss"] == pytest.approx(whole["loss"], rel=5e-3)
    assert half["norm"] == pytest.approx(whole["norm"], rel=5e-2)


def test_the_step_that_lets_the_loss_scale_grow_is_as_long_as_others(folder: Path) -> None:
    moved = []
    for n_good in (0, GROWTH_STEPS - 1):
        tuning = SoftPrompt(model := sharded(folder, torch.float16), start())
        stepper = Stepper(model, tuning, torch.optim.SGD([tuning.parameter], lr=1.0), 1e6)
        stepper.scale.n_good = n_good
        stepper.run(0, [batch_of(4)])
        moved.append(tuning.parameter.detach() - start())
    assert torch.equal(*moved)
    assert moved[0].norm() > 0


def test_the_loss_scale_backs_off_and_grows() -> None:
    scale = LossScale.create(torch.float16)
    scale.update(overflowed=True)
    assert scale.value == 2.0**15
    for _ in range(2000):
        scale.update(overflowed=False)
    assert (scale.value, scale.n_good) == (2.0**16, 0)
    fixed = LossScale.create(torch.bfloat16)
    fixed.update(overflowed=True)
    assert fixed.value == 1.0


def test_a_loss_that_is_no_number_updates_nothing(folder: Path) -> None:
    model = sharded(folder)
    tuning = SoftPrompt(model, start())
    stepper = Stepper(model, tuning, torch.optim.SGD([tuning.parameter], lr=1.0), 1.0)
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(TrainingError, match="the loss is no finite number at step 8"):
        stepper.run(7, [batch_of(2)])
    assert torch.equal(tuning.parameter.detach(), start())


def test_gradients_are_clipped_as_torch_does(folder: Path) -> None:
    model = sharded(folder)
    tuning = SoftPrompt(model, start())
    Stepper(model, tuning, torch.optim.SGD([tuning.parameter], lr=0.0), 0.01).run(0, [batch_of(4)])
    assert tuning.parameter.grad.norm().item() == pytest.approx(0.01, rel=1e-4)


def test_frozen_weights_get_no_gradient(folder: Path) -> None:
    model = sharded(folder)
    tuning = SoftPrompt(model, start())
    Stepper(model, tuning, torch.optim.SGD([tuning.parameter], lr=0.1), 1.0).run(0, [batch_of(4)])
    assert all(parameter.grad is None for parameter in model.parameters())


def see_other_examples(_: Path) -> str:
    from llama.parallel import groups

    examples = batch_of(4, seed=groups.current().rank)
    try:
        check_same_batch([examples], 3)
    except TrainingError as error:
        return str(error)
    return ""


def test_ranks_that_see_other_examples_are_told(on_ranks: Any, folder: Path) -> None:
    answers = on_ranks(2, see_other_examples, folder)
    assert all("rank 1 has other examples than rank 0 at step 4" in answer for answer in answers)


def test_evaluation_is_the_mean_over_all_tokens(folder: Path) -> None:
    model = sharded(folder)
    tuning, examples = SoftPrompt(model, start()), batch_of(9)
    stepper = Stepper(model, tuning, torch.optim.SGD([tuning.parameter], lr=0.0), 1.0)
    ours = stepper.evaluate([examples[:4], examples[4:]])
    with torch.no_grad():
        assert ours == pytest.approx(peft_loss(peft_twin("2", start()), examples).item(), abs=1e-5)
    assert hf_model("2").config.num_key_value_heads == 2  # fewer than three and four ranks


# -- a vocabulary that is computed in pieces ---------------------------------------------------------


def piecewise(folder: Path, tensor_split: str | None) -> tuple[float, torch.Tensor]:
    """Loss and gradient of one batch whose logits are computed some 3 places at a time on the widest rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama.parallel.vocab.MAX_LOSS_LOGITS", 1000)
        model = sharded(folder, tensor_split=tensor_split)
        tuning = SoftPrompt(model, start())
        optimizer = torch.optim.AdamW([tuning.parameter], lr=LR, weight_decay=0.0)
        result = Stepper(model, tuning, optimizer, max_grad_norm=1e6).run(0, [batch_of(8)])
        gradient = tuning.parameter.grad
        assert gradient is not None
        return result.loss, gradient


@pytest.mark.parametrize(("world_size", "tensor_split"), [(1, None), (2, "3,1"), (3, None), (3, "5,2,1"), (4, None)])
def test_ranks_of_unequal_width_cut_the_loss_alike(
    folder: Path, on_ranks: Any, world_size: int, tensor_split: str | None
) -> None:
    """Each piece is a collective: a rank that cut by its own width would meet the others' next piece in it."""
    model = peft_twin("2", start())
    loss = peft_loss(model, batch_of(8))
    loss.backward()
    for ours, gradient in on_ranks(world_size, piecewise, folder, tensor_split):
        assert ours == pytest.approx(loss.item(), abs=1e-5)
        torch.testing.assert_close(gradient, peft_prompt(model).grad, atol=1e-6, rtol=1e-4)
