"""Packed batches: shared beginnings are computed once; losses and gradients are those of the plain computation."""

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DIM, VOCAB, hf_model, meta_state
from torch import Tensor
from tuning_support import OPENING, TEMPLATES, batch_of

from llama.config import ModelArgs
from llama.data.examples import Example
from llama.finetuning.packing import Packed, pack
from llama.finetuning.prompt_tuning import SoftPrompt
from llama.finetuning.step import Stepper, n_targets
from llama.kernels.products import round_up
from llama.model import Transformer

CPU = torch.device("cpu")


def model_in(dtype: torch.dtype, generation: str = "2") -> Transformer:
    oracle = hf_model(generation)
    config = oracle.config
    args = ModelArgs(
        dim=DIM, n_layers=config.num_hidden_layers, n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads, vocab_size=VOCAB, multiple_of=config.intermediate_size,
        norm_eps=config.rms_norm_eps, rope_theta=config.rope_parameters["rope_theta"],
    )  # fmt: skip
    model = Transformer(args, dtype=dtype)
    with torch.no_grad():
        for name, value in meta_state(oracle).items():
            model.get_parameter(name).copy_(value)
    return model.requires_grad_(False)


def plain(model: Transformer, prompt: Tensor, examples: list[Example]) -> Tensor:
    """Mean loss, one example at a time and nothing shared."""
    total = prompt.new_zeros(())
    for one in examples:
        ids = torch.tensor([one.tokens])
        x = torch.cat((prompt.unsqueeze(0), model.tok_embeddings(ids)), dim=1)
        logits = model.output(model.hidden(embeddings=x))[0]
        first = prompt.shape[0] + one.n_context
        total = total + F.cross_entropy(logits[first - 1 : -1], ids[0, one.n_context :], reduction="sum")
    return total / n_targets(examples)


def n_computed(packed: Packed) -> int:
    """Tokens that pass through the model, virtual ones and padding included."""
    return packed.positions.shape[1]


def in_double(examples: list[Example], n_virtual: int, share: bool = True) -> tuple[Any, ...]:
    """Loss and gradient, ours and the plain ones, all in float64."""
    model = model_in(torch.float64)
    torch.manual_seed(1)
    start = torch.randn(n_virtual, DIM, dtype=torch.float64) * 0.1
    tuning = SoftPrompt(model, start)
    tuning.parameter = torch.nn.Parameter(start.clone())
    stepper = Stepper(model, tuning, torch.optim.SGD([tuning.parameter]), 1.0, share)
    loss = stepper.loss(examples, 1 / n_targets(examples))
    loss.backward()
    theirs = start.clone().requires_grad_()
    wanted = plain(model, theirs, examples)
    wanted.backward()
    return loss.item(), tuning.parameter.grad, wanted.item(), theirs.grad


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_shared_prefix_gradients_are_the_plain_ones(n: int, share: bool) -> None:
    loss, gradient, wanted, theirs = in_double(batch_of(n), 5, share)
    assert abs(loss - wanted) < 1e-9
    assert (gradient - theirs).abs().max() < 1e-9 * theirs.abs().max()


@pytest.mark.parametrize(
    "examples",
    [
        pytest.param([Example((1, 5, 2), 1)] * 3, id="the same thrice"),
        pytest.param([Example((1, 5, 2), 1), Example((1, 5, 7, 2), 1), Example((1, 2), 1)], id="one begins another"),
        pytest.param([Example((1, 7, 2), 2), Example((1, 8, 2), 2), Example((1, 9, 2), 2)], id="all alone"),
        pytest.param([Example((*range(1, 60),), 1), *batch_of(4)], id="learns the prompt"),
    ],
)
def test_odd_batches(examples: list[Example]) -> None:
    loss, gradient, wanted, theirs = in_double(examples, 3)
    assert abs(loss - wanted) < 1e-9
    assert (gradient - theirs).abs().max() < 1e-9 * theirs.abs().max()


def test_without_a_soft_prompt_the_loss_is_the_plain_one() -> None:
    model, examples = model_in(torch.float64), batch_of(7)
    packed = pack(examples, 0, CPU)
    hidden = model.hidden(packed.tokens, positions=packed.positions, cache=packed)[0]
    logits = model.output(hidden[packed.supervised])
    losses = F.cross_entropy(logits, packed.targets, reduction="none")
    loss = (losses * packed.weights).sum() / packed.weights.sum()
    assert abs(loss - plain(model, torch.zeros(0, DIM, dtype=torch.float64), examples)) < 1e-9


def test_what_is_shared_stands_in_the_row_once() -> None:
    examples = batch_of(16)
    packed = pack(examples, 4, CPU)
    row = packed.tokens[0].tolist()
    assert [row.count(token) for token in (1, OPENING[0], 40, 60)] == [1, 1, 1, 1]
    own = sum(len(one.tokens) - 1 - 1 - len(TEMPLATES[40 not in one.tokens]) for one in examples)
    assert n_computed(packed) == round_up(4 + 1 + len(OPENING) + 15 + 12 + own)


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@settings(max_examples=50, deadline=None)
@given(lengths, st.integers(0, 3))
def test_every_token_has_a_place_and_little_is_padding(sizes: list[int], n_virtual: int) -> None:
    rng = random.Random(3)
    examples = [Example((1, *(rng.randrange(3, VOCAB) for _ in range(size)), 2), 1) for size in sizes]
    packed = pack(examples, n_virtual, CPU)
    places = [stretch.start for stretch in packed.stretches]
    assert places == [0, *(stretch.stop for stretch in packed.stretches[:-1])]
    assert packed.stretches[-1].stop <= n_computed(packed) == packed.tokens.shape[1] + n_virtual
    assert packed.weights.sum() == n_targets(examples)
    assert 1 - packed.stretches[-1].stop / n_computed(packed) < 0.05
    assert len(packed.weights) - packed.weights.count_nonzero() < 0.05 * len(packed.weights)


def test_lengths_are_few_and_hardly_longer() -> None:
    lengths = {round_up(length) for length in range(1, 4097)}
    assert all(length <= round_up(length) < 1.05 * length for length in range(1, 4097))
    assert len(lengths) < 250


def own_and_torchs(n_heads: int, n_kv_heads: int) -> list[Tensor]:
    """Attention over one batch and its gradients: ours, and torch's with every example laid out whole."""
    torch.manual_seed(2)
    packed = pack(batch_of(5), 3, CPU)
    shapes = [(1, n_computed(packed), heads, 8) for heads in (n_heads, n_kv_heads, n_kv_heads)]
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    ours = packed.attend(0, q, k, v, packed.positions, None)
    theirs = torch.zeros_like(ours)
    for stretch in packed.stretches:
        seen = torch.cat([torch.arange(*span) for span in stretch.seen])
        width = stretch.stop - stretch.start
        mask = torch.ones(width, len(seen), dtype=torch.bool).tril(len(seen) - width)
        heads = (q[:, stretch.start : stretch.stop], k[:, seen], v[:, seen])
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in heads), attn_mask=mask, enable_gqa=True)
        theirs[:, stretch.start : stretch.stop] = out.transpose(1, 2).flatten(2)
    slope = torch.randn_like(ours)
    found = torch.autograd.grad(ours, (q, k, v), slope)
    wanted = torch.autograd.grad(theirs, (q, k, v), slope)
    return [a - b for a, b in zip((ours, *found), (theirs, *wanted), strict=True)]


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_attention_over_stretches_is_torchs(n_kv_heads: int) -> None:
    assert all(difference.abs().max() < 1e-12 for difference in own_and_torchs(4, n_kv_heads))
