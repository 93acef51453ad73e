"""Counters of what one rank of many allocates and sends, alone in a process.

Torch's profiler sees every allocation and release of torch's allocator, temporaries inside an operator included.
Allocations of libraries below torch (oneDNN's scratchpads, gloo's buffers) are not counted.

The rank's process group takes every collective for done at once. "fake" is torch's own group of that kind, which
leaves results as they are. "counting" also keeps what the rank asked for, whether the program calls
`torch.distributed`, its functional collectives, or a compiled graph with them; a gather finds the rank's own part in
every place, so that the program goes on with numbers that make sense.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from llama.checkpoint.load import materialise
from llama.model import Transformer
from llama.offload import offload_blocks
from llama.parallel.groups import Ranks
from llama.parallel.partition import Partition
from llama.quantization.layers import quantize_layers
from llama.quantization.scheme import Scheme

# The profiler would tell on stderr when it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

# -- memory ----------------------------------------------------------------------------------------

STAGE = "counted stage"


def peak_bytes(function: Callable[[], Any]) -> int:
    """Run `function`; return the most bytes alive at once meanwhile, beyond those alive before."""
    return peaks(function)[0]


def peaks(*functions: Callable[[], Any]) -> list[int]:
    """Run the functions in turn; return the most bytes alive at once during each, beyond those before the first."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as recorded:
        for function in functions:
            with record_function(STAGE):
                function()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() in ("[memory]", STAGE)]
    alive, found = 0, []
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == STAGE:
            found.append(alive)
            continue
        alive += event.nbytes()
        if found:
            found[-1] = max(found[-1], alive)
    return found


def empty_shard(
    partition: Partition, ranks: Ranks, dtype: torch.dtype, scheme: Scheme | None = None, n_offloaded: int = 0
) -> Transformer:
    """Return a rank's shard with uninitialised weights, whose values do not change what a run takes."""
    model = Transformer(partition.args, partition, ranks, device="meta", dtype=dtype)
    if scheme is not None:
        quantize_layers(model, scheme)
    offload_blocks(model, n_offloaded)
    materialise(model, ranks.device)
    return model.eval()


def held_bytes(model: Transformer) -> int:
    """Return the bytes of the storages behind a model's parameters and buffers, each counted once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


# -- collectives -----------------------------------------------------------------------------------

# A collective's name and the bytes of its result on one rank, to how often the rank asked for it.
Calls = Counter[tuple[str, int]]


class _Done(dist.Work):
    """Work that is done when it is asked for."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._future: Any = torch.futures.Future()
        self._future.set_result(list(tensors))

    def wait(self, timeout: Any = None) -> bool:
        """Return at once."""
        return True

    def get_future(self) -> Any:
        """Return a future that already holds the tensors."""
        return self._future


# The methods of torch's class are overloaded; the forms below are those that torch calls.
_Group: Any = dist.ProcessGroup


class CountingGroup(_Group):
    """A process group that counts; a collective without a method below raises.

    Attributes:
        calls: the collectives that the rank has asked for so far.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(rank, world_size)
        self.calls: Calls = Counter()

    @property
    def group_name(self) -> str:
        """The name by which compiled graphs find the group."""
        return str(dist.distributed_c10d._world.pg_names[self])

    def getBackendName(self) -> str:  # noqa: N802  (torch's name)
        """See `torch.distributed.ProcessGroup`."""
        return "counting"

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> _Done:
        """Leave the tensors as they are: the sum is the rank's own part."""
        return self._done("all-reduce", tensors)

    def broadcast(self, tensors: Sequence[Tensor], opts: Any = None) -> _Done:
        """Leave the tensors as they are: what was sent is what is here."""
        return self._done("broadcast", tensors)

    def all_gather_single(self, output: Tensor, part: Tensor, opts: Any = None) -> _Done:
        """Write the rank's own part into every rank's place of `output`."""
        output.view(-1, part.numel()).copy_(part.reshape(1, -1))
        return self._done("all-gather", [output])

    def all_gather_single_coalesced(self, outputs: Sequence[Tensor], parts: Sequence[Tensor], opts: Any = None) -> Any:
        """Gather several tensors, as functional collectives do."""
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
    """Take the place of `rank` among `world_size` ranks on the CPU, without the others; no other group may be open.

    Args:
        rank, world_size: the place; one rank of one needs no group.
        backend: "fake" or "counting"; with the latter, the `group` of the yielded ranks is a `CountingGroup`.
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
