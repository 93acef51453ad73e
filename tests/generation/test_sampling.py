"""Choosing tokens: the right distribution, the right nucleus, the same choice at every world size."""

import pytest
import torch
from ranks import RankPools
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llama.errors import LlamaError
from llama.generation.sampling import Batch, Sampling, chosen, gumbel, sample
from llama.noise import noise_key
from llama.parallel import groups
from llama.parallel.groups import Ranks
from llama.parallel.partition import even_ranges, weighted_ranges

CPU = torch.device("cpu")


def draw(logits: Tensor, rows: list[tuple[Sampling, int, int]], n_drawable: int | None = None) -> Tensor:
    vocab = logits.shape[-1]
    batch = Batch.create(rows, CPU)
    return chosen(sample(logits, batch, even_ranges(vocab, 1), n_drawable or vocab, Ranks()))[0]


def random_logits(rows: int, vocab: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, None), (0.7, 1.0, None), (1.0, 0.8, None), (1.3, 0.95, 6), (0.9, 1.0, 4)],
)
def test_frequencies_are_those_of_transformers_warpers(temperature: float, top_p: float, top_k: int | None) -> None:
    n_draws, vocab = 20_000, 12
    logits = random_logits(1, vocab, seed=3)
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        warped = TopKLogitsWarper(top_k)(None, warped)
    expected = TopPLogitsWarper(top_p)(None, warped).softmax(-1)[0]
    way = Sampling(temperature, top_p, top_k, seed=5)
    tokens = draw(logits.expand(n_draws, -1), [(way, 0, position) for position in range(n_draws)])
    counts = torch.bincount(tokens, minlength=vocab).double()
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi_square = ((counts - n_draws * expected) ** 2 / (n_draws * expected))[kept].sum().item()
    # The 99.9 % quantile for 11 degrees of freedom is 31.3; the draws are fixed by the seed.
    assert chi_square < 31.3


def test_noise_is_standard_gumbel_and_depends_on_every_part_of_its_key() -> None:
    keys = torch.tensor([noise_key(1, index, position) for index in range(100) for position in range(100)])
    noise = gumbel(keys, torch.arange(50)).double()
    assert noise.isfinite().all()
    # Mean is Euler's constant, variance pi^2 / 6; half a million draws tell them to 0.005 and 0.01.
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.005)
    assert noise.var().item() == pytest.approx(1.6449, abs=0.01)
    # float32 has so few values that half a million draws meet now and then.
    assert noise.unique().numel() > 0.98 * noise.numel()
    for other in (noise_key(2, 0, 0), noise_key(1, 1, 0), noise_key(1, 0, 1)):
        assert other != noise_key(1, 0, 0)


def test_greedy_is_the_best_token_whatever_the_seed() -> None:
    logits = random_logits(8, 100)
    rows = [(Sampling(0.0, seed=seed), 0, 5) for seed in range(8)]
    assert draw(logits, rows).tolist() == logits.argmax(-1).tolist()


def test_a_flat_nucleus_wider_than_the_candidates_is_drawn_in_full() -> None:
    vocab, n_draws = 5000, 3000
    way = Sampling(1.0, 0.9, seed=1)
    tokens = draw(torch.zeros(n_draws, vocab), [(way, 0, position) for position in range(n_draws)])
    # 3,000 draws from 4,500 equal tokens show about 4500 * (1 - exp(-2/3)) = 2190 of them.
    assert 2050 < tokens.unique().numel() < 2330


def test_padding_of_the_vocabulary_is_never_drawn() -> None:
    logits = torch.zeros(500, 40)
    logits[:, 30:] = 50.0
    for way in (Sampling(0), Sampling(1.0, 1.0), Sampling(1.0, 0.9), Sampling(1.0, 1.0, 5)):
        assert draw(logits, [(way, 0, position) for position in range(500)], n_drawable=30).max() < 30


def test_log_probabilities_are_of_the_unscaled_model() -> None:
    logits = random_logits(4, 50)
    batch = Batch.create([(Sampling(2.0, 0.5, seed=s), 0, 0) for s in range(4)], CPU)
    tokens, log_probs = chosen(sample(logits, batch, even_ranges(50, 1), 50, Ranks()))
    expected = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(log_probs, expected, atol=1e-6, rtol=0)


MIXED = [
    Sampling(0.0), Sampling(1.0, 1.0), Sampling(0.5, 0.9), Sampling(1.5, 0.95, 7), Sampling(1.0, 0.99),
    Sampling(3.0, 0.97),
]  # fmt: skip


def draw_on_ranks(logits: Tensor, weights: list[float]) -> tuple[Tensor, Tensor]:
    ranks = groups.current()
    cuts = weighted_ranges(logits.shape[-1], weights, 4)
    own = cuts[ranks.rank]
    batch = Batch.create([(MIXED[row % len(MIXED)], row, 3) for row in range(len(logits))], CPU)
    return chosen(sample(logits[:, own.start : own.stop], batch, cuts, logits.shape[-1] - 3, ranks))


@pytest.mark.parametrize("weights", [[1, 1], [5, 1], [1, 1, 1], [1, 1, 1, 1], [3, 1, 2, 1]])
@pytest.mark.parametrize(("vocab", "spread"), [(101, 1.0), (700, 3.0), (2500, 0.3)])
def test_every_world_size_makes_the_same_choice(
    pools: RankPools, weights: list[float], vocab: int, spread: float
) -> None:
    logits = random_logits(60, vocab, seed=vocab, spread=spread)
    tokens, log_probs = draw_on_ranks_alone(logits)
    for other_tokens, other_log_probs in pools.run(len(weights), draw_on_ranks, logits, weights):
        assert other_tokens.tolist() == tokens.tolist()
        torch.testing.assert_close(other_log_probs, log_probs, atol=1e-5, rtol=0)


def draw_on_ranks_alone(logits: Tensor) -> tuple[Tensor, Tensor]:
    return draw_on_ranks(logits, [1.0])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": 0}, "top_k"),
    ],
)
def test_values_out_of_range_are_named(options: dict, word: str) -> None:
    with pytest.raises(LlamaError, match=word):
        Sampling(**options)
