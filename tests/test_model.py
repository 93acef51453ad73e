"""The model against transformers, and cut against whole, in float32."""

import itertools
from pathlib import Path

import pytest
import torch
from ranks import RankPools
from support import GENERATIONS, VOCAB, gather_logits, hf_model, meta_params, meta_state, write_meta
from torch import Tensor

from llama.checkpoint.load import load_model
from llama.checkpoint.source import open_checkpoint
from llama.config import ModelArgs
from llama.model import Transformer
from llama.parallel import groups
from llama.parallel.collectives import all_gather
from llama.parallel.partition import Partition

# Two correct float32 programs differ by rounding alone; logits here spread over several nats.
LOGITS = {"atol": 2e-5, "rtol": 0.0}
N_TOKENS = 150  # past the 64 positions of the original context


def some_tokens(batch: int = 3, n_tokens: int = N_TOKENS) -> Tensor:
    return torch.randint(0, VOCAB, (batch, n_tokens), generator=torch.Generator().manual_seed(7))


def whole_model(generation: str, **changes: object) -> Transformer:
    """The generation's model in this process, from transformers' weights."""
    reference = hf_model(generation, **changes)
    model = Transformer(ModelArgs.from_params(meta_params(reference)))
    model.load_state_dict(meta_state(reference))
    return model


@pytest.mark.parametrize("generation", GENERATIONS)
@torch.no_grad()
def test_logits_are_those_of_transformers(generation: str) -> None:
    tokens = some_tokens()
    expected = hf_model(generation)(tokens).logits
    assert expected.std() > 0.5  # a model that says nothing would pass anything
    torch.testing.assert_close(whole_model(generation)(tokens), expected, **LOGITS)


@torch.no_grad()
def test_an_explicit_head_dim_is_honoured() -> None:
    reference = hf_model("2", head_dim=16)
    model = Transformer(ModelArgs.from_hf(reference.config.to_dict()))
    model.load_state_dict(meta_state(reference))
    torch.testing.assert_close(model(some_tokens()), reference(some_tokens()).logits, **LOGITS)


@pytest.mark.parametrize("generation", ["1", "2", "3.1"])
@torch.no_grad()
def test_cached_equals_uncached(generation: str) -> None:
    model, tokens = whole_model(generation), some_tokens()
    cache = model.new_cache(3, N_TOKENS)
    chunks = [0, 70, 71, 72, 140, *range(141, N_TOKENS + 1)]
    pieces = []
    for start, stop in itertools.pairwise(chunks):
        positions = torch.arange(start, stop).expand(3, -1)
        view = cache.view(visible=stop, fresh=start == 0)
        pieces.append(model(tokens[:, start:stop], positions=positions, cache=view))
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), **LOGITS)


@torch.no_grad()
def test_rows_of_different_length_share_a_cache() -> None:
    model, tokens = whole_model("2"), some_tokens(2, 40)
    lengths = torch.tensor([40, 11])
    cache = model.new_cache(2, 50)
    padded = tokens.masked_fill(torch.arange(40) >= lengths.unsqueeze(1), 0)
    model(padded, cache=cache.view(fresh=True))
    step = model(torch.tensor([[5], [6]]), positions=lengths.unsqueeze(1), cache=cache.view(visible=41))
    for row, length in enumerate(lengths.tolist()):
        alone = torch.cat((tokens[row : row + 1, :length], torch.tensor([[5 + row]])), dim=1)
        torch.testing.assert_close(step[row, 0], model(alone)[0, -1], **LOGITS)


@torch.no_grad()
def test_embeddings_may_stand_in_for_tokens() -> None:
    model, tokens = whole_model("3"), some_tokens(1, 20)
    torch.testing.assert_close(model(embeddings=model.tok_embeddings(tokens)), model(tokens), atol=0, rtol=0)


# -- cut across ranks ------------------------------------------------------------------------------

CUTS = [(1, None), (2, None), (3, None), (4, None), (2, "3,1"), (3, "2,1,1"), (4, "1,3,2,2")]


