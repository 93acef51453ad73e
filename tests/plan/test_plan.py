"""Plans against what a run allocates, against arithmetic by hand, and as a person asks for them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from counting import GEOMETRIES, counted
from launch import Outcome, run_forked
from support import hf_model, sentencepiece_model, write_meta
from torch.nn.attention import SDPBackend, sdpa_kernel

from llama import Llama
from llama.checkpoint.load import load_model
from llama.checkpoint.source import open_checkpoint
from llama.config import ModelArgs, geometry
from llama.errors import LlamaError
from llama.generation.engine import EngineOptions
from llama.generation.sampling import Sampling
from llama.generation.tasks import Output, Tasks, expected_work
from llama.parallel import groups
from llama.parallel.partition import Partition
from llama.plan import advice, memory
from llama.plan.advice import Planner
from llama.plan.inference import Kernels, Workload, activation_bytes
from llama.plan.memory import Memory, cgroup_rooms, given_memory, joined_memory
from llama.plan.needs import Proposal
from llama.plan.words import change, command, table

pytestmark = pytest.mark.usefixtures("two_threads")

# The bars: activations within 15 %, weights and cache within 1 % (they are exact).
ACTIVATIONS = 0.15


# A full pass, a pass of few tokens, a batch of several passes, a prompt of several passes.
# With virtual tokens before them, passes see the cache through a mask.
@pytest.mark.parametrize(
    "work",
    [
        Workload(4, 256),
        Workload(1, 64),
        Workload(16, 512),
        Workload(1, 8500),
        Workload(4, 256, 32),
        Workload(16, 512, 50),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_are_those_of_a_run(work: Workload, dtype: torch.dtype) -> None:
    real, planned = counted(GEOMETRIES["groups"], work, dtype, Sampling(temperature=0))
    assert planned == pytest.approx(real, rel=ACTIVATIONS)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_every_geometry(name: str, dtype: torch.dtype) -> None:
    real, planned = counted(GEOMETRIES[name], Workload(8, 256), dtype, Sampling(temperature=0))
    assert planned == pytest.approx(real, rel=ACTIVATIONS)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_every_world_size(on_ranks: Callable[..., list], world_size: int, dtype: torch.dtype) -> None:
    work = Workload(4, 512)
    greedy = Sampling(temperature=0)
    runs = [on_ranks(world_size, counted, GEOMETRIES["groups"], work, dtype, greedy) for _ in range(3)]
    # gloo's thread now and then lets go of a buffer a moment late: the smallest count is the run's own.
    for rank in range(world_size):
        real, planned = min(run[rank] for run in runs)
        assert planned == pytest.approx(real, rel=ACTIVATIONS)


def test_the_sampler_counts_where_the_vocabulary_is_all_there_is() -> None:
    # Many short prompts and a large vocabulary; top_k keeps the candidates few, as a trained model's nucleus does.
    args = ModelArgs(dim=64, n_layers=1, n_heads=2, vocab_size=32000, ffn_dim=64)
    real, planned = counted(args, Workload(64, 2), torch.float32, Sampling(temperature=0.8, top_k=40))
    assert planned == pytest.approx(real, rel=ACTIVATIONS)


@pytest.mark.parametrize("work", [Workload(8, 512), Workload(1, 2048)], ids=str)
def test_attention_without_a_fused_kernel(work: Workload) -> None:
    # What a card does with grouped heads in float32.
    args = GEOMETRIES["groups"]
    with sdpa_kernel(SDPBackend.MATH):
        real, _ = counted(args, work, torch.float32, Sampling(temperature=0))
    planned = activation_bytes(Partition.create(args), 0, work, Kernels(4, fused=False))
    assert planned == pytest.approx(real, rel=ACTIVATIONS)


def planner(sizes: str, n_ranks: int, args: ModelArgs | None = None) -> Planner:
    return Planner(args or geometry("llama-2-7b"), "cuda", given_memory(sizes, n_ranks))


@pytest.mark.parametrize(("world_size", "split"), [(1, None), (2, "3,1"), (3, None)])
@pytest.mark.parametrize("generation", ["2", "3.2"])
def test_weights_and_cache_are_those_of_a_loaded_model(
    tmp_path: Path, generation: str, world_size: int, split: str | None
) -> None:
    checkpoint = open_checkpoint(write_meta(tmp_path, hf_model(generation)))
    work = Workload(3, 40, prefix=5)
    plan = planner("1GB", world_size, checkpoint.args).plan(Proposal(world_size, work, torch.float16, split))
    partition = Partition.create(checkpoint.args, world_size, split)
    for rank in range(world_size):
        model = load_model(checkpoint, partition, groups.Ranks(rank, world_size), torch.float16)
        items = {item.name: item.nbytes for item in plan.ranks[rank].items}
        assert items["weights"] == sum(parameter.nbytes for parameter in model.parameters())
        caches = model.new_cache(1, work.prefix), model.new_cache(work.n_prompts, work.prefix + work.length)
        assert items["KV cache"] == sum(cache.nbytes for cache in caches)


def test_llama_2_7b_by_hand() -> None:
    plan = planner("24GB", 1).plan(Proposal(1, Workload(32, 512), torch.float16))
    assert plan.ranks[0].total(("weights",)) == 6_738_415_616 * 2
    assert plan.ranks[0].total(("KV cache",)) == 2 * 32 * 32 * 512 * 4096 * 2
    assert plan.fits()
    assert "fits" in table(plan)


# -- advice ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes", "n_ranks", "work"),
    [
        ("llama-2-7b", "8GB,8GB", 2, Workload(32, 512)),
        ("llama-2-7b", "8GB,24GB", 2, Workload(32, 512)),
        ("llama-2-70b", "8GB,8GB,24GB,24GB", 4, Workload(32, 512)),
        ("llama-2-70b", "24GB", 1, Workload(1, 4096)),
        ("llama-3-8b", "18GB", 1, Workload(32, 8192)),
        ("llama-3.2-1b", "3GB", 1, Workload(1, 100000)),
    ],
)
def test_what_is_advised_fits(name: str, sizes: str, n_ranks: int, work: Workload) -> None:
    ours = planner(sizes, n_ranks, geometry(name))
    wanted = Proposal(n_ranks, work, torch.float16)
    assert not ours.plan(wanted).fits()
    advised = ours.advise(wanted)
    assert advised
    for proposal in advised:
        assert ours.plan(proposal).fits()
        assert change(proposal, wanted)


def test_unequal_cards_are_given_unequal_shards() -> None:
    wanted = Proposal(4, Workload(4, 512), torch.float16)
    ours = planner("4GB,4GB,12GB,12GB", 4, geometry("llama-2-13b"))
    advised = ours.advise(wanted)
    # A split is enough, so no other way comes with one.
    assert [proposal.tensor_split for proposal in advised] == ["1,1,3,3", *[None] * (len(advised) - 1)]
    assert advised[0].work == wanted.work
    assert command(advised[0], "ckpts/13B", "fp16") == (
        "torchrun --nproc_per_node 4 example.py --ckpt_dir ckpts/13B --max_seq_len 512 --max_batch_size 4 "
        "--tensor_split 1,1,3,3 --dtype fp16"
    )


def test_a_largest_batch_is_the_largest() -> None:
    ours = planner("8GB,8GB", 2)
    wanted = Proposal(2, Workload(32, 512), torch.float16)
    [smaller] = [proposal for proposal in ours.advise(wanted) if proposal.work.n_prompts < 32]
    one_more = Workload(smaller.work.n_prompts + 1, 512)
    assert not ours.plan(Proposal(2, one_more, torch.float16)).fits()


def test_more_ranks_do_not_help_where_they_share_the_memory() -> None:
    ours = Planner(geometry("llama-2-7b"), "cpu", Memory(("this machine",), (3 * 10**9,)))
    wanted = Proposal(2, Workload(1, 512), torch.float16)
    assert ours.advise(wanted) == []
    assert "lacks" in table(ours.plan(wanted))


# -- memory ----------------------------------------------------------------------------------------


def test_given_memory_is_for_all_or_one_a_rank() -> None:
    assert given_memory("8GB", 3).sizes == (8 * 10**9,) * 3
    with pytest.raises(LlamaError, match="2 sizes for 3 ranks"):
        given_memory("8GB,8GB", 3)


def test_processes_that_share_a_pool() -> None:
    joined = joined_memory([("a/0", 10), ("a/1", 20), ("a/0", 8), ("a/1", 20)], copies=1)
    assert [(pool.nbytes, pool.ranks) for pool in joined.pools(4)] == [(8, (0, 2)), (20, (1, 3))]
    two_copies = joined_memory([("a/0", 10), ("a/0", 10)], copies=2)
    assert [pool.ranks for pool in two_copies.pools(1)] == [(0, 0)]


def cgroup(folder: Path, files: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")


def test_cgroups_version_2(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/user/job\n")
    stat = "anon 700\nactive_file 100\ninactive_file 50"
    cgroup(tmp_path / "fs/user/job", {"memory.max": 1000, "memory.current": 900, "memory.stat": stat})
    cgroup(tmp_path / "fs/user", {"memory.max": "max", "memory.current": 900, "memory.stat": stat})
    cgroup(tmp_path / "fs", {"memory.max": 2000, "memory.current": 1990, "memory.stat": "active_file 0"})
    assert cgroup_rooms(tmp_path / "fs", own) == [250, 10]


def test_cgroups_version_1_seen_from_a_container(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n0::/\n")
    files = {"memory.limit_in_bytes": 1000, "memory.usage_in_bytes": 600, "memory.stat": "total_active_file 30"}
    cgroup(tmp_path / "fs/memory", files)
    assert cgroup_rooms(tmp_path / "fs", own) == [430]
    assert cgroup_rooms(tmp_path / "fs", tmp_path / "none") == []


# -- before loading --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    sentencepiece_model(folder)
    return write_meta(folder, hf_model("2"))


def test_build_refuses_what_cannot_fit(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "host_bytes", lambda: 100_000)
    with pytest.raises(LlamaError, match=r"0\.52 MB for weights.* 0\.10 MB are there.*--no_plan") as error:
        Llama.build(checkpoint, device="cpu", dtype="fp32")
    assert "\n" not in str(error.value)
    assert Llama.build(checkpoint, device="cpu", dtype="fp32", plan=False).model.args.dim == 64


def test_build_warns_of_what_may_not(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "host_bytes", lambda: 4_000_000)
    # 32 prompts of 512 tokens would not fit, nor is it known that they will come.
    Llama.build(checkpoint, device="cpu", dtype="fp32")
    told = capsys.readouterr().err
    assert told.count("memory may run out") == 1
    assert "--max_batch_size" in told
    Llama.build(checkpoint, device="cpu", dtype="fp32", plan=Workload(1, 64))
    assert "memory may run out" not in capsys.readouterr().err
    with pytest.raises(LlamaError, match="32 prompts of 512 tokens"):
        Llama.build(checkpoint, device="cpu", dtype="fp32", plan=Workload(32, 512))


def check_small(nbytes: int) -> str:
    """On a rank: the check of a model of 0.5 MB where only rank 1 says how little there is."""
    args = ModelArgs(dim=64, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=320, ffn_dim=176)
    rank = groups.current().rank
    own_pool, advice.own_pool = advice.own_pool, lambda device: (f"card {rank}", nbytes if rank else 10**9)  # type: ignore[assignment]
    try:
        advice.check_fit(args, torch.device("cpu"), torch.float32, 2, None, Workload(1, 16))
    except LlamaError as error:
        return str(error)
    finally:
        advice.own_pool = own_pool
    return ""


def test_ranks_exchange_what_they_have(on_ranks: Callable[..., list]) -> None:
    first, second = on_ranks(2, check_small, 200_000)
    assert first == second
    assert first.startswith("rank 1 needs 0.26 MB for weights")
    assert "--tensor_split" in first
    assert on_ranks(2, check_small, 10**9) == ["", ""]


def test_the_work_that_example_py_expects() -> None:
    ten, limits = Output(max_gen_len=10), EngineOptions(512, 32)
    assert expected_work(Tasks(["abc", "d"]), ten, limits) == Workload(2, 15)
    assert expected_work(Tasks(["abc", "d"]), dataclasses.replace(ten, stream=True), limits) == Workload(1, 15)
    assert expected_work(Tasks(), dataclasses.replace(ten, interactive=True), limits) == Workload(1, 512)
    assert expected_work(Tasks(["abc"] * 9), Output(), EngineOptions(512, 4)) == Workload(4, 512)


# -- commands --------------------------------------------------------------------------------------


def start(root: Path, script: str, *words: str) -> Outcome:
    return run_forked({script: [root / script, *words]})[script]


@pytest.mark.slow
def test_the_command(root: Path, checkpoint: Path) -> None:
    run = start(root, "scripts/plan.py", "--ckpt_dir", str(checkpoint), "--nproc", "2", "--memory", "10MB,30MB")
    assert run.code == 0, run.err
    assert "rank 1" in run.out
    assert "does not fit; these would:" in run.out
    assert f"torchrun --nproc_per_node 2 example.py --ckpt_dir {checkpoint}" in run.out


@pytest.mark.slow
def test_the_command_without_files(root: Path) -> None:
    flags = ("--model", "llama-2-70b", "--nproc", "8", "--dtype", "fp16", "--memory", "24GB")
    run = start(root, "scripts/plan.py", *flags)
    assert run.code == 0, run.err
    assert run.out.splitlines()[0].startswith("llama-2-70b: 68.98 B parameters in fp16 on 8 ranks")
    assert run.out.splitlines()[-1] == "fits"


MISTAKES = {
    "": "either --ckpt_dir or --model",
    "--model llama-9": "no published geometry",
    "--model llama-2-7b --nproc 33 --memory 1GB": "33 ranks but only 32 attention heads",
    "--model llama-2-7b --memory 8": "is not a size",
    "--model llama-2-7b --nproc 0": "nproc must be a whole number above 0",
}


@pytest.fixture(scope="module")
def refused(root: Path) -> dict[str, Outcome]:
    return run_forked({flags: [root / "scripts" / "plan.py", *flags.split()] for flags in MISTAKES})


@pytest.mark.slow
@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_are_told_in_one_line(refused: dict[str, Outcome], flags: str) -> None:
    run = refused[flags]
    assert run.code == 2
    assert MISTAKES[flags] in run.err
    assert len(run.err.strip().splitlines()) == 1


@pytest.mark.slow
def test_example_py_refuses_and_obeys(root: Path, checkpoint: Path, tmp_path: Path) -> None:
    flags = ("example.py", "--ckpt_dir", str(checkpoint), "--device", "cpu", "--prompts", "w1", "--temperature", "0")
    refused = start(root, *flags, "--max_seq_len", str(10**12))
    assert refused.code == 2
    assert refused.err.startswith("error: rank 0 needs")
    assert "--no_plan" in refused.err
    output = tmp_path / "out.json"
    short = ("--max_seq_len", str(10**12), "--max_gen_len", "2", "--output_json", str(output))
    assert start(root, *flags, *short).code == 0
    assert len(json.loads(output.read_text())) == 1
