"""Fixtures that every test may use; the tools behind them stand in support.py and ranks.py."""

import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# As llama/env.py has it, which comes too late here: OpenMP reads it when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import hypothesis
import torch
from launch import Command
from ranks import RankPools

from llama.kernels import products

ROOT = Path(__file__).parent.parent
# The number of this process among pytest's workers, which share the cores; None without workers.
WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER is not None:
    # Workers start torchrun at the same time: each of them has a port of its own in place of torchrun's default.
    os.environ.setdefault("PET_MASTER_PORT", str(29500 + int(WORKER.removeprefix("gw"))))
    # Each worker, with all that it starts, has a core of its own: OpenMP's threads that wait for a core which another
    # worker holds make a run of seconds one of minutes.
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(WORKER.removeprefix("gw")) % len(cores)]})

# The same examples in every run, however long one takes on a busy machine.
hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("repeatable")


# Fixtures that start processes. A test that uses one of them is slow, except where its world size is 1.
LAUNCHING = {"on_ranks", "pools", "tuned_tiny"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests that need a card where there is none, and mark those that start ranks.

    The files with most slow tests come first, so that the workers, each of which takes whole files, end at about the
    same time. `tuned_tiny` is made by the worker that asks for it: one file alone does.
    """
    n_slow: dict[Path, int] = {}
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if fixtures & LAUNCHING and parameters.get("world_size") != 1:
            item.add_marker("slow")
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        n_slow[item.path] = n_slow.get(item.path, 0) + (item.get_closest_marker("slow") is not None)
    if WORKER is not None:
        items.sort(key=lambda item: -n_slow[item.path])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """Let a test fail that starts a Python process and is not marked `slow`, so that `make fast` stays fast."""
    start = subprocess.Popen.__init__

    def refused(process: subprocess.Popen, args: Any, *others: Any, **options: Any) -> None:
        words = [args] if isinstance(args, str) else map(str, args)
        assert sys.executable not in words, "a test that starts a Python process needs pytest.mark.slow"
        start(process, args, *others, **options)

    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("slow") is None:
            patch.setattr(subprocess.Popen, "__init__", refused)
        return (yield)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small tensors are slower on two threads than on one, and workers share the cores."""
    torch.set_num_threads(1)


@pytest.fixture
def two_threads(_one_thread: None) -> None:
    """Kernels and plans of memory depend on the threads: their tests run on two of them."""
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _kernels_of_one_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that enables the CPU's kernels does not enable them for those after it."""
    monkeypatch.setattr(products, "_loaded", False)


@pytest.fixture(scope="session")
def pools() -> Iterator[RankPools]:
    pools = RankPools()
    yield pools
    pools.close()


@pytest.fixture(scope="session")
def on_ranks(pools: RankPools) -> Callable[..., list]:
    """`on_ranks(world_size, function, *args)` runs it on every rank and returns what each gave, in order.

    The ranks of a world size are started once and serve all tests.
    """
    return pools.run


@pytest.fixture
def open_gguf(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Open a file in llama.cpp; see `gguf_judge.opened`."""
    from gguf_judge import opened

    yield from opened(monkeypatch)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real tokenizers and records that LLAMA_TEST_DATA names."""
    folder = os.environ.get("LLAMA_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("LLAMA_TEST_DATA names no folder")
    return Path(folder)


@pytest.fixture(scope="session")
def tuned_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `python ft_main.py` makes of the bundled model and records: the real command, once for all tests."""
    out = tmp_path_factory.mktemp("tuned") / "saved"
    with Command(["--output_dir", out], script=ROOT / "ft_main.py") as command:
        done = command.finish(timeout=550)
    assert done.code == 0, done.err
    assert f"--tuning_ckpt_path {out}" in done.out
    return out


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT
