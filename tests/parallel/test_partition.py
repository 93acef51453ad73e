"""The cut: nothing lost, nothing twice, whole groups, and even as far as whole units allow."""

import math
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llama.checkpoint.table import n_unique_params, rank_params
from llama.config import ModelArgs
from llama.errors import PartitionError
from llama.parallel.partition import FFN_BLOCK, VOCAB_BLOCK, Partition, apportion, parse_tensor_split, weighted_ranges

LLAMA3 = {"vocab_size": 128256}
REAL = {
    "7B": ModelArgs(4096, 32, 32, vocab_size=32000),
    "13B": ModelArgs(5120, 40, 40, vocab_size=32000),
    "2-70B": ModelArgs(8192, 80, 64, 8, vocab_size=32000, multiple_of=4096, ffn_dim_multiplier=1.3),
    "3-8B": ModelArgs(4096, 32, 32, 8, multiple_of=1024, ffn_dim_multiplier=1.3, **LLAMA3),
    "3-70B": ModelArgs(8192, 80, 64, 8, multiple_of=4096, ffn_dim_multiplier=1.3, **LLAMA3),
    "3.2-1B": ModelArgs(2048, 16, 32, 8, ffn_dim_multiplier=1.5, tied=True, **LLAMA3),
    "3.2-3B": ModelArgs(3072, 28, 24, 8, ffn_dim_multiplier=1.0, tied=True, **LLAMA3),
}


@st.composite
def geometries(draw: st.DrawFn) -> ModelArgs:
    n_kv_heads, group = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    n_heads = n_kv_heads * group
    return ModelArgs(
        dim=draw(st.sampled_from([16, 64, 256])),
        n_layers=draw(st.integers(1, 3)),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=draw(st.sampled_from([2, 8, 64])),
        ffn_dim=draw(st.integers(n_heads, 3000)),
        vocab_size=draw(st.integers(n_heads, 3000)),
        tied=draw(st.booleans()),
    )


@st.composite
def cuts(draw: st.DrawFn) -> Partition:
    """A random geometry on any world size that it allows, equal or weighted."""
    args = draw(geometries())
    world_size = draw(st.integers(1, args.n_heads))
    weight = st.floats(0.01, 100, allow_nan=False)
    weights = draw(st.none() | st.lists(weight, min_size=world_size, max_size=world_size))
    return Partition.create(args, world_size, weights)


def laid_end_to_end(runs: tuple[range, ...]) -> list[int]:
    return [item for run in runs for item in run]


# -- what holds for every cut ----------------------------------------------------------------------


@given(cuts())
@settings(deadline=None, max_examples=300)
def test_heads_columns_and_rows_are_each_owned_once_and_in_order(partition: Partition) -> None:
    args = partition.args
    for runs, total in (
        (partition.heads, args.n_heads),
        (partition.ffn, args.ffn_dim),
        (partition.vocab, args.vocab_size),
        (partition.q_rows, args.n_heads * args.head_dim),
    ):
        assert laid_end_to_end(runs) == list(range(total))
        assert all(len(run) >= 1 for run in runs)


