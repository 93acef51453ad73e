"""The memory that is there: of the cards, of the host within its cgroup's limits, or as a person says."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from llama.errors import LlamaError
from llama.sizes import parse_bytes

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Pool:
    """Memory that one or several ranks draw on.

    Args:
        name: the card or the machine.
        nbytes: what is there for the model.
        ranks: those that draw on it; a rank is named twice where two copies of the model run.
        is_host: whether it is the main memory beside cards.
    """

    name: str
    nbytes: int
    ranks: tuple[int, ...]
    is_host: bool = False


@dataclass(frozen=True)
class Memory:
    """The pools of a run, and how they are dealt out at any number of ranks.

    Args:
        names, sizes: of the pools; sizes in bytes.
        places: the pool of each process; processes beyond go on in turn.
        grows: whether a further process brings a further pool, like the last (cards that a person
            named), rather than sharing those that are there.
        copies: of the model, each with ranks of its own.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    places: tuple[int, ...] = ()
    grows: bool = False
    copies: int = 1

    def pools(self, n_ranks: int) -> list[Pool]:
        """Who draws on what when the model has `n_ranks`; pools without a rank are left out."""
        ranks: dict[int, list[int]] = {}
        for process in range(n_ranks * self.copies):
            ranks.setdefault(self._place(process), []).append(process % n_ranks)
        last = len(self.sizes) - 1
        return [
            Pool(self.names[place] if place <= last else f"rank {place}", self.sizes[min(place, last)], tuple(who))
            for place, who in ranks.items()
        ]

    def _place(self, process: int) -> int:
        if process < len(self.places):
            return self.places[process]
        return process if self.grows else process % len(self.sizes)


def given_memory(text: str, n_ranks: int) -> Memory:
    """The memory that a person says each rank has: one size for all, or one a rank.

    Raises:
        LlamaError: for another number of sizes, or something that is none.
    """
    sizes = [parse_bytes(part) for part in text.split(",")]
    if len(sizes) == 1:
        sizes *= n_ranks
    if len(sizes) != n_ranks:
        raise LlamaError(f"memory {text!r} has {len(sizes)} sizes for {n_ranks} ranks: give one a rank, or one for all")
    return Memory(tuple(f"rank {rank}" for rank in range(n_ranks)), tuple(sizes), grows=True)


def machine_memory(device: torch.device, n_started: int = 0) -> Memory:
    """All cards of this machine, or its main memory; local ranks take the cards in turn.

    Args:
        device: which of the two.
        n_started: processes that will run besides this one; each takes some main memory before it holds a model.
    """
    if device.type != "cuda":
        itself = psutil.Process().memory_full_info().uss if n_started else 0
        return Memory(("this machine",), (max(0, host_bytes() - n_started * itself),))
    count = torch.cuda.device_count()
    return Memory(tuple(f"card {n}" for n in range(count)), tuple(card_bytes(n) for n in range(count)))


def own_pool(device: torch.device) -> tuple[str, int]:
    """A name of what this process draws on, the same for those that share it, and its bytes."""
    host = socket.gethostname()
    if device.type != "cuda":
        return host, host_bytes()
    index = device.index or 0
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", index)
    return f"{host}/{uuid}", card_bytes(index)


def joined_memory(pools: Sequence[tuple[str, int]], copies: int) -> Memory:
    """The memory of a run from each process's `own_pool`; what is shared is as large as the least told of it."""
    names = list(dict.fromkeys(name for name, _ in pools))
    sizes = [min(size for other, size in pools if other == name) for name in names]
    return Memory(tuple(names), tuple(sizes), tuple(names.index(name) for name, _ in pools), copies=copies)


def card_bytes(index: int) -> int:
    """What a new tensor may take on a card: free bytes, and those that torch keeps for reuse here."""
    free, _ = torch.cuda.mem_get_info(index)
    return free + torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)


def host_bytes() -> int:
    """What is available of the host's main memory, and of what this process's cgroups leave."""
    return min([psutil.virtual_memory().available, *cgroup_rooms()])


def cgroup_rooms(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> list[int]:
    """Bytes left under each memory limit of this process's cgroup and those above it; empty without limits."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []  # not Linux
    rooms = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root, ("memory.max", "memory.current", ("active_file", "inactive_file"))
        elif "memory" in controllers.split(","):
            top = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))
        else:
            continue
        # In a container the path may be the host's: then the group stands at the top.
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            room = _room(folder, *names)
            rooms += [] if room is None else [room]
            if folder == top:
                break
    return rooms


def _room(folder: Path, limit: str, usage: str, cached: tuple[str, ...]) -> int | None:
    """What one cgroup leaves; pages of files count as used, but are given up when memory is asked for."""
    try:
        allowed = int((folder / limit).read_text())  # "max" is no number: no limit
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return max(0, allowed - used + sum(int(stat.get(name, 0)) for name in cached))
