"""Memory of the cards, of the host within its cgroup's limits, or as a person gives it."""

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
        name: of the card or the machine.
        nbytes: free for the model.
        ranks: that draw on the pool; a rank is named twice where two copies of the model run.
        is_host: true for the main memory beside cards.
    """

    name: str
    nbytes: int
    ranks: tuple[int, ...]
    is_host: bool = False


@dataclass(frozen=True)
class Memory:
    """The pools of a run, dealt out to any number of ranks.

    Args:
        names, sizes: of the pools; sizes in bytes.
        places: the pool of each process; further processes take the pools in turn.
        grows: true where a further process brings a further pool like the last (cards that a person
            named) rather than sharing the pools that are there.
        copies: of the model, each with ranks of its own.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    places: tuple[int, ...] = ()
    grows: bool = False
    copies: int = 1

    def pools(self, n_ranks: int) -> list[Pool]:
        """Return the pools with their ranks for a model on `n_ranks`; pools without a rank are left out."""
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
    """Return the memory that a person gives: one size for all ranks, or one a rank.

    Raises:
        LlamaError: for another number of sizes, or a text that is no size.
    """
    sizes = [parse_bytes(part) for part in text.split(",")]
    if len(sizes) == 1:
        sizes *= n_ranks
    if len(sizes) != n_ranks:
        raise LlamaError(f"memory {text!r} has {len(sizes)} sizes for {n_ranks} ranks: give one a rank, or one for all")
    return Memory(tuple(f"rank {rank}" for rank in range(n_ranks)), tuple(sizes), grows=True)


def machine_memory(device: torch.device, n_started: int = 0) -> Memory:
    """Return all cards of this machine, which local ranks take in turn, or its main memory.

    Args:
        device: of the run.
        n_started: processes that will run besides this one; each takes some main memory before it holds a model.
    """
    if device.type != "cuda":
        itself = psutil.Process().memory_full_info().uss if n_started else 0
        return Memory(("this machine",), (max(0, host_bytes() - n_started * itself),))
    count = torch.cuda.device_count()
    return Memory(tuple(f"card {n}" for n in range(count)), tuple(card_bytes(n) for n in range(count)))


def own_pool(device: torch.device) -> tuple[str, int]:
    """Return name and bytes of this process's memory; processes that share memory return the same name."""
    host = socket.gethostname()
    if device.type != "cuda":
        return host, host_bytes()
    index = device.index or 0
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", index)
    return f"{host}/{uuid}", card_bytes(index)


def joined_memory(pools: Sequence[tuple[str, int]], copies: int) -> Memory:
    """Return the memory of a run from each process's `own_pool`.

    Processes that share memory may measure it differently: the smallest size counts.
    """
    names = list(dict.fromkeys(name for name, _ in pools))
    sizes = [min(size for other, size in pools if other == name) for name in names]
    return Memory(tuple(names), tuple(sizes), tuple(names.index(name) for name, _ in pools), copies=copies)


def card_bytes(index: int) -> int:
    """Return the bytes of a card that a new tensor may take: free ones, and those that torch keeps for reuse here."""
    free, _ = torch.cuda.mem_get_info(index)
    return free + torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)


def host_bytes() -> int:
    """Return the available bytes of main memory, within the limits of this process's cgroups."""
    return min([psutil.virtual_memory().available, *cgroup_rooms()])


def cgroup_rooms(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> list[int]:
    """Return the bytes left under each memory limit of this process's cgroup and those above it."""
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
    """Return the bytes that one cgroup leaves; None without a limit.

    Pages of files count as used, but are given up when memory is asked for.
    """
    try:
        allowed = int((folder / limit).read_text())  # "max" is no number: no limit
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return max(0, allowed - used + sum(int(stat.get(name, 0)) for name in cached))
