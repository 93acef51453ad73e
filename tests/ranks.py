"""Ranks that stay: one set of processes a world size, shared by all tests."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from torch.distributed import TCPStore

TIMEOUT_S = 300
# What the tests' modules import takes seconds: on Linux it is imported once, in the process that ranks are forked from.
METHOD = "forkserver" if sys.platform == "linux" else "spawn"
PRELOADED = [
    "torch", "torch._inductor.compile_fx", "fairscale.nn.model_parallel",
    "transformers.models.llama.modeling_llama", "peft",
]  # fmt: skip


def _serve(rank: int, world_size: int, model_ranks: int, port: int, pipe: Connection) -> None:
    """A rank: starts the groups, then runs what it is sent."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    import torch

    from llama.parallel import groups

    torch.set_num_threads(1)
    groups.start(torch.device("cpu"), model_ranks)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            function, args = task
            answer = (True, function(*args))
        except Exception:
            answer = (False, traceback.format_exc())
        pipe.send(answer)


class Pool:
    """Processes that are one model's ranks, or several models'."""

    def __init__(self, world_size: int, model_ranks: int) -> None:
        # Held here, as torchrun's agent holds it: a port that was free a moment ago may be somebody else's by now.
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context(METHOD)
        context.set_forkserver_preload(PRELOADED)
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, model_ranks, self.store.port, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(TIMEOUT_S if not answers else 60):
                raise TimeoutError(f"rank {rank} gave no answer; so far: {answers}")
            answers.append(pipe.recv())
        failures = [f"rank {rank}:\n{text}" for rank, (good, text) in enumerate(answers) if not good]
        if failures:
            raise AssertionError("\n".join(failures))
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


class RankPools:
    """The pools of all world sizes, started when first asked for."""

    def __init__(self) -> None:
        self._pools: dict[tuple[int, int], Pool] = {}

    def run(
        self, world_size: int, function: Callable[..., Any], *args: Any, model_ranks: int | None = None
    ) -> list[Any]:
        """Run `function(*args)` on every rank; one rank runs in this process, without groups.

        With `model_ranks`, so many ranks share a model and the others hold copies of it.
        """
        if world_size == 1:
            return [function(*args)]
        key = (world_size, model_ranks or world_size)
        if key not in self._pools:
            self._pools[key] = Pool(*key)
        try:
            return self._pools[key].run(function, args)
        except BaseException:
            # A failure leaves ranks waiting for each other: later tests get fresh ones.
            self._pools.pop(key).close()
            raise

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
