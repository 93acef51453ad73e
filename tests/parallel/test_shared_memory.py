"""Collectives through memory that ranks share: what the group's give, the same bits on every rank, and its ends."""

from __future__ import annotations

import dataclasses
import errno
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Pool, RankPools
from sharing import sharing
from support import VOCAB, hf_model, write_meta
from torch import Tensor

from llama.checkpoint.load import load_model
from llama.checkpoint.source import open_checkpoint
from llama.generation.engine import Engine, Request
from llama.generation.sampling import Sampling
from llama.kernels import shared
from llama.parallel import collectives, groups
from llama.parallel.groups import Ranks
from llama.parallel.partition import Partition
from llama.parallel.store import is_lost_peer

PLACE = 256 << 10  # bytes that go at a time, see shared.h


@pytest.fixture(autouse=True)
def _available() -> None:
    if not shared.available():
        pytest.skip("needs Linux and a C++ compiler")


def brought(rank: int, dtype: torch.dtype, n: int) -> Tensor:
    """Return a rank's input; integers where the dtype has nothing else."""
    values = torch.randn(n, generator=torch.Generator().manual_seed(100 + rank), dtype=torch.float64)
    return (values if dtype.is_floating_point else 1000 * values).to(dtype)


def reduce_all(dtype: torch.dtype, sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Sum, maximum and gathered tensors of each size."""
    with sharing() as ranks:
        assert ranks.segment is not None
        found = []
        for n in sizes:
            x = brought(ranks.rank, dtype, n)
            largest = collectives.all_reduce(x, ranks, "max")
            found.append((collectives.all_reduce(x, ranks), largest, collectives.all_gather(x, ranks)))
            assert torch.equal(x, brought(ranks.rank, dtype, n)), "the input stays as it was"
        return found


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("dtype", shared.DTYPES)
def test_they_give_what_every_rank_brought(pools: RankPools, world_size: int, dtype: torch.dtype) -> None:
    fitting = PLACE // dtype.itemsize
    sizes = (1, 7, 2048, fitting - 1, fitting, 3 * fitting + 5)
    answers = pools.run(world_size, reduce_all, dtype, sizes)
    for number, n in enumerate(sizes):
        parts = torch.stack([brought(rank, dtype, n) for rank in range(world_size)])
        # Added one rank after another in float32 at least, and rounded once.
        wide = parts if dtype.itemsize > 2 else parts.float()
        total = wide[0]
        for part in wide[1:]:
            total = total + part
        for sums, largest, gathered in (answer[number] for answer in answers):
            assert torch.equal(sums, total.to(dtype))
            assert torch.equal(largest, parts.amax(0))
            assert torch.equal(gathered, parts)


def compare_with_gloo(n: int) -> tuple[float, bool]:
    """Return the distance of our sum and gather from the group's own, in float64."""
    with sharing() as ranks:
        x = brought(ranks.rank, torch.float64, n)
        own, expected = collectives.all_reduce(x, ranks), x.clone()
        dist.all_reduce(expected, group=ranks.group)
        plain = dataclasses.replace(ranks, segment=None)
        gathered = torch.equal(collectives.all_gather(x, ranks), collectives.all_gather(x, plain))
        first = torch.equal(collectives.broadcast(x.clone(), ranks), collectives.broadcast(x.clone(), plain))
        return float((own - expected).abs().max()), gathered and first


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_they_give_what_gloo_gives(pools: RankPools, world_size: int) -> None:
    for difference, same in pools.run(world_size, compare_with_gloo, 70_001):
        assert same
        assert difference < 1e-14


def strangers() -> tuple[list[float], list[int]]:
    """Shapes, strides and values that are not plain, and a dtype that goes through the group."""
    with sharing() as ranks:
        wild = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0]) * (1 if ranks.rank else 2)
        strided = torch.arange(12.0).view(3, 4).T
        total = collectives.all_reduce(strided, ranks)
        assert total.shape == (4, 3)
        assert torch.equal(total, strided * ranks.world_size)
        assert collectives.all_reduce(torch.empty(0, 5), ranks).shape == (0, 5)
        assert collectives.all_gather(torch.empty(2, 0), ranks).shape == (ranks.world_size, 2, 0)
        small = collectives.all_reduce(torch.tensor([1, 2], dtype=torch.uint8), ranks)
        return collectives.all_reduce(wild, ranks, "max").tolist(), small.tolist()


def test_unusual_tensors(pools: RankPools) -> None:
    for largest, small in pools.run(3, strangers):
        assert largest[0] != largest[0]
        assert largest[1:] == [float("inf"), -float("inf"), 2.0]
        assert small == [3, 6]


def stepping_out_of_time() -> Tensor:
    """Ranks that come in every order, now one and now another first."""
    with sharing() as ranks:
        total = torch.zeros(3)
        for turn in range(60):
            if turn % ranks.world_size == ranks.rank:
                time.sleep(0.002 if turn % 7 else 0.05)
            total = total + collectives.all_reduce(torch.full((3,), float(turn * (ranks.rank + 1))), ranks)
        return total


