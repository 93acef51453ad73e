"""Exchange between ranks beside tensors: errors, objects, who is there."""

import os
import time
from collections.abc import Callable

import pytest
import torch

from llama import errors
from llama.errors import CheckpointError, LlamaError, PartitionError
from llama.parallel import groups, store

CPU = torch.device("cpu")


def meet_error(at: tuple[int, ...], kind: str, text: str) -> tuple[str, str, bool]:
    """Return this rank's error from a phase in which the ranks `at` fail, and whether groups work afterwards."""
    rank = groups.current().rank
    try:
        with groups.phase("a test"):
            if rank in at:
                raise getattr(errors, kind)(f"{text} {rank}")
    except LlamaError as error:
        return type(error).__name__, str(error), groups.gather_objects(rank) == [0, 1, 2]
    return "", "", groups.gather_objects(rank) == [0, 1, 2]


@pytest.mark.parametrize(
    ("at", "kind", "text"),
    [
        ((0,), "LlamaError", "plain"),
        ((1,), "CheckpointError", "shard 3: cut off"),
        ((2,), "TokenizerError", "ünï: 日本\nlines"),
        ((2, 1), "PartitionError", "two at a time"),
        ((0, 1, 2), "DeviceError", "all"),
    ],
)
def test_an_error_of_any_rank_reaches_all(
    on_ranks: Callable[..., list], at: tuple[int, ...], kind: str, text: str
) -> None:
    heard = on_ranks(3, meet_error, at, kind, text)
    assert heard == [(kind, f"{text} {min(at)}", True)] * 3


def test_phases_without_error_pass(on_ranks: Callable[..., list]) -> None:
    assert on_ranks(3, meet_error, (), "LlamaError", "") == [("", "", True)] * 3


def half_surrogate() -> str:
    try:
        with groups.phase("names"):
            if groups.current().rank == 1:
                raise CheckpointError("no file caf\udce9")
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_name_that_is_not_unicode_can_be_told(on_ranks: Callable[..., list]) -> None:
    assert on_ranks(2, half_surrogate)[0] == "no file caf\\udce9"


def exchange() -> tuple[list[object], object, object]:
    rank = groups.current().rank
    gathered = groups.gather_objects({"rank": rank, "pid": os.getpid()})
    return gathered, groups.broadcast_object(f"from {rank}"), groups.broadcast_object(None if rank == 0 else 1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_objects_travel(on_ranks: Callable[..., list], world_size: int) -> None:
    answers = on_ranks(world_size, exchange)
    for gathered, text, nothing in answers:
        assert gathered == answers[0][0]
        assert [entry["rank"] for entry in gathered] == list(range(world_size))
        assert (text, nothing) == ("from 0", None)


def describe() -> tuple[int, int, int, bool, list[int]]:
    """Place, size and whether a second start gives the same ranks."""
    ranks = groups.current()
    again = groups.start(CPU)
    return ranks.rank, ranks.world_size, torch.distributed.get_world_size(ranks.group), again is ranks, (
        store.lost_ranks()
    )  # fmt: skip


def test_every_rank_knows_its_place(on_ranks: Callable[..., list]) -> None:
    assert on_ranks(3, describe) == [(rank, 3, 3, True, []) for rank in range(3)]


def restart() -> str:
    with pytest.raises(PartitionError) as refused:
        groups.start(CPU, model_parallel_size=1)
    return str(refused.value)


def test_groups_are_started_for_one_size(on_ranks: Callable[..., list]) -> None:
    assert on_ranks(2, restart) == ["the groups were started for 2 ranks, not 1"] * 2


def wait_on_the_store() -> float:
    """Seconds that the listening thread's question takes while the main thread waits for rank 0."""
    if groups.current().rank == 0:
        time.sleep(1.5)
    taken = []
    import threading

    def ask() -> None:
        time.sleep(0.3)
        start = time.monotonic()
        store.lost_ranks()
        taken.append(time.monotonic() - start)

    thread = threading.Thread(target=ask)
    thread.start()
    with groups.phase("slow"):
        pass
    thread.join()
    return taken[0]


def test_a_rank_that_waits_can_still_be_asked_who_is_lost(on_ranks: Callable[..., list]) -> None:
    assert on_ranks(2, wait_on_the_store)[1] < 0.7


@pytest.mark.parametrize("size", [0, -1, 2, 3])
def test_a_size_that_does_not_divide_is_refused(size: int) -> None:
    with pytest.raises(PartitionError, match=f"model_parallel_size {size} does not divide the 1 processes"):
        groups.model_size(size)


def test_sizes_that_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert [groups.model_size(size) for size in (None, 1, 2, 3, 6)] == [6, 1, 2, 3, 6]
    with pytest.raises(PartitionError, match="4 does not divide the 6 processes"):
        groups.model_size(4)


def test_one_process_needs_no_groups() -> None:
    ranks = groups.start(CPU)
    assert (ranks.rank, ranks.world_size, ranks.group) == (0, 1, None)
    assert not torch.distributed.is_initialized()
    assert store.line() is None
    groups.stop()


@pytest.mark.parametrize(
    ("devices", "backend"),
    [
        (["a cuda:0", "a cuda:1"], "nccl"),
        (["a cuda:0", "b cuda:0"], "nccl"),
        (["a cuda:0", "a cuda:0"], "gloo"),
        (["a cuda:0", "a cuda:1", "a cuda:0"], "gloo"),
        (["a cpu", "a cpu"], "gloo"),
        (["a cpu", "b cpu"], "gloo"),
        (["a cuda:0", "b cpu"], "gloo"),
    ],
)
def test_nccl_only_on_cards_of_ones_own(monkeypatch: pytest.MonkeyPatch, devices: list[str], backend: str) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    assert groups.choose_backend(devices) == backend


def test_what_counts_as_a_lost_peer() -> None:
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4"
    assert store.is_lost_peer(RuntimeError(gloo))
    assert store.is_lost_peer(torch.distributed.DistNetworkError("recvValue failed"))
    assert not store.is_lost_peer(RuntimeError("[gloo/allreduce.cc] invalid size"))
    assert not store.is_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not store.is_lost_peer(LlamaError("Connection closed by peer"))
