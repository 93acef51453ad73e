"""LoRA against PEFT, whole and cut across ranks, in float32; dropout, saving and taking it off again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from peft_lora import ALL, as_ours, gradients, halves, peft_model
from ranks import RankPools
from support import VOCAB, gather_logits, hf_model, write_meta
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llama.adapters.adapter import LoraAdapter
from llama.adapters.lora import Lora, add_lora, load_lora
from llama.checkpoint.load import load_model
from llama.checkpoint.source import open_checkpoint
from llama.errors import AdapterError, UsageError
from llama.model import Transformer
from llama.parallel import groups
from llama.parallel.collectives import all_reduce
from llama.parallel.groups import Ranks
from llama.parallel.partition import Partition
from llama.parallel.trained import sum_gradients

if TYPE_CHECKING:
    from peft import PeftModel

LOGITS = {"atol": 1e-4, "rtol": 0.0}  # of values that spread over several nats
# Of 2 KV heads: shared ones at 3 and 4 ranks.
CUTS = [(1, None), (2, None), (3, None), (4, None), (2, "3,1"), (3, "2,1,1"), (4, "5,1,1,1")]
TOKENS = torch.randint(0, VOCAB, (3, 20), generator=torch.Generator().manual_seed(7))
# Of the loss by the logits.
LOGITS_GRAD = torch.randn(3, 20, VOCAB, generator=torch.Generator().manual_seed(8)) / 60


def shard(folder: Path, tensor_split: str | None = None, dtype: torch.dtype = torch.float32) -> Transformer:
    """This rank's model."""
    ranks, source = groups.current(), open_checkpoint(folder)
    return load_model(source, Partition.create(source.args, ranks.world_size, tensor_split), ranks, dtype)


def base(tmp_path: Path, generation: str = "2") -> Path:
    return write_meta(tmp_path / "base", hf_model(generation))


def logits_of(model: Transformer) -> Tensor:
    with torch.no_grad():
        return gather_logits(model, model(TOKENS))


def close(found: Tensor, expected: Tensor, rel: float) -> None:
    """Within `rel` of the largest value."""
    torch.testing.assert_close(found, expected, atol=rel * expected.abs().max().item(), rtol=0)


# -- the same as PEFT at every world size ----------------------------------------------------------


def trained_once(
    folder: Path, tensor_split: str | None, adapter: LoraAdapter, training: bool = False
) -> tuple[Tensor, dict[str, Tensor], float]:
    """On every rank: the whole logits, the whole gradients by name, the norm of all of them."""
    model = shard(folder, tensor_split).train(training)
    lora = load_lora(model, adapter, seed=3)
    lora.begin_step(11)
    logits = model(TOKENS)
    own = model.partition.vocab[model.ranks.rank]
    (logits * LOGITS_GRAD[..., own.start : own.stop]).sum().backward()
    for trained in lora.trained:
        sum_gradients([trained], trained.ranks, Ranks())
    norm = all_reduce(sum(trained.square_sum() for trained in lora.trained), model.ranks).sqrt().item()
    whole = {trained.name: trained.whole(trained.parameter.grad) for trained in lora.trained}
    return gather_logits(model, logits.detach()), whole, norm


def trained_by_peft(model: PeftModel) -> tuple[Tensor, dict[str, Tensor], float]:
    logits = model(TOKENS).logits
    (logits * LOGITS_GRAD).sum().backward()
    found = gradients(model)
    norm = sum(gradient.double().square().sum() for gradient in found.values())
    return logits.detach(), found, norm.sqrt().item()


def assert_same(found: tuple, expected: tuple) -> None:
    torch.testing.assert_close(found[0], expected[0], **LOGITS)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        close(gradient, expected[1][name], rel=1e-4)
    assert found[2] == pytest.approx(expected[2], rel=1e-5)


@pytest.mark.parametrize(("world_size", "tensor_split"), CUTS)
def test_logits_and_gradients_are_those_of_peft(
    pools: RankPools, tmp_path: Path, world_size: int, tensor_split: str | None
) -> None:
    reference = peft_model()
    expected = trained_by_peft(reference)
    assert len(expected[1]) == 2 * 2 * 7
    with reference.disable_adapter():
        assert (reference(TOKENS).logits - expected[0]).abs().mean() > 0.1  # an adapter that does something
    for found in pools.run(world_size, trained_once, base(tmp_path), tensor_split, as_ours(reference)):
        assert_same(found, expected)


