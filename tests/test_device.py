"""What a machine's devices lead to; torch's answers about them are made up here."""

import os
from pathlib import Path

import pytest
import torch

from llama import device as ours
from llama import env
from llama.env import is_speaker, notice
from llama.errors import DeviceError, LlamaError

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
LARGE, SMALL = 8_030_261_248, 1_000_000


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    machine(monkeypatch)


def machine(
    monkeypatch: pytest.MonkeyPatch, cards: int = 0, mps: bool = False, capability: tuple[int, int] = (9, 0)
) -> None:
    """A machine of so many CUDA cards."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    # The answer that must not be asked for: torch says yes of cards that emulate it.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def ranks(monkeypatch: pytest.MonkeyPatch, world_size: int, rank: int) -> None:
    values = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_without_a_card_the_cpu_computes() -> None:
    assert ours.choose_device() == CPU
    assert ours.choose_device("cpu") == CPU
    assert ours.choose_device(CPU) == CPU


@pytest.mark.parametrize(("rank", "card"), [(0, 0), (1, 1), (2, 0), (3, 1)])
def test_each_local_rank_has_its_card_and_shares_it_where_they_run_out(
    monkeypatch: pytest.MonkeyPatch, rank: int, card: int
) -> None:
    machine(monkeypatch, cards=2)
    ranks(monkeypatch, 4, rank)
    assert ours.choose_device() == torch.device("cuda", card)
    assert ours.choose_device("cuda") == torch.device("cuda", card)
    assert ours.choose_device("cuda:1") == torch.device("cuda", 1)
    assert ours.choose_device("cpu") == CPU


def test_mps_serves_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, mps=True)
    assert ours.choose_device().type == "mps"
    assert ours.choose_device("mps").type == "mps"
    ranks(monkeypatch, 2, 0)
    assert ours.choose_device() == CPU
    with pytest.raises(DeviceError, match="one process, not 2"):
        ours.choose_device("mps")


@pytest.mark.parametrize(
    ("device", "cards", "words"),
    [
        ("cuda", 0, "no CUDA card"),
        ("cuda:0", 0, "no CUDA card"),
        ("cuda:2", 2, "there are 2 CUDA cards"),
        ("mps", 2, "sees none"),
        ("xpu", 2, "not one of auto, cpu, cuda, cuda:N, mps"),
        ("gpu", 2, "not one of"),
        ("cuda:x", 2, "not one of"),
        ("", 2, "not one of"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, cards: int, words: str
) -> None:
    machine(monkeypatch, cards=cards)
    with pytest.raises(DeviceError, match=words):
        ours.choose_device(device)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_cards_compute_in_bf16_only_where_it_is_native(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    machine(monkeypatch, cards=1, capability=capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert ours.choose_dtype("auto", CARD, torch.bfloat16, LARGE) == dtype
    assert ours.choose_dtype("auto", CARD, torch.float32, SMALL) == dtype


@pytest.mark.parametrize("native", [True, False])
def test_a_cpu_computes_in_bf16_or_fp32(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    large = torch.bfloat16 if native else torch.float32
    assert ours.choose_dtype("auto", CPU, torch.bfloat16, LARGE) == large
    assert ours.choose_dtype("auto", CPU, torch.float16, LARGE) == large
    assert ours.choose_dtype("auto", CPU, torch.float32, LARGE) == torch.float32
    assert ours.choose_dtype("auto", CPU, torch.bfloat16, SMALL) == torch.float32


def test_older_cpus_have_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not ours.has_native_bf16(CPU)
    assert not ours.has_native_bf16(torch.device("mps"))
    assert ours.choose_dtype("auto", torch.device("mps"), torch.bfloat16, LARGE) == torch.float16


def test_a_named_dtype_is_taken() -> None:
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "bfloat16": torch.bfloat16}
    for name, dtype in names.items():
        assert ours.choose_dtype(name, CPU, torch.float32, SMALL) == dtype
    assert ours.choose_dtype(torch.float64, CPU, torch.float32, SMALL) == torch.float64
    with pytest.raises(DeviceError, match="'int8' is not one of auto, fp32, bf16, fp16"):
        ours.choose_dtype("int8", CPU, torch.float32, SMALL)


@pytest.mark.parametrize(("local", "threads"), [(1, 12), (2, 6), (5, 2), (64, 1)])
def test_cores_are_shared_among_local_ranks(monkeypatch: pytest.MonkeyPatch, local: int, threads: int) -> None:
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12), raising=False)
    ranks(monkeypatch, local, 0)
    assert ours.set_threads() == threads
    assert ours.set_threads(3) == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert ours.set_threads() == 1
    assert given == [threads, 3, 1]


def test_peak_memory_is_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 50e6 < ours.peak_memory(CPU) < 100e9
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    assert ours.peak_memory(CARD) == 7


def test_the_environment_is_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (env.rank(), env.world_size(), env.local_rank(), env.local_world_size()) == (0, 1, 0, 1)
    ranks(monkeypatch, 4, 3)
    assert (env.rank(), env.world_size(), env.local_rank(), env.local_world_size()) == (3, 4, 3, 4)
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(LlamaError, match="WORLD_SIZE must be a number, is 'many'"):
        env.world_size()


def test_only_rank_0_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert is_speaker()
    notice("heard")
    ranks(monkeypatch, 2, 1)
    assert not is_speaker()
    notice("not heard")
    assert capsys.readouterr() == ("", "heard\n")


def test_a_machine_without_these_modules_still_imports_ours() -> None:
    """`resource` is not on Windows: nothing imports it before it is needed."""
    top = [line for line in Path(ours.__file__).read_text().splitlines() if line.startswith("import ")]
    assert "import resource" not in top


def test_sums_are_of_float64_where_the_device_has_it() -> None:
    assert ours.sum_dtype(torch.device("cpu")) == torch.float64
    assert ours.sum_dtype(torch.device("mps")) == torch.float32
