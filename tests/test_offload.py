"""Offloaded layers compute what layers on the device compute, to the bit, from two layers' worth of memory there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from offloading import HALF, N_LAYERS, buffer_bytes, loaded, streaming, write_deep
from support import DIM, gather_logits
from torch import Tensor

from llama.copies import Copies
from llama.errors import UsageError
from llama.generation.engine import Engine, Request
from llama.generation.sampling import Sampling
from llama.model import Transformer
from llama.offload import N_BUFFERS, check_offload, offload_of, piece_bytes, spread
from llama.parallel import groups

WORLD_SIZES = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deep(tmp_path_factory.mktemp("model"))


# -- the same numbers --------------------------------------------------------------------------------


def inferred(folder: Path, n_offloaded: int, kind: str | None, split: str | None) -> tuple[Tensor, list[int]]:
    """Logits of a text, and tokens chosen after three prompts, one of which waits for a slot."""
    model = loaded(folder, n_offloaded, kind, split)
    with torch.no_grad():
        logits = gather_logits(model, model(torch.arange(1, 25).view(2, 12)))
    requests = [Request(n, [1, 5 + n, 9], 8, Sampling(temperature=0), noise_index=n) for n in range(3)]
    events = list(Engine(model, model.args.vocab_size).run(requests, max_batch_size=2))
    return logits, [event.token or 0 for event in events]


@pytest.mark.parametrize(
    ("world_size", "kind", "split"),
    [*((size, None, None) for size in WORLD_SIZES), (2, None, "3,1"), (1, "int8", None), (3, "int8", None),
     (4, "int8", None), (1, "int4", None), (2, "int4", None)],
)  # fmt: skip
def test_inference_is_the_same(
    on_ranks: Callable[..., list], folder: Path, world_size: int, kind: str | None, split: str | None
) -> None:
    wanted = on_ranks(world_size, inferred, folder, 0, kind, split)
    # Which layers a rank streams has nothing to do with the number of ranks.
    for n_offloaded in (1, HALF, N_LAYERS) if world_size == 1 else (HALF,):
        for (logits, tokens), (expected, chosen) in zip(
            on_ranks(world_size, inferred, folder, n_offloaded, kind, split), wanted, strict=True
        ):
            assert torch.equal(logits, expected)
            assert tokens == chosen
    assert len(set(wanted[0][1])) > 2


def test_losses_of_two_passes_flow_back_together(folder: Path) -> None:
    slopes = []
    for n_offloaded in (0, N_LAYERS):
        model = loaded(folder, n_offloaded)
        start = torch.randn(1, 7, DIM, generator=torch.Generator().manual_seed(0)).requires_grad_()
        sum(model(embeddings=start * factor).logsumexp(-1).sum() for factor in (1.0, 0.5)).backward()
        slopes.append(start.grad)
    assert torch.equal(*slopes)


# -- the bookkeeping ---------------------------------------------------------------------------------


def test_layers_are_spread_evenly() -> None:
    assert spread(0, 32) == ()
    assert spread(1, 32) == (16,)
    assert spread(4, 32) == (4, 12, 20, 28)
    assert spread(3, 7) == (1, 3, 5)
    for n_layers in range(1, 40):
        assert spread(n_layers, n_layers) == tuple(range(n_layers))
        for n_offloaded in range(1, n_layers):
            places = spread(n_offloaded, n_layers)
            gaps = {b - a for a, b in zip(places, (*places[1:], places[0] + n_layers), strict=True)}
            assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("wrong", [-1, N_LAYERS + 1])
def test_a_number_that_the_model_does_not_have(folder: Path, wrong: int) -> None:
    with pytest.raises(UsageError, match=rf"--offload_layers {wrong}: the model has {N_LAYERS} layers"):
        check_offload(wrong, N_LAYERS)
    with pytest.raises(UsageError, match=str(wrong)):
        loaded(folder, wrong)


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_two_layers_are_on_the_device(folder: Path, kind: str | None) -> None:
    model = loaded(folder, N_LAYERS, kind, dtype=torch.bfloat16)
    offload = streaming(model)
    layer = piece_bytes(parameter.nbytes for parameter in model.layers[0].parameters())
    assert len(offload.buffers) == N_BUFFERS == 2
    assert buffer_bytes(offload) == 2 * layer
    assert offload.host_bytes == N_LAYERS * layer
    assert buffer_bytes(streaming(loaded(folder, 1, kind))) < 2.1 * layer  # float32, of one layer

    on_device = {buffer.memory.untyped_storage().data_ptr() for buffer in offload.buffers}
    at_home = {home.memory.untyped_storage().data_ptr() for home in offload.homes}
    assert storages(model.layers) == at_home
    seen = []
    for block in model.layers:
        block.feed_forward.register_forward_pre_hook(lambda *_, block=block: seen.append(storages(block)))
    with torch.no_grad():
        model(torch.arange(1, 9)[None])
    assert len(seen) == N_LAYERS
    assert all(len(one) == 1 and one <= on_device for one in seen)
    assert storages(model.layers) == at_home


def test_nothing_is_streamed_without(folder: Path) -> None:
    assert offload_of(loaded(folder, 0)) is None


def storages(module: torch.nn.Module) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}


def watched(model: Transformer) -> list[str]:
    """Return a log of all that happens from here on: "copy 3" when the copy of offloaded layer 3 begins, "run 2"."""
    log: list[str] = []
    offload = streaming(model)

    class Watched(Copies):
        def start(self, target: Tensor, source: Tensor) -> Any:
            [place] = [n for n, home in enumerate(offload.homes) if home.memory is source]
            log.append(f"copy {place}")
            return super().start(target, source)

    offload.copies = Watched()
    for place, layer in enumerate(spread(len(offload.homes), len(model.layers))):
        model.layers[layer].attention.register_forward_pre_hook(lambda *_, place=place: log.append(f"run {place}"))
    return log


def test_the_next_layer_is_on_its_way_while_one_runs(folder: Path) -> None:
    model = loaded(folder, 4)
    log = watched(model)
    with torch.no_grad():
        for _ in range(2):
            model(torch.arange(1, 5)[None])
    first = "copy 0,copy 1,run 0,copy 2,run 1,copy 3,run 2,copy 0,run 3,"
    assert ",".join(log) == first + "copy 1,run 0,copy 2,run 1,copy 3,run 2,copy 0,run 3"


def test_a_backward_streams_in_reverse_and_copies_nothing_that_is_there(folder: Path) -> None:
    model = loaded(folder, 4)
    log = watched(model)
    start = torch.zeros(1, 3, DIM, requires_grad=True)
    for _ in range(2):
        model(embeddings=start).sum().backward()
    forward = "run 0,copy 2,run 1,copy 3,run 2,run 3,"
    backward = "run 3,copy 1,run 2,copy 0,run 1,run 0"
    assert ",".join(log) == f"copy 0,copy 1,{forward}{backward},{forward}{backward}"


def test_what_is_copied_is_counted(folder: Path) -> None:
    model = loaded(folder, HALF)
    offload = streaming(model)
    with torch.no_grad():
        model(torch.arange(1, 5)[None])
    overlap = offload.measured()
    # The first of the next pass among them.
    assert overlap.n_bytes == (HALF + 1) * buffer_bytes(offload) // 2
    # Without a stream of their own, copies are waited for.
    assert overlap.copying == overlap.waiting > 0
    assert offload.words().startswith("3 layers offloaded: 0.00 GB copied in ")
    assert offload.words().endswith("(0% hidden)")
    assert dataclasses.replace(overlap, copying=2.0, waiting=0.5).hidden == 0.75
    assert dataclasses.replace(overlap, copying=0.0, waiting=0.0).hidden == 0.0


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_a_card_computes_the_same(folder: Path, kind: str | None) -> None:
    results = []
    for n_offloaded in (0, HALF, N_LAYERS):
        groups.start(torch.device("cuda", 0))
        try:
            model = loaded(folder, n_offloaded, kind)
            tokens = torch.arange(1, 25, device="cuda").view(2, 12)
            with torch.no_grad():
                logits = [model(tokens).cpu() for _ in range(3)]
            start = torch.ones(1, 30, DIM, device="cuda", requires_grad=True)
            for _ in range(3):
                model(embeddings=start).logsumexp(-1).sum().backward()
            results.append((*logits, start.grad.cpu()))
            if n_offloaded:
                offload = streaming(model)
                assert all(home.memory.is_pinned() for home in offload.homes)
                assert all(buffer.memory.is_cuda for buffer in offload.buffers)
                overlap = offload.measured()
                assert overlap.copying > 0
                assert overlap.waiting >= 0
        finally:
            groups.start(torch.device("cpu"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))