@pytest.mark.parametrize("world_size", [2, 4])
def test_who_comes_first_does_not_matter(pools: RankPools, world_size: int) -> None:
    expected = sum(range(60)) * sum(range(world_size + 1))
    for total in pools.run(world_size, stepping_out_of_time):
        assert total.tolist() == [expected] * 3


def generate(folder: Path, split: str | None, share: bool) -> tuple[list[tuple[int, int | None]], Tensor]:
    checkpoint = open_checkpoint(folder)
    asked = [Request(n, [1, 5 + n, 9], 12, Sampling(0)) for n in range(3)]

    def run(ranks: Ranks, **options: Any) -> tuple[list[tuple[int, int | None]], Tensor]:
        partition = Partition.create(checkpoint.args, ranks.world_size, split)
        events = list(Engine(load_model(checkpoint, partition, ranks, torch.float32), VOCAB, **options).run(asked, 2))
        return [(e.index, e.token) for e in events], torch.tensor([e.log_prob for e in events])

    if not share:
        return run(groups.current())
    with sharing() as ranks:
        found = run(ranks)
        torch._dynamo.reset()
        with pytest.MonkeyPatch.context() as patch:
            compile = torch.compile
            patch.setattr(torch, "compile", lambda run, **_: compile(run, fullgraph=True, backend="aot_eager"))
            compiled = run(ranks, compile="on")
    assert compiled[0] == found[0]
    assert (compiled[1] - found[1]).abs().max() < 1e-5
    return found


@pytest.mark.parametrize(("world_size", "split"), [(2, None), (3, None), (4, None), (2, "3,1")])
def test_a_model_says_the_same_either_way(pools: RankPools, tmp_path: Path, world_size: int, split: str | None) -> None:
    folder = write_meta(tmp_path / "model", hf_model("3"))
    plain = pools.run(world_size, generate, folder, split, False)
    for (tokens, log_probs), (expected, wanted) in zip(
        pools.run(world_size, generate, folder, split, True), plain, strict=True
    ):
        assert tokens == expected
        assert (log_probs - wanted).abs().max() < 1e-5


def segment_of(spoil: str, folder: Path) -> tuple[bool, list[str], list[str]]:
    """Return whether memory is shared when one rank cannot, and the files that stay in the folder of segments."""
    with pytest.MonkeyPatch.context() as patch:
        rank = groups.current().rank
        patch.setattr(shared, "FOLDER", folder)
        if spoil == "no kernels" and rank == 1:
            patch.setattr(shared, "load_kernels", lambda: False)
        if spoil == "another machine":
            patch.setattr(groups.socket, "gethostname", lambda: f"host{rank}")
        if spoil == "no room" and rank == 0:
            patch.setattr(os, "posix_fallocate", _refuse)
        if spoil == "processes of its own" and rank == 1:
            patch.setattr(os, "getpid", lambda: 2**22 + 1)  # more than Linux gives
        if spoil == "files of its own" and rank == 1:
            open_segment = shared.open_segment
            patch.setattr(shared, "open_segment", lambda path, *place: open_segment(Path("/dev/shm/nothing"), *place))
        with sharing() as ranks:
            total = collectives.all_reduce(torch.ones(2), ranks)
            return ranks.segment is not None, total.tolist(), sorted(os.listdir(folder))


def _refuse(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "spoil", ["", "no kernels", "another machine", "no room", "files of its own", "processes of its own"]
)
def test_where_one_rank_cannot_all_go_through_the_group(pools: RankPools, spoil: str) -> None:
    # A folder of its own: other tests share memory at the same time.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for is_shared, total, left in pools.run(2, segment_of, spoil, Path(folder)):
            assert is_shared == (spoil == "")
            assert total == [2.0, 2.0]
            assert not [name for name in left if name.startswith("llama-shards")]


def test_one_process_shares_with_nobody() -> None:
    assert groups.share_memory() == groups.current()


def lose_rank_1() -> tuple[bool, str]:
    """Return the error of a rank that enters a collective after another rank has ended."""
    ranks = groups.share_memory()
    collectives.all_reduce(torch.ones(2), ranks)
    if ranks.rank == 1:
        os._exit(9)
    try:
        collectives.all_reduce(torch.ones(2), ranks)
    except RuntimeError as error:
        return is_lost_peer(error), str(error).splitlines()[0]
    return False, "no error"


def test_a_rank_that_is_gone_is_not_waited_for() -> None:
    pool = Pool(2, 2)
    try:
        for pipe in pool.pipes:
            pipe.send((lose_rank_1, ()))
        assert pool.pipes[0].poll(60), "rank 0 waits for ever"
        good, answer = pool.pipes[0].recv()
    finally:
        pool.close()
    assert good, answer
    assert answer == (True, "rank 1 is gone: Connection closed by peer")
