"""Noise from a counter: against published values of SplitMix64, and dropout's masks against chance."""

import itertools

import pytest
import torch

from llama.noise import GOLDEN, dropped, mix, noise_key

# The first numbers of SplitMix64 from seed 1234567, as https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64
# lists them.
PUBLISHED = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821)


def test_mixing_is_that_of_splitmix64() -> None:
    expected = torch.tensor([value - (1 << 64) if value >> 63 else value for value in PUBLISHED])
    assert torch.equal(mix(1234567 + torch.arange(1, 6) * GOLDEN), expected)
    assert noise_key(1234567) == expected[0]


def test_a_key_depends_on_every_value_and_their_order() -> None:
    keys = {noise_key(*values) for n in (1, 2, 3) for values in itertools.product((-1, 0, 1, 2**40), repeat=n)}
    assert len(keys) == 4 + 16 + 64


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_dropout_is_like_independent_coins(p: float) -> None:
    n_rows, n_features = 1000, 400
    mask = dropped(torch.tensor(77), torch.arange(n_rows), torch.arange(n_features), p).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(mask.mean() - p) < 5 * deviation / (n_rows * n_features) ** 0.5
    # Counts a row and a feature spread as a binomial's do.
    for dim, n in ((0, n_rows), (1, n_features)):
        assert mask.sum(dim).std().item() == pytest.approx(deviation * n**0.5, rel=0.15)
    # Neither neighbours, nor the triples that a sequence of multiples would tie together, go along with each other.
    coins = (mask - p) / deviation
    for shifts in ([(0, 1)], [(1, 0)], [(1, 1)], [(0, 1), (0, 2)], [(1, 0), (2, 0)], [(0, 1), (1, 0), (1, 1)]):
        together = coins.clone()
        for down, right in shifts:
            together *= coins.roll((-down, -right), (0, 1))
        assert abs(together.mean()) < 5 / (n_rows * n_features) ** 0.5


def test_a_part_of_the_features_is_dropped_as_in_the_whole() -> None:
    whole = dropped(torch.tensor(5), torch.arange(50), torch.arange(60), 0.3)
    assert torch.equal(dropped(torch.tensor(5), torch.arange(50), torch.arange(13, 47), 0.3), whole[:, 13:47])
    assert (dropped(torch.tensor(6), torch.arange(50), torch.arange(60), 0.3) != whole).float().mean() > 0.3


def test_the_ends_of_the_range_drop_none_or_nearly_all() -> None:
    assert not dropped(torch.tensor(5), torch.arange(50), torch.arange(60), 0.0).any()
    assert dropped(torch.tensor(5), torch.arange(50), torch.arange(60), 1 - 2**-33).all()