@pytest.mark.parametrize(("generation", "options"), [("3.1", {}), ("3.2", {"use_rslora": True, "r": 3})])
def test_other_geometries_and_scalings_are_those_of_peft(
    pools: RankPools, tmp_path: Path, generation: str, options: dict
) -> None:
    reference = peft_model(generation, **options)
    expected = trained_by_peft(reference)
    for found in pools.run(3, trained_once, base(tmp_path, generation), None, as_ours(reference)):
        assert_same(found, expected)


def test_linears_that_the_adapter_does_not_name_stay_as_they_are(tmp_path: Path) -> None:
    reference, kept = peft_model(), ("layers.0.attention.wk", "layers.1.feed_forward.w2")
    adapter = as_ours(reference)
    few = dataclasses.replace(adapter, weights={name: adapter.weights[name] for name in reversed(kept)})
    for name, half in halves(reference):
        if not name.startswith(kept) and name.endswith("lora_B"):
            half.data.zero_()
    model = shard(base(tmp_path))
    lora = load_lora(model, few)
    torch.testing.assert_close(logits_of(model), reference(TOKENS).logits.detach(), **LOGITS)
    assert [trained.name for trained in lora.trained] == [f"{name}.lora_{half}" for name in kept for half in "AB"]


# -- dropout ---------------------------------------------------------------------------------------


class FixedDropout(nn.Module):
    """In PEFT's place for dropout: leaves out what ours leaves out, and scales as torch's does."""

    def __init__(self, ours: Callable[[Tensor], Tensor], p: float) -> None:
        super().__init__()
        self.ours, self.p = ours, p

    def forward(self, x: Tensor) -> Tensor:
        return x * self.ours(torch.ones_like(x)) / (1 - self.p)


@pytest.mark.parametrize(("world_size", "tensor_split"), CUTS)
def test_dropout_is_the_same_at_every_world_size(
    pools: RankPools, tmp_path: Path, world_size: int, tensor_split: str | None
) -> None:
    """With the masks of one process put into PEFT: so they stand where PEFT's do, and every rank draws them alike."""
    reference, folder = peft_model(lora_dropout=0.3), base(tmp_path)
    adapter = as_ours(reference)
    whole = shard(folder)
    load_lora(whole, adapter, seed=3).begin_step(11)
    for name, half in halves(reference):
        if name.endswith("lora_A"):
            path = next(path for path, parameter in reference.named_parameters() if parameter is half)
            module = reference.get_submodule(path.split(".lora_A")[0])
            ours = whole.get_submodule(name.removesuffix(".lora_A"))
            module.lora_dropout["default"] = FixedDropout(ours._dropout, 0.3)
    expected = trained_by_peft(reference)
    assert (expected[0] - peft_model()(TOKENS).logits).abs().mean() > 0.05
    for found in pools.run(world_size, trained_once, folder, tensor_split, adapter, True):
        assert_same(found, expected)


def masks(lora: Lora, model: Transformer, step: int, n_rows: int = 6) -> dict[str, Tensor]:
    """Return the mask that every linear keeps of [n_rows, in_features]."""
    lora.begin_step(step)
    found = {}
    for name in lora.adapter().weights:
        module = model.get_submodule(name)
        found[name] = module._dropout(torch.ones(n_rows, module.base.in_features)).bool()
    return found


def test_dropout_depends_on_seed_step_linear_and_the_number_of_rows(tmp_path: Path) -> None:
    folder, adapter = base(tmp_path), as_ours(peft_model(lora_dropout=0.5))
    model, other = shard(folder), shard(folder)
    lora, reseeded = load_lora(model, adapter, seed=1), load_lora(other, adapter, seed=2)
    first, again = masks(lora, model, 4), masks(lora, model, 4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    flat = [mask.flatten()[:384] for mask in first.values()]
    flat += [mask.flatten()[:384] for mask in masks(lora, model, 5).values()]
    flat += [mask.flatten()[:384] for mask in masks(reseeded, other, 4).values()]
    flat += [mask.flatten()[:384] for mask in masks(lora, model, 4, n_rows=7).values()]
    distinct = torch.stack(flat).double()
    agreement = torch.corrcoef(distinct) - torch.eye(len(flat))
    assert agreement.abs().max() < 0.3  # of 384 coins: six standard deviations


def test_dropout_is_for_training_and_right_on_average(tmp_path: Path) -> None:
    model = shard(base(tmp_path))
    lora = load_lora(model, as_ours(peft_model(lora_dropout=0.25)))
    module = model.layers[0].attention.wq
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(1)).expand(2000, -1)
    with torch.no_grad():
        expected = module(x)[0] - module.base(x)[0]
        model.train()
        lora.begin_step(1)
        updates = module(x) - module.base(x)
    assert updates.std(0).mean() > 0.2 * expected.abs().mean()
    spread = updates.std(0) / 2000**0.5
    assert ((updates.mean(0) - expected).abs() < 5 * spread).all()


