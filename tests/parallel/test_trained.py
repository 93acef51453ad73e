"""A trained tensor's part on a rank: parts make the whole again, gradients are summed, norms count entries once."""

from __future__ import annotations

import pytest
import torch
from ranks import RankPools
from support import hf_model, meta_params
from torch import Tensor, nn

from llama.config import ModelArgs
from llama.parallel import groups
from llama.parallel.collectives import all_reduce
from llama.parallel.groups import Ranks
from llama.parallel.partition import Partition
from llama.parallel.trained import Trained, own_part, sum_gradients

Cuts = tuple[range, ...]


def kv_rows(world_size: int, tensor_split: str | None = None) -> Cuts:
    """Of a model with 2 KV heads of 8 rows: shared ones at 3 and 4 ranks."""
    args = ModelArgs.from_params(meta_params(hf_model("2")))
    return Partition.create(args, world_size, tensor_split).kv_rows


# Sizes, some of them unequal, some overlapping: a KV head of one rank, of two, of three; and runs that share a part.
CUTS: list[Cuts] = [
    (range(0, 16),),
    kv_rows(2),
    (range(0, 11), range(11, 16)),
    kv_rows(3),
    kv_rows(3, "2,1,1"),
    (range(0, 7), range(4, 12), range(9, 16)),
    kv_rows(4),
    kv_rows(4, "5,1,1,1"),
    (range(0, 3), range(3, 9), range(9, 10), range(10, 16)),
]
WHOLE = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


def gradient_of(rank: int, part: Tensor) -> Tensor:
    return torch.randn(part.shape, generator=torch.Generator().manual_seed(100 + rank))


def whole_of(dim: int | None) -> Tensor:
    return WHOLE.T.contiguous() if dim == 1 else WHOLE


def trained_of(cuts: Cuts, dim: int | None, partial: bool) -> Trained:
    ranks = groups.current()
    parameter = nn.Parameter(own_part(whole_of(dim), dim, cuts, ranks).clone())
    parameter.grad = gradient_of(ranks.rank, parameter)
    return Trained("w", parameter, ranks, dim, () if dim is None else cuts, partial)


def summed(cuts: Cuts, dim: int | None, partial: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """On every rank: the whole, this rank's part of it, its gradient, the whole gradient, the squared norm."""
    trained = trained_of(cuts, dim, partial)
    sum_gradients([trained], trained.ranks, Ranks())
    gradient = trained.parameter.grad
    assert gradient is not None
    assert gradient.is_contiguous()
    total = all_reduce(trained.square_sum(), trained.ranks)
    return trained.whole(trained.parameter), trained.part(whole_of(dim)), gradient, trained.whole(gradient), total


def expected_gradient(cuts: Cuts, dim: int) -> Tensor:
    """The sum of what the ranks hold, entry by entry."""
    expected = torch.zeros_like(whole_of(dim))
    for rank, cut in enumerate(cuts):
        part = gradient_of(rank, whole_of(dim).narrow(dim, cut.start, len(cut)))
        for row, at in enumerate(cut):
            expected.select(dim, at).add_(part.select(dim, row))
    return expected


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_parts_of_a_cut_tensor_and_of_its_gradient_make_the_whole(pools: RankPools, cuts: Cuts, dim: int) -> None:
    expected = expected_gradient(cuts, dim)
    answers = pools.run(len(cuts), summed, cuts, dim, False)
    for cut, (whole, part, gradient, whole_gradient, total) in zip(cuts, answers, strict=True):
        assert torch.equal(whole, whole_of(dim))
        assert torch.equal(part, whole_of(dim).narrow(dim, cut.start, len(cut)))
        torch.testing.assert_close(gradient, expected.narrow(dim, cut.start, len(cut)), atol=1e-6, rtol=0)
        torch.testing.assert_close(whole_gradient, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(total, expected.double().square().sum(), atol=0, rtol=1e-6)
        # Bit for bit, or the copies of a shared head would drift apart.
        assert torch.equal(whole_gradient, answers[0][3])
        assert torch.equal(gradient, whole_gradient.narrow(dim, cut.start, len(cut)))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("partial", [False, True])
def test_a_whole_tensor_counts_once_and_is_summed_only_where_gradients_are_parts(
    pools: RankPools, world_size: int, partial: bool
) -> None:
    gradients = [gradient_of(rank, WHOLE) for rank in range(world_size)]
    answers = pools.run(world_size, summed, (), None, partial)
    for rank, (whole, part, gradient, _, total) in enumerate(answers):
        expected = sum(gradients) if partial else gradients[rank]
        assert torch.equal(whole, WHOLE)
        assert torch.equal(part, WHOLE)
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=0)
        first = sum(gradients) if partial else gradients[0]
        torch.testing.assert_close(total, first.double().square().sum(), atol=0, rtol=1e-6)


def summed_without_gradient(cuts: Cuts) -> tuple[bool, float]:
    """Rank 0 alone has a gradient."""
    trained = trained_of(cuts, 0, False)
    if trained.ranks.rank:
        trained.parameter.grad = None
    sum_gradients([trained], trained.ranks, Ranks())
    assert trained.parameter.grad is not None
    return bool(trained.parameter.grad.any()), all_reduce(trained.square_sum(), trained.ranks).item()


def test_a_rank_without_a_gradient_takes_part(pools: RankPools) -> None:
    """No token of this step met its queries, say: it must neither wait nor be waited for."""
    cuts = kv_rows(3)
    own = gradient_of(0, WHOLE.narrow(0, 0, len(cuts[0])))
    answers = pools.run(3, summed_without_gradient, cuts)
    assert [any_ for any_, _ in answers] == [cut == cuts[0] for cut in cuts]
    for _, total in answers:
        assert total == pytest.approx(own.double().square().sum().item(), rel=1e-6)


def test_the_whole_is_a_copy_that_training_does_not_reach() -> None:
    trained = trained_of((range(0, 16),), 0, False)
    whole = trained.whole(trained.parameter)
    with torch.no_grad():
        trained.parameter.zero_()
    assert torch.equal(whole, WHOLE)
    assert not whole.requires_grad
