"""Decode steps started ahead, compiled or not: the same tokens as one after another, eagerly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import VOCAB, hf_model, write_meta

from llama.checkpoint.load import load_model
from llama.checkpoint.source import open_checkpoint
from llama.errors import LlamaError
from llama.generation import steps
from llama.generation.engine import Engine, Event, Request
from llama.generation.sampling import Sampling
from llama.parallel import groups
from llama.parallel.partition import Partition

PROMPTS = [[1, 5, 9, 30], [1, 77], [1, *range(100, 140)], [1, 8, 8, 8, 8, 8], [1, 3]]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_meta(tmp_path_factory.mktemp("steps"), hf_model("3"))


def engine(folder: Path, split: str | None = None, **options: Any) -> Engine:
    checkpoint, ranks = open_checkpoint(folder), groups.current()
    partition = Partition.create(checkpoint.args, ranks.world_size, split)
    return Engine(load_model(checkpoint, partition, ranks, torch.float32), VOCAB, **options)


def requests(temperature: float, stop: frozenset[int] = frozenset()) -> list[Request]:
    lengths = (12, 30, 7, 1, 18)
    return [
        Request(number, prompt, n_new, Sampling(temperature, 0.9, seed=3), stop, noise_index=number)
        for number, (prompt, n_new) in enumerate(zip(PROMPTS, lengths, strict=True))
    ]


def told(events: list[Event]) -> dict[int, list[tuple[int | None, str | None]]]:
    found: dict[int, list[tuple[int | None, str | None]]] = {}
    for event in events:
        found.setdefault(event.index, []).append((event.token, event.finish_reason))
    return found


def log_probs(events: list[Event]) -> torch.Tensor:
    return torch.tensor([event.log_prob for event in sorted(events, key=lambda e: e.index)])


@pytest.mark.parametrize("slots", [1, 3, 5])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_step_started_ahead_changes_nothing(model_folder: Path, slots: int, temperature: float) -> None:
    plain, ahead = engine(model_folder, look_ahead=False), engine(model_folder, look_ahead=True)
    expected = list(plain.run(requests(temperature), slots))
    # Tokens that come in the middle of texts end them there: rows leave while a step for them is under way.
    stop = frozenset(event.token for event in expected[9::7] if event.token is not None)
    assert stop
    for asked in (requests(temperature), requests(temperature, stop)):
        assert told(list(ahead.run(asked, slots))) == told(list(plain.run(asked, slots)))


def run_compiled(folder: Path, split: str | None, backend: str, slots: tuple[int, ...]) -> torch.Tensor:
    """How far a compiled engine's log-probabilities differ from an eager one's, over the same tokens."""
    torch._dynamo.reset()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        compile = torch.compile
        if backend != "inductor":  # traces and checks the same graph, and runs its pieces eagerly
            patch.setattr(torch, "compile", lambda run, **_: compile(run, fullgraph=True, backend=backend))
        plain, compiled = engine(folder, split), engine(folder, split, compile="on")
        differences = []
        for n_slots in slots:
            asked = requests(0.0)[: n_slots + 1]
            expected, found = (list(one.run(asked, n_slots)) for one in (plain, compiled))
            assert told(expected) == told(found)
            differences.append((log_probs(expected) - log_probs(found)).abs().max())
    assert compiled.steps.compiled
    return torch.stack(differences).max()


@pytest.mark.parametrize(
    ("world_size", "split", "backend", "slots"),
    [
        (1, None, "inductor", (1, 3)),  # one row at a time; several, fewer and fewer
        (2, "3,1", "inductor", (1,)),
        (2, None, "aot_eager", (3,)),
        # One graph each: that several follow each other has nothing to do with the number of ranks.
        (3, None, "aot_eager", (1,)),
        (4, "3,1,2,2", "aot_eager", (1,)),
    ],
)
def test_compiled_gives_what_eager_gives(
    on_ranks: Any, model_folder: Path, world_size: int, split: str | None, backend: str, slots: tuple[int, ...]
) -> None:
    for difference in on_ranks(world_size, run_compiled, model_folder, split, backend, slots):
        assert difference < 1e-5


def test_auto_compiles_once_it_pays(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = engine(model_folder, compile="auto")
    list(one.run(requests(0.0), 5))
    assert not one.steps.compiled
    monkeypatch.setitem(steps.SAVED_PER_LAYER, "cpu", 1e3)
    one.steps.announce(0)
    assert one.steps.compiled


def test_without_a_compiler_it_runs_eagerly(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(steps, "compiler", lambda: None)
    one = engine(model_folder, compile="on")
    assert not one.steps.compiled
    assert "running without torch.compile: there is no C++ compiler" in capsys.readouterr().err
    assert told(list(one.run(requests(0.0), 5))) == told(list(engine(model_folder).run(requests(0.0), 5)))


def test_a_failing_compiler_is_survived(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(torch, "compile", lambda run, **_: torch._dynamo.optimize(refuse)(run))
    one = engine(model_folder, compile="on")
    assert told(list(one.run(requests(0.0), 5))) == told(list(engine(model_folder).run(requests(0.0), 5)))
    assert "running without torch.compile" in capsys.readouterr().err


def test_unknown_modes_are_named(model_folder: Path) -> None:
    with pytest.raises(LlamaError, match="compile 'fast' is not one of auto, on, off"):
        engine(model_folder, compile="fast")