def test_a_recomputed_forward_drops_the_same(tmp_path: Path) -> None:
    found = []
    for recomputed in (False, True):
        model = shard(base(tmp_path)).train()
        lora = load_lora(model, as_ours(peft_model(lora_dropout=0.5)))
        lora.begin_step(2)
        mlp = model.layers[0].feed_forward
        x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
        y = checkpoint(mlp, x, use_reentrant=False, preserve_rng_state=False) if recomputed else mlp(x)
        y.square().sum().backward()
        found.append([trained.parameter.grad for trained in lora.trained if "feed_forward" in trained.name][:6])
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))
    assert all(gradient.any() for gradient in found[0])


# -- a new one -------------------------------------------------------------------------------------


def made(folder: Path, targets: tuple[str, ...]) -> tuple[Tensor, Tensor, LoraAdapter]:
    """On every rank: logits before and after, and what was made."""
    model = shard(folder)
    before = logits_of(model)
    lora = add_lora(model, r=4, alpha=7.0, targets=targets, dropout=0.1, use_rslora=True, seed=9)
    return before, logits_of(model), lora.adapter("a base")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_new_lora_is_the_same_at_every_world_size_and_changes_nothing(
    pools: RankPools, tmp_path: Path, world_size: int
) -> None:
    folder = base(tmp_path)
    _, _, expected = made(folder, ("w2", "wv"))
    for before, after, found in pools.run(world_size, made, folder, ("w2", "wv")):
        assert torch.equal(before, after)
        assert dataclasses.replace(found, weights={}) == LoraAdapter(4, 7.0, ("wv", "w2"), {}, 0.1, True, "a base")
        assert list(found.weights) == [
            "layers.0.attention.wv", "layers.0.feed_forward.w2", "layers.1.attention.wv", "layers.1.feed_forward.w2",
        ]  # fmt: skip
        for name, (a, b) in found.weights.items():
            assert torch.equal(a, expected.weights[name][0])
            assert not b.any()


def test_a_is_drawn_as_peft_draws_it(tmp_path: Path) -> None:
    """Uniform up to 1 / sqrt(in_features), each linear and each seed its own."""
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(hf_model("2"), LoraConfig(r=32, target_modules=["q_proj", "down_proj"]))
    theirs = {name: half for name, half in halves(peft) if name.endswith("lora_A")}
    lora = add_lora(shard(base(tmp_path)), r=32, targets=("wq", "w2"), seed=1)
    ours = {trained.name: trained.parameter.detach() for trained in lora.trained if trained.name.endswith("lora_A")}
    assert ours.keys() == theirs.keys()
    for name, a in ours.items():
        assert a.abs().max() == pytest.approx(theirs[name].abs().max().item(), rel=0.01)
        assert a.std() == pytest.approx(theirs[name].std().item(), rel=0.05)
        assert abs(a.mean()) < 0.05 * a.abs().max()
    other = add_lora(shard(base(tmp_path)), r=32, targets=("wq", "w2"), seed=2).adapter().weights
    drawn = [a for a, _ in lora.adapter().weights.values()] + [a for a, _ in other.values()]
    narrow = torch.stack([a[:, :64].flatten() for a in drawn])
    assert (torch.corrcoef(narrow) - torch.eye(len(drawn))).abs().max() < 0.15


def test_only_the_adapter_is_trained(tmp_path: Path) -> None:
    model = shard(base(tmp_path)).requires_grad_()
    lora = add_lora(model, targets=ALL)
    trained = {id(one.parameter) for one in lora.trained}
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == trained
    assert len(trained) == 2 * 2 * 7
    assert all(one.parameter.dtype == torch.float32 for one in lora.trained)


