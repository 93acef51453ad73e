"""Counts of the benchmarks against those of real ranks and arithmetic by hand."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from counting import frozen_shard
from sharing import sharing
from torch.profiler import ProfilerActivity, profile

from llama.checkpoint.load import cut_model
from llama.checkpoint.table import n_unique_params
from llama.errors import LlamaError
from llama.parallel.collectives import all_gather, all_reduce
from llama.parallel.partition import Partition
from llama.quantization.scheme import Scheme
from scripts.bench import collectives, memory
from scripts.bench.counters import alone, empty_shard, held_bytes, peaks
from scripts.bench.limits import LINKS, Link, collective_seconds, parse_links
from scripts.bench.report import panels
from scripts.bench.weights import TINY, prepared_weights

pytestmark = pytest.mark.usefixtures("two_threads")

# Four layers: two all-reduces each, and the embedding's.
REDUCES = 2 * TINY.n_layers + 1


def real_calls(batch_size: int, prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    """Count the collectives of a run on real ranks, by kind, as torch's profiler sees them."""
    model = frozen_shard(TINY, torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
        collectives.generate(model, batch_size, prompt_tokens, new_tokens)
    kinds = {"allreduce": "all-reduce", "allgather": "all-gather", "broadcast": "broadcast"}
    found: Counter[str] = Counter()
    for event in recorded.key_averages():
        name = event.key.removeprefix("c10d::").replace("_", "")
        kind = next((kind for start, kind in kinds.items() if name.startswith(start)), None)
        if event.key.startswith("c10d::"):
            found[kind or event.key] += event.count
    return dict(found)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_collectives_are_those_of_real_ranks(on_ranks: Callable[..., list], batch_size: int) -> None:
    counted = collectives.count(Partition.create(TINY, 2), (batch_size,), 16)
    step = counted["decode", batch_size]
    assert step == {
        ("all-reduce", batch_size * TINY.dim * 2): REDUCES,
        # The best token of each rank with its score, logit and id, and two softmax denominators, in float32.
        ("all-gather", 2 * batch_size * 5 * 4): 1,
        ("broadcast", 2 * batch_size * 4): 1,
    }
    one, two = (on_ranks(2, real_calls, batch_size, 8, new_tokens)[0] for new_tokens in (2, 3))
    assert Counter(two) - Counter(one) == {"all-reduce": REDUCES, "all-gather": 1, "broadcast": 1}
    assert counted["prefill", 1][("all-reduce", 16 * TINY.dim * 2)] == REDUCES
    assert all(collectives.is_expected(calls, TINY, 2) for calls in counted.values())


def test_a_stranger_is_seen() -> None:
    calls = collectives.count(Partition.create(TINY, 2), (1,), 16)["decode", 1]
    for kind in ("all-reduce", "broadcast", "barrier"):
        assert not collectives.is_expected(calls + Counter({(kind, 8): 1}), TINY, 2)


def test_compiled_collectives_are_counted() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return all_gather(all_reduce(x, ranks), ranks) + 1

    with alone(1, 3, "counting") as ranks, torch.inference_mode():
        x = torch.ones(4)
        eager = step(x)
        calls = Counter(ranks.group.calls)
        assert calls == {("all-reduce", 16): 1, ("all-gather", 48): 1}
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
        assert ranks.group.calls == calls + calls
    torch.testing.assert_close(compiled, eager)
    assert not dist.is_initialized()


def test_costs_by_hand() -> None:
    link = Link(latency=1e-3, bandwidth=1e6)
    assert collective_seconds("all-reduce", 4000, 2, link) == pytest.approx(2 * (1e-3 + 2e-3))
    assert collective_seconds("all-gather", 4000, 4, link) == pytest.approx(3 * (1e-3 + 1e-3))
    assert collective_seconds("broadcast", 4000, 4, link) == pytest.approx(3e-3 + 4e-3)


def test_links_by_name() -> None:
    assert parse_links(None) == LINKS
    assert parse_links("PCIe 3 x8, mine=2us@50") == {"PCIe 3 x8": LINKS["PCIe 3 x8"], "mine": Link(2e-6, 50e9)}
    with pytest.raises(LlamaError, match="no link is called 'mine=20@50'"):
        parse_links("mine=20@50")


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "group_size"), [(None, 0), ("int8", 0), ("int4", 64)])
def test_weights_and_cache_to_the_byte(kind: str | None, group_size: int) -> None:
    scheme = None if kind is None else Scheme.create(kind, group_size or 32)
    partition = cut_model(TINY, scheme, 2)
    found = memory.count(partition, 1, memory.MemoryCase(2, 3, "any"), 16, scheme)
    tables = 512 * 256  # half of the vocabulary
    linears = 4 * (2 * 256 * (128 + 64) + 3 * 256 * len(partition.ffn[1]))
    norms = (2 * 4 + 1) * 256
    rope = 16 * 4
    if kind is None:
        assert found.weights == 2 * (2 * tables + linears + norms) + rope
    else:
        rows = 4 * (128 + 2 * 64 + 256 + 2 * len(partition.ffn[1]) + 256)
        per_value, scales = (1, 4 * rows) if kind == "int8" else (0.5, 2 * linears // 64)
        output = tables + 4 * 512
        assert found.weights == 2 * (tables + norms) + rope + output + linears * per_value + scales
    assert found.cache == 2 * 4 * 3 * 16 * 64 * 2
    assert 0 < found.decode < found.prefill


def real_count(tokens: int, batch_size: int) -> list[int]:
    """Count what prefill and decode take on real ranks, in bytes.

    The ranks share memory where they can: gloo's thread now and then lets go of a buffer a moment late.
    """
    from llama.generation.engine import Engine, Request
    from llama.generation.sampling import Sampling

    with sharing():
        model = frozen_shard(TINY, memory.DTYPE)
        requests = [Request(index, [1] * (tokens - 2), 2, Sampling(temperature=0)) for index in range(batch_size)]
        events = Engine(model, TINY.vocab_size).run(requests, batch_size)
        held = model.new_cache(batch_size, tokens).nbytes
        return [n - held for n in peaks(*[lambda: memory.consume(events, batch_size)] * 2)]


def test_activations_are_those_of_real_ranks(on_ranks: Callable[..., list]) -> None:
    partition = Partition.create(TINY, 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks: attention on a CPU takes memory for each thread
    found = memory.count(partition, 0, memory.MemoryCase(2, 4, "bf16"), 64, None)
    torch.set_num_threads(threads)
    runs = [on_ranks(2, real_count, 64, 4)[0] for _ in range(3)]
    assert min(run[0] for run in runs) == pytest.approx(found.prefill, rel=0.01)
    assert min(run[1] for run in runs) == pytest.approx(found.decode, rel=0.05)


def test_an_empty_shard_is_a_loaded_one() -> None:
    with alone(0, 1) as ranks:
        model = empty_shard(Partition.create(TINY, 1), ranks, torch.bfloat16)
    assert held_bytes(model) == 2 * n_unique_params(TINY) + model.rope_frequencies.nbytes


def test_a_rank_of_weight_3_holds_three_times_as_much() -> None:
    split = memory.split_report(TINY, "3,1", 2, 32)
    assert split["misfit_bytes"] <= split["unit_bytes"]
    assert split["shares"][0] / split["shares"][1] == pytest.approx(3, rel=0.05)
    assert sum(split["shares"]) == pytest.approx(1)


def test_stages_are_counted_apart() -> None:
    kept: list[torch.Tensor] = []
    first, second = peaks(lambda: kept.append(torch.zeros(1000)), lambda: torch.zeros(500))
    assert (first, second) == (4000, 6000)


def test_without_matplotlib_there_is_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with panels(str(tmp_path / "chart.png"), 1, 1) as rows:
        assert not rows
    assert "no chart" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_weights_that_were_kept_are_used_again(tmp_path: Path) -> None:
    folder = str(tmp_path / "w")
    written = set()
    for _ in range(2):
        with prepared_weights("tiny", None, torch.bfloat16, folder, 1) as weights:
            written.add((Path(weights.ours) / "model.safetensors").stat().st_mtime_ns)
    assert len(written) == 1
    with (
        pytest.raises(LlamaError, match="holds another model"),
        prepared_weights("110m", None, torch.bfloat16, folder, 1),
    ):
        pass
