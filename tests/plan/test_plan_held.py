"""Plans of models whose weights are held as integers or in main memory: against runs, and as a person asks for them."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from counting import GEOMETRIES, counted
from offloading import buffer_bytes
from support import hf_model, sentencepiece_model, write_meta

from llama import Llama, flags
from llama.checkpoint.quantize import quantize_checkpoint
from llama.checkpoint.source import open_checkpoint
from llama.commands import complete, tune
from llama.config import geometry
from llama.errors import LlamaError, UsageError
from llama.generation.sampling import Sampling
from llama.kernels import products
from llama.model import Transformer
from llama.offload import offload_blocks, offload_of
from llama.parallel import groups
from llama.parallel.partition import Partition
from llama.plan import advice, memory
from llama.plan.advice import Planner
from llama.plan.inference import Workload
from llama.plan.memory import Memory, given_memory
from llama.plan.needs import Proposal
from llama.plan.training import Training
from llama.plan.words import change, command, table
from llama.quantization.layers import quantize_layers
from llama.quantization.scheme import Scheme

pytestmark = pytest.mark.usefixtures("two_threads")

# As in test_plan.py.
ACTIVATIONS = 0.15
GREEDY = Sampling(temperature=0)


@pytest.fixture(params=[False, True], ids=["torch", "our kernels"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether integers are multiplied and widened by our own kernels, where they can be built."""
    if request.param and not products.enable():
        pytest.skip("the kernels cannot be built here")
    monkeypatch.setattr(products, "_loaded", request.param)
    return request.param


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("work", [Workload(4, 256), Workload(1, 12), Workload(16, 512)], ids=str)
def test_of_integers(native: bool, kind: str, dtype: torch.dtype, work: Workload) -> None:
    for name in ("groups", "wide FFN"):
        real, planned = counted(GEOMETRIES[name], work, dtype, GREEDY, Scheme.create(kind, output=kind))
        assert planned == pytest.approx(real, rel=ACTIVATIONS)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_of_integers_in_pieces(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    # As matrices of billions of numbers are.
    monkeypatch.setattr(products, "PIECE", 200)
    for dtype in (torch.float32, torch.bfloat16):
        real, planned = counted(GEOMETRIES["wide FFN"], Workload(4, 256), dtype, GREEDY, Scheme.create(kind))
        assert planned == pytest.approx(real, rel=ACTIVATIONS)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_integers_on_two_ranks(on_ranks: Callable[..., list], kind: str, dtype: torch.dtype) -> None:
    scheme = Scheme.create(kind)
    runs = [on_ranks(2, counted, GEOMETRIES["groups"], Workload(4, 512), dtype, GREEDY, scheme) for _ in range(3)]
    for rank in range(2):
        real, planned = min(run[rank] for run in runs)
        assert planned == pytest.approx(real, rel=ACTIVATIONS)


def test_streaming_layers_takes_no_activations() -> None:
    args = dataclasses.replace(GEOMETRIES["groups"], n_layers=4)
    real, planned = counted(args, Workload(4, 256), torch.float32, GREEDY, None, 4)
    assert planned == pytest.approx(real, rel=ACTIVATIONS)


INT4 = Scheme.create("int4", output="none", embedding="int8")


@pytest.mark.parametrize("scheme", [Scheme.create("int8"), Scheme.create("int4"), INT4], ids=Scheme.words)
@pytest.mark.parametrize("n_offloaded", [0, 1, 3])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_of_integers_and_offloaded_layers(scheme: Scheme, n_offloaded: int, device: str, tied: bool) -> None:
    args = dataclasses.replace(GEOMETRIES["groups"], n_layers=4, tied=tied)
    if tied:
        scheme = dataclasses.replace(scheme, embedding=None)
    proposal = Proposal(2, Workload(2, 32), torch.bfloat16, None, scheme, n_offloaded)
    plan = Planner(args, device, given_memory("1GB", 2)).plan(proposal)
    for rank in range(2):
        partition = Partition.create(args, 2, None, scheme.block)
        model = Transformer(args, partition, groups.Ranks(rank, 2), device="meta", dtype=torch.bfloat16)
        quantize_layers(model.requires_grad_(False), scheme)
        offload_blocks(model, n_offloaded)
        items = {item.name: item for item in plan.ranks[rank].items}
        held = sum(parameter.nbytes for parameter in model.parameters())
        if n_offloaded:
            offload = offload_of(model)
            assert offload is not None
            assert items["buffers"].nbytes == buffer_bytes(offload)
            held -= sum(parameter.nbytes for home in offload.homes for parameter in home.parameters)
            if device == "cuda":
                assert items["offloaded"].nbytes == offload.host_bytes
            else:
                held += offload.host_bytes
        assert items["weights"].nbytes == held
        assert plan.ranks[rank].total(in_host=True) == (offload.host_bytes if n_offloaded and device == "cuda" else 0)


@pytest.mark.parametrize("can_build", [False, True])
def test_kernels_count_with_offloaded_layers_too(monkeypatch: pytest.MonkeyPatch, can_build: bool) -> None:
    monkeypatch.setattr(advice, "can_build", lambda: can_build)
    planner = Planner(geometry("llama-3-8b"), "cpu", given_memory("40GB", 1))

    def activations(n_offloaded: int) -> int:
        proposal = Proposal(1, Workload(1, 12), torch.bfloat16, None, Scheme.create("int4"), n_offloaded)
        return planner.plan(proposal).ranks[0].total(("activations",))

    assert activations(4) == activations(0)
    # Few rows are multiplied by kernels as they are; torch widens the matrices first.
    assert (activations(0) < 10**7) == can_build


# -- advice ----------------------------------------------------------------------------------------


def planner(sizes: str, n_ranks: int) -> Planner:
    return Planner(geometry("llama-2-7b"), "cuda", given_memory(sizes, n_ranks))


def test_fewer_bits_and_layers_elsewhere_are_proposed() -> None:
    ours, wanted = planner("8GB", 1), Proposal(1, Workload(1, 512), torch.float16)
    by_way = {change(proposal, wanted): proposal for proposal in ours.advise(wanted)}
    assert {"--quantize int8", "--quantize int4"} <= by_way.keys()
    assert command(by_way["--quantize int4"], "DIR") == (
        "python example.py --ckpt_dir DIR --max_seq_len 512 --max_batch_size 1 --quantize int4"
    )
    [offloaded] = [proposal for proposal in by_way.values() if proposal.offload_layers]
    assert f"--offload_layers {offloaded.offload_layers} " in command(offloaded, "DIR", "fp16") + " "
    one_less = dataclasses.replace(offloaded, offload_layers=offloaded.offload_layers - 1)
    assert not ours.plan(one_less).fits()
    # Integers are asked for already: fewer bits are left, and no more where there are none.
    for kind, others in (("int8", {"--quantize int4"}), ("int4", set())):
        asked = dataclasses.replace(wanted, scheme=Scheme.create(kind), work=Workload(32, 512))
        ways = {change(proposal, asked) for proposal in planner("8GB", 1).advise(asked)}
        assert {way for way in ways if "--quantize" in way} <= others
    # On a CPU there is nowhere to move layers.
    here = Planner(geometry("llama-2-7b"), "cpu", Memory(("this machine",), (8 * 10**9,)))
    assert not any(proposal.offload_layers for proposal in here.advise(wanted))


def test_a_quantized_checkpoint_is_planned_as_it_is() -> None:
    held = Scheme.create("int8")
    ours, wanted = planner("6GB", 1), Proposal(1, Workload(4, 512), torch.float16, None, held)
    assert any(proposal.scheme != held for proposal in ours.advise(wanted))
    advised = dataclasses.replace(ours, stored=held).advise(wanted)
    assert advised
    for proposal in advised:
        assert proposal.scheme == held
        assert "--quantize" not in command(proposal, "DIR", stored=held)
    other = Scheme.create("int4", 64, "none", "int8")
    flags = "--quantize int4 --group_size 64 --quantize_output none --quantize_embedding int8"
    assert flags in command(dataclasses.replace(wanted, scheme=other), "DIR")


def test_main_memory_may_be_too_little_for_layers() -> None:
    host = Memory(("this machine",), (4 * 10**9,))
    ours = dataclasses.replace(planner("8GB,8GB", 2), host=host)
    wanted = Proposal(2, Workload(32, 512), torch.float16, None, None, 30)
    plan = ours.plan(wanted)
    assert plan.worst().is_host
    assert plan.excess(plan.worst()) == plan.ranks[0].total(in_host=True) * 2 - 4 * 10**9
    assert "of main memory" in table(plan)
    assert planner("8GB,8GB", 2).plan(wanted).fits()
    assert all(ours.plan(proposal).fits() for proposal in ours.advise(wanted))


@pytest.mark.parametrize("n_layers", [-1, 33])
def test_layers_that_are_not_there(n_layers: int) -> None:
    with pytest.raises(UsageError, match=f"--offload_layers {n_layers}: the model has 32 layers"):
        planner("8GB", 1).plan(Proposal(1, Workload(1, 512), torch.float16, None, None, n_layers))


# -- commands and refusals -------------------------------------------------------------------------


def flags_of(text: str) -> set[str]:
    return {word.removeprefix("--") for word in shlex.split(text) if word.startswith("--")} - {"nproc_per_node"}


def test_what_is_proposed_can_be_typed() -> None:
    example = {flag.name for flag in flags.flags_of(complete.main)}
    for work, known in (
        (Workload(8, 512), example),
        (Training(2, 512, method="lora"), {flag.name for flag in flags.flags_of(tune.main)}),
    ):
        wanted = Proposal(1, work, torch.bfloat16)
        ours = planner("9GB", 1)
        proposed = [command(proposal, "DIR") for proposal in ours.advise(wanted)]
        assert any("--quantize int4" in text for text in proposed)
        assert any("--offload_layers" in text for text in proposed)
        for text in proposed:
            assert flags_of(text) <= known


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held")
    sentencepiece_model(folder)
    return write_meta(folder, hf_model("2", intermediate_size=192))


def test_the_refusal_proposes_integers_and_they_are_let_through(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "host_bytes", lambda: 520_000)
    work = Workload(1, 16)
    with pytest.raises(LlamaError, match=r"what fits: .*--quantize int8, or --quantize int4"):
        Llama.build(checkpoint, device="cpu", dtype="fp32", plan=work)
    for kind in ("int8", "int4"):
        assert Llama.build(checkpoint, device="cpu", dtype="fp32", plan=work, quantize=kind)
    # Two buffers more.
    monkeypatch.setattr(memory, "host_bytes", lambda: 280_000)
    assert Llama.build(checkpoint, device="cpu", dtype="fp32", plan=work, quantize="int8")
    with pytest.raises(LlamaError, match=r"for buffers"):
        Llama.build(checkpoint, device="cpu", dtype="fp32", plan=work, quantize="int8", offload_layers=2)


def test_the_main_memory_beside_cards_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    args = dataclasses.replace(GEOMETRIES["groups"], n_layers=12)

    def refused(n_bytes: int) -> str:
        monkeypatch.setattr(
            advice, "own_pool", lambda device: (device.type, 9_000_000 * (device.type == "cuda") or n_bytes)
        )
        with pytest.raises(LlamaError) as error:
            advice.check_fit(args, torch.device("cuda"), torch.bfloat16, 1, None, Workload(1, 16))
        return str(error.value)

    assert re.search(r"--offload_layers \d+", refused(10**9))
    assert "--offload_layers" not in refused(1_000_000)
    # Asked for, and too little.
    with pytest.raises(LlamaError, match=r"rank 0 needs .* for offloaded .*, but 1\.00 MB are there"):
        advice.check_fit(args, torch.device("cuda"), torch.bfloat16, 1, None, Workload(1, 16), offload_layers=10)


def test_a_quantized_checkpoint_is_checked_as_it_is(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = quantize_checkpoint(open_checkpoint(checkpoint), tmp_path / "int8", Scheme.create("int8"))
    monkeypatch.setattr(memory, "host_bytes", lambda: 520_000)
    assert Llama.build(held, device="cpu", dtype="fp32", plan=Workload(1, 16))
    monkeypatch.setattr(memory, "host_bytes", lambda: 100_000)
    with pytest.raises(LlamaError) as error:
        Llama.build(held, device="cpu", dtype="fp32", plan=Workload(1, 16))
    assert "--quantize" not in str(error.value)
