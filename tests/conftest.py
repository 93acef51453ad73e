"""Fixtures that every test may use; the tools behind them stand in support.py and ranks.py."""

import os
from collections.abc import Callable, Iterator
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

# The same examples in every run, however long one takes on a busy machine.
hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need a card run only where one is."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(min(2, os.cpu_count() or 1))


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