def test_a_bf16_model_computes_in_bf16_with_float32_matrices(tmp_path: Path) -> None:
    reference = peft_model()
    model = shard(base(tmp_path), dtype=torch.bfloat16)
    lora = load_lora(model, as_ours(reference))
    hidden = model.layers[0].attention.wq(torch.ones(1, 1, 64, dtype=torch.bfloat16))
    assert hidden.dtype == torch.bfloat16
    model(TOKENS).square().mean().backward()
    assert {one.parameter.grad.dtype for one in lora.trained} == {torch.float32}
    assert (logits_of(model) - reference(TOKENS).logits).abs().mean() < 0.1


# -- saved, taken off ----------------------------------------------------------------------


def round_trip(folder: Path, tensor_split: str | None, adapter: LoraAdapter) -> tuple[LoraAdapter, list[Tensor]]:
    """On every rank: what is gathered, and the logits without the adapter, with it, and once it is detached."""
    model = shard(folder, tensor_split)
    plain = logits_of(model)
    state = {name: parameter.clone() for name, parameter in model.named_parameters()}
    lora = load_lora(model, adapter)
    gathered, tuned = lora.adapter(), logits_of(model)
    lora.detach()
    detached = logits_of(model)
    after = dict(model.named_parameters())
    assert after.keys() == state.keys()
    assert all(torch.equal(state[name], after[name]) for name in state)
    return gathered, [plain, detached, tuned]


@pytest.mark.parametrize(("world_size", "tensor_split"), CUTS)
def test_what_is_gathered_was_loaded_and_a_model_is_given_its_linears_back(
    pools: RankPools, tmp_path: Path, world_size: int, tensor_split: str | None
) -> None:
    adapter = dataclasses.replace(as_ours(peft_model()), base_model="where it came from")
    for gathered, (plain, detached, tuned) in pools.run(world_size, round_trip, base(tmp_path), tensor_split, adapter):
        assert dataclasses.replace(gathered, weights={}) == dataclasses.replace(adapter, weights={})
        assert list(gathered.weights) == list(open_names(adapter))
        for name, pair in adapter.weights.items():
            assert all(torch.equal(*both) for both in zip(gathered.weights[name], pair, strict=True))
        assert torch.equal(plain, detached)
        assert (plain - tuned).abs().mean() > 0.1


def open_names(adapter: LoraAdapter) -> list[str]:
    """Layer by layer, each in the layer's order, which is that of the targets."""
    return sorted(adapter.weights, key=lambda name: (name.split(".")[1], ALL.index(name.split(".")[-1])))


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "rank of a LoRA must be 1 or more, is 0"),
        ({"alpha": float("nan")}, "alpha of a LoRA must be a positive number, is nan"),
        ({"alpha": -1.0}, "alpha .* is -1"),
        ({"dropout": 1.0}, "dropout of a LoRA must be 0 or more and below 1, is 1"),
        ({"targets": ()}, "needs linears to update"),
    ],
)
def test_values_out_of_range_are_named(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        add_lora(shard(base(tmp_path)), **options)


def test_an_adapter_of_another_model_is_refused_and_the_model_left_alone(tmp_path: Path) -> None:
    adapter, model = as_ours(peft_model("1")), shard(base(tmp_path))  # 8 KV heads against 2
    with pytest.raises(
        AdapterError, match=r"attention\.wk are \[4, 64\] and \[64, 4\].* takes \[4, 64\] and \[16, 4\]"
    ):
        load_lora(model, adapter)
    a, b = as_ours(peft_model()).weights["layers.1.attention.wq"]
    deeper = dataclasses.replace(adapter, weights={"layers.2.attention.wq": (a, b)})
    with pytest.raises(AdapterError, match=r"layers\.2\.attention\.wq, which this model of 2 layers does not have"):
        load_lora(model, deeper)
    assert not any("lora" in type(module).__name__.lower() for module in model.modules())


def test_a_second_lora_waits_for_the_first_to_go(tmp_path: Path) -> None:
    model = shard(base(tmp_path))
    lora = add_lora(model)
    with pytest.raises(AdapterError, match="has a LoRA already"):
        add_lora(model, targets=("w1",))
    lora.detach()
    add_lora(model, targets=("w1",))