@given(cuts())
@settings(deadline=None, max_examples=300)
def test_a_rank_holds_exactly_the_kv_heads_that_its_queries_need(partition: Partition) -> None:
    group = partition.args.group_size
    for heads, kv_heads, kv_rows in zip(partition.heads, partition.kv_heads, partition.kv_rows, strict=True):
        assert sorted({head // group for head in heads}) == list(kv_heads)
        whole = len(heads) == group * len(kv_heads)
        assert whole or len(kv_heads) == 1
        assert len(kv_rows) == len(kv_heads) * partition.args.head_dim


@given(cuts())
@settings(deadline=None, max_examples=200)
def test_ranks_hold_the_whole_model_and_what_is_repeated(partition: Partition) -> None:
    args, world_size = partition.args, partition.world_size
    held = sum(rank_params(partition, rank) for rank in range(world_size))
    norms = (2 * args.n_layers + 1) * args.dim
    kv_copies = sum(map(len, partition.kv_heads)) - args.n_kv_heads
    kv = args.n_layers * 2 * args.dim * args.head_dim
    assert held == n_unique_params(args) + (world_size - 1) * norms + kv_copies * kv


@given(cuts(), st.integers(1, 1000))
@settings(deadline=None, max_examples=100)
def test_the_same_question_gets_the_same_answer_and_scale_does_not_matter(partition: Partition, factor: int) -> None:
    weights = [weight * factor for weight in partition.weights]
    again = Partition.create(partition.args, partition.world_size, partition.weights)
    assert again.heads == Partition.create(partition.args, partition.world_size, weights).heads == partition.heads


@given(st.integers(1, 200), st.lists(st.floats(0, 1000), min_size=1, max_size=20))
@settings(deadline=None)
def test_apportioning_deals_out_everything_and_leaves_no_one_empty(units: int, weights: list[float]) -> None:
    if units < len(weights):
        with pytest.raises(PartitionError, match=f"{units} units cannot serve {len(weights)} ranks"):
            apportion(units, weights)
        return
    shares = apportion(units, weights)
    assert sum(shares) == units
    assert min(shares) >= 1


@pytest.mark.parametrize(
    ("units", "weights", "shares"),
    [(8, (3, 1), [6, 2]), (8, (1, 1, 1), [3, 3, 2]), (4, (100, 1, 1), [2, 1, 1]), (5, (1, 1), [3, 2])],
)
def test_apportioning_goes_by_largest_remainders(units: int, weights: tuple[float, ...], shares: list[int]) -> None:
    assert apportion(units, weights) == shares


def test_the_last_block_may_be_a_part_of_one() -> None:
    assert weighted_ranges(50, (1, 1), 16) == (range(0, 32), range(32, 50))


# -- evenness --------------------------------------------------------------------------------------

DIVIDING = [
    (name, n)
    for name, args in REAL.items()
    for n in range(1, args.n_heads + 1)
    if args.n_heads % n == 0 and (args.n_kv_heads % n == 0 or n % args.n_kv_heads == 0)
]


@pytest.mark.parametrize(("name", "world_size"), DIVIDING)
def test_shards_are_even_to_two_percent_where_heads_divide(name: str, world_size: int) -> None:
    partition = Partition.create(REAL[name], world_size)
    held = [rank_params(partition, rank) for rank in range(world_size)]
    assert max(held) <= 1.02 * min(held)
    assert len({len(run) for run in partition.heads}) == 1


def one_unit(args: ModelArgs) -> float:
    """Parameters of one KV group or one FFN block, whichever is larger, in every layer; and of one vocabulary block."""
    group = 2 * args.head_dim * (args.group_size + 1)
    return args.dim * (args.n_layers * max(group, 3 * FFN_BLOCK) + (1 if args.tied else 2) * VOCAB_BLOCK)


def misfits(partition: Partition) -> list[float]:
    """By how many units each rank holds more than its weight's part of all that is held."""
    held = [rank_params(partition, rank) for rank in range(partition.world_size)]
    unit = one_unit(partition.args)
    return [abs(part - weight * sum(held)) / unit for part, weight in zip(held, partition.weights, strict=True)]


@pytest.mark.parametrize("world_size", [2, 3, 5, 6, 7])
@pytest.mark.parametrize("name", REAL)
def test_elsewhere_shards_are_even_to_one_unit(name: str, world_size: int) -> None:
    assert max(misfits(Partition.create(REAL[name], world_size))) <= 1.0


@given(geometries(), st.data())
@settings(deadline=None, max_examples=300)
def test_random_shards_are_even_to_one_unit_where_the_ffn_can_make_up_for_it(
    args: ModelArgs, data: st.DataObject
) -> None:
    partition = Partition.create(args, data.draw(st.integers(1, args.n_heads)))
    columns = [
        2 * args.head_dim * (len(q) + len(kv)) for q, kv in zip(partition.heads, partition.kv_heads, strict=True)
    ]
    assume(max(columns) < (sum(columns) + 3 * args.ffn_dim) / partition.world_size)
    assert max(misfits(partition)) <= 1.0


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("tensor_split", ["3,1", "1,2,1", "24,8,8,8"])
def test_weighted_shards_follow_their_weights_to_one_unit(name: str, tensor_split: str) -> None:
    partition = Partition.create(REAL[name], tensor_split.count(",") + 1, tensor_split)
    assert max(misfits(partition)) <= 1.0


def test_three_to_one_is_three_to_one() -> None:
    partition = Partition.create(REAL["3-8B"], 2, "3,1")
    assert partition.heads == (range(0, 24), range(24, 32))
    assert partition.kv_heads == (range(0, 6), range(6, 8))
    assert rank_params(partition, 0) / rank_params(partition, 1) == pytest.approx(3, rel=0.01)


def test_heads_that_do_not_divide_are_made_up_for_by_the_ffn() -> None:
    partition = Partition.create(REAL["7B"], 3)
    assert [len(run) for run in partition.heads] == [11, 11, 10]
    assert len(partition.ffn[2]) > len(partition.ffn[0])
    held = [rank_params(partition, rank) for rank in range(3)]
    assert max(held) <= 1.02 * min(held)


def test_more_ranks_than_kv_heads_repeat_each_next_to_its_copies() -> None:
    partition = Partition.create(REAL["3-8B"], 16)
    assert partition.kv_heads == tuple(range(rank // 2, rank // 2 + 1) for rank in range(16))
    assert [len(run) for run in partition.heads] == [2] * 16


def test_columns_that_must_stay_together_do() -> None:
    partition = Partition.create(REAL["7B"], 3, ffn_block=128)
    assert all(run.start % 128 == 0 for run in partition.ffn)
    with pytest.raises(PartitionError, match=r"11008 columns in groups of 4096 cannot serve 4 ranks"):
        Partition.create(REAL["7B"], 4, ffn_block=4096)


# -- what cannot be cut ----------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [9, 64])
def test_more_ranks_than_heads_is_refused_with_both_numbers(world_size: int) -> None:
    args = ModelArgs(64, 1, 8, 2, vocab_size=500)
    with pytest.raises(PartitionError, match=f"{world_size} ranks but only 8 attention heads"):
        Partition.create(args, world_size)


@pytest.mark.parametrize("sizes", [{"ffn_dim": 3, "vocab_size": 99}, {"ffn_dim": 99, "vocab_size": 3}])
def test_fewer_columns_or_rows_than_ranks_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(PartitionError, match=r"3 .*4 ranks"):
        Partition.create(ModelArgs(64, 1, 8, **sizes), 4)


@pytest.mark.parametrize(
    "tensor_split",
    ["1", "1,2,3", "1,0", "1,-1", "1,nan", "1,inf", "one,two", "1,", "", "1;2", [1.0], [1.0, None], 3, [[1], [2]]],
    ids=repr,
)
def test_an_unusable_split_is_refused_in_one_line_that_shows_it(tensor_split: Any) -> None:
    with pytest.raises(PartitionError) as caught:
        Partition.create(REAL["7B"], 2, tensor_split)
    assert repr(tensor_split) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tensor_split", ["3,1", " 3 , 1 ", [3, 1], (0.75, 0.25), "0.3,0.1", "3e300,1e300"])
def test_a_split_is_text_or_a_sequence_of_any_scale(tensor_split: Any) -> None:
    assert parse_tensor_split(tensor_split, 2) == pytest.approx((0.75, 0.25))


def test_a_split_of_extreme_weights_still_gives_everyone_a_unit() -> None:
    assert parse_tensor_split(None, 4) == (0.25,) * 4
    weights = parse_tensor_split("1e308,1e308,1e-300", 3)
    assert all(math.isfinite(weight) for weight in weights)
    partition = Partition.create(REAL["7B"], 3, "1e308,1e308,1e-300")
    assert [len(run) for run in partition.heads] == [16, 15, 1]
