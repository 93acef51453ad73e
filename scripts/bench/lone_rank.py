"""One rank of many, alone in a process: for counting what it holds and what it sends.

Its process group takes every collective for done at once. "fake" is torch's own group of that kind, which leaves
results as they are. "counting" also keeps what was asked of it, whether the program calls `torch.distributed`, its
functional collectives, or a compiled graph with them; a gather finds this rank's own part in every place, so that the
program goes on with numbers that make sense.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llama.parallel.groups import Ranks

# What a collective is called and the bytes of its result on one rank, to how often it was asked for.
Calls = Counter[tuple[str, int]]


class _Done(dist.Work):
    """Work that is done when it is asked for."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._future: Any = torch.futures.Future()
        self._future.set_result(list(tensors))

    def wait(self, timeout: Any = None) -> bool:
        """At once."""
        return True

    def get_future(self) -> Any:
        """Of the tensors, which are there."""
        return self._future


# Its methods are overloaded; the forms below are those that torch calls.
_Group: Any = dist.ProcessGroup


class CountingGroup(_Group):
    """A process group that counts; a collective that is not written down here raises.

    Attributes:
        calls: what was asked for so far.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(rank, world_size)
        self.calls: Calls = Counter()

    @property
    def group_name(self) -> str:
        """By which compiled graphs find it."""
        return str(dist.distributed_c10d._world.pg_names[self])

    def getBackendName(self) -> str:  # noqa: N802  (torch's name)
        """See `torch.distributed.ProcessGroup`."""
        return "counting"

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> _Done:
        """In place: the sum is this rank's own part."""
        return self._done("all-reduce", tensors)

    def broadcast(self, tensors: Sequence[Tensor], opts: Any = None) -> _Done:
        """In place: what was sent is what is here."""
        return self._done("broadcast", tensors)

    def all_gather_single(self, output: Tensor, part: Tensor, opts: Any = None) -> _Done:
        """Every rank's part is this one's."""
        output.view(-1, part.numel()).copy_(part.reshape(1, -1))
        return self._done("all-gather", [output])

    def all_gather_single_coalesced(self, outputs: Sequence[Tensor], parts: Sequence[Tensor], opts: Any = None) -> Any:
        """What functional gathers call."""
        return [self.all_gather_single(*pair) for pair in zip(outputs, parts, strict=True)][-1]

    # Until torch 2.12 both had other names.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def _done(self, name: str, results: Sequence[Tensor]) -> _Done:
        self.calls.update((name, result.nbytes) for result in results)
        return _Done(results)


def _make(store: Any, rank: int, world_size: int, timeout: Any) -> CountingGroup:
    return CountingGroup(rank, world_size)


@contextlib.contextmanager
def alone(rank: int, world_size: int, backend: str = "fake") -> Iterator[Ranks]:
    """The place of `rank` among `world_size` on the CPU, the others not there; no other group may be open.

    Args:
        rank, world_size: the place; one rank of one needs no group.
        backend: "fake" or "counting"; with the latter, the ranks' `group` is a `CountingGroup`.
    """
    if world_size == 1:
        yield Ranks()
        return
    if backend == "fake":
        from torch.testing._internal.distributed import fake_pg

        store: Any = fake_pg.FakeStore()
    else:
        store = dist.HashStore()
        if not hasattr(dist.Backend, "COUNTING"):
            dist.Backend.register_backend("counting", _make, devices=["cpu"])
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        group = dist.group.WORLD
        yield Ranks(rank, world_size, group, group)
    finally:
        dist.destroy_process_group()