def sharded_logits(folder: Path, tensor_split: str | None, tokens: Tensor) -> Tensor:
    """On every rank: load the shard, return the whole logits."""
    ranks, checkpoint = groups.current(), open_checkpoint(folder)
    partition = Partition.create(checkpoint.args, ranks.world_size, tensor_split)
    model = load_model(checkpoint, partition, ranks, torch.float32)
    with torch.no_grad():
        return gather_logits(model, model(tokens))


@pytest.mark.parametrize(("world_size", "tensor_split"), CUTS)
@pytest.mark.parametrize("generation", ["1", "2", "3.2"])
def test_sharded_logits_are_the_whole_ones(
    pools: RankPools, tmp_path: Path, generation: str, world_size: int, tensor_split: str | None
) -> None:
    reference = hf_model(generation)
    folder = write_meta(tmp_path, reference)
    with torch.no_grad():
        expected = reference(some_tokens()).logits
    for logits in pools.run(world_size, sharded_logits, folder, tensor_split, some_tokens()):
        torch.testing.assert_close(logits, expected, **LOGITS)


def sharded_gradients(
    folder: Path, tensor_split: str | None, tokens: Tensor
) -> tuple[float, dict[str, tuple[tuple[slice, ...], Tensor]]]:
    """On every rank: the loss, and each parameter's gradient with its place in the whole one."""
    ranks, checkpoint = groups.current(), open_checkpoint(folder)
    partition = Partition.create(checkpoint.args, ranks.world_size, tensor_split)
    model = load_model(checkpoint, partition, ranks, torch.float32).requires_grad_(True)
    logits = model(tokens[:, :-1])
    loss = _sharded_loss(logits, tokens[:, 1:], partition.vocab[ranks.rank])
    loss.backward()
    places = {name: tensor.spec.own(partition, ranks.rank) for name, tensor in checkpoint.tensors.items()}
    gradients = {name: (places[name], p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def _sharded_loss(logits: Tensor, targets: Tensor, own: range) -> Tensor:
    """Mean cross-entropy whose gradient reaches this rank's logits: softmax minus one-hot, by hand."""
    ranks = groups.current()
    norms = all_gather(logits.detach().logsumexp(-1), ranks).logsumexp(0)
    probs = (logits.detach() - norms.unsqueeze(-1)).exp()
    local = targets - own.start
    mine = (local >= 0) & (local < len(own))
    one_hot = torch.nn.functional.one_hot(local.clamp(0, len(own) - 1), len(own)) * mine.unsqueeze(-1)
    picked = all_gather((logits.detach() * one_hot).sum(-1), ranks).sum(0)
    value = (norms - picked).mean()
    surrogate = (logits * (probs - one_hot)).sum() / targets.numel()
    return surrogate - surrogate.detach() + value


@pytest.mark.parametrize(("world_size", "tensor_split"), CUTS)
@pytest.mark.parametrize("generation", ["1", "2"])
def test_sharded_gradients_are_the_whole_ones(
    pools: RankPools, tmp_path: Path, generation: str, world_size: int, tensor_split: str | None
) -> None:
    reference = hf_model(generation)
    folder, tokens = write_meta(tmp_path, reference), some_tokens(2, 30)
    whole = whole_model(generation)
    logits = whole(tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    results = pools.run(world_size, sharded_gradients, folder, tensor_split, tokens)
    for value, _ in results:
        assert value == pytest.approx(loss.item(), abs=1e-5)
    for name, parameter in whole.named_parameters():
        _check_gradient(name, parameter.grad, [gradients[name] for _, gradients in results])


def _check_gradient(name: str, expected: Tensor, parts: list[tuple[tuple[slice, ...], Tensor]]) -> None:
    """Shards fill the whole gradient; where ranks share a KV head, their gradients of it add up."""
    scale = expected.abs().max()
    assert scale > 0
    if "norm" in name:  # every rank holds all of it
        for _, gradient in parts:
            torch.testing.assert_close(gradient / scale, expected / scale, atol=1e-5, rtol=0.0)
        return
    total = torch.zeros_like(expected)
    for place, gradient in parts:
        total[place] += gradient
    torch.testing.assert_close(total / scale, expected / scale, atol=1e-5, rtol=0.0)
