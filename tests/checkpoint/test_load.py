"""A loaded shard is this rank's part of the weights, at any world size, and loading costs little more memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import RankPools
from safetensors.torch import load_file, save_file
from support import cut_dim, hf_model, meta_state, write_hf, write_meta
from torch import Tensor
from transformers import LlamaForCausalLM

from llama import config
from llama.checkpoint.load import load_model
from llama.checkpoint.source import open_checkpoint
from llama.parallel import groups
from llama.parallel.partition import Partition

CUTS = [(1, None), (2, None), (3, None), (4, None), (2, "3,1"), (3, "1,1,2"), (4, "3,2,2,1")]
Place = tuple[slice, ...]


def loaded_state(folder: Path, tensor_split: str | None, dtype: torch.dtype) -> dict[str, tuple[Place, Tensor]]:
    """On every rank: what was loaded, each with its place in the whole tensor."""
    ranks, checkpoint = groups.current(), open_checkpoint(folder)
    partition = Partition.create(checkpoint.args, ranks.world_size, tensor_split)
    model = load_model(checkpoint, partition, ranks, dtype)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    places = {name: tensor.spec.own(partition, ranks.rank) for name, tensor in checkpoint.tensors.items()}
    return {name: (places[name], weight.detach()) for name, weight in model.named_parameters()}


def check_states(states: list[dict[str, tuple[Place, Tensor]]], expected: dict[str, Tensor]) -> None:
    for state in states:
        assert state.keys() == expected.keys()
    for name, weight in expected.items():
        covered = torch.zeros(weight.shape, dtype=torch.bool)
        for state in states:
            place, own = state[name]
            assert own.dtype == weight.dtype
            assert torch.equal(own, weight[place]), name
            assert own.untyped_storage().nbytes() == own.nbytes  # not a view into more
            covered[place] = True
        assert covered.all(), name


@pytest.mark.parametrize(("world_size", "tensor_split"), CUTS)
@pytest.mark.parametrize("layout", ["meta", "fs", "hf"])
def test_ranks_load_their_parts(
    pools: RankPools, tmp_path: Path, layout: str, world_size: int, tensor_split: str | None
) -> None:
    model = hf_model("2")
    if layout == "meta":
        write_meta(tmp_path, model, 2, embedding_dim=1)
    elif layout == "fs":
        write_meta(tmp_path, model, 4, stem="fs_consolidated", views=True)
    else:
        write_hf(tmp_path, model, "50KB")
    check_states(pools.run(world_size, loaded_state, tmp_path, tensor_split, torch.float32), meta_state(model))


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_converted_as_torch_converts_them(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    folder = write_meta(tmp_path, hf_model("1"), 2, dtype=stored)
    expected = {name: weight.to(stored).to(wanted) for name, weight in meta_state(hf_model("1")).items()}
    check_states([loaded_state(folder, None, wanted)], expected)


# -- tied models -----------------------------------------------------------------------------------


def without_output(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight for name, weight in state.items() if name != "output.weight"}


def hf_tied(folder: Path) -> LlamaForCausalLM:
    model = hf_model("3.2")
    write_hf(folder, model)
    return model


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_tied_output_is_held_once(pools: RankPools, tmp_path: Path, world_size: int) -> None:
    expected = without_output(meta_state(hf_tied(tmp_path)))
    check_states(pools.run(world_size, loaded_state, tmp_path, None, torch.float32), expected)


def test_metas_second_copy_of_a_tied_output_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "LLAMA_3_2_GEOMETRIES", frozenset({(64, 2)}))
    model = hf_model("3.2")
    folder = write_meta(tmp_path, model, 2, embedding_dim=1)
    check_states([loaded_state(folder, None, torch.float32)], without_output(meta_state(model)))


@pytest.mark.parametrize("n_shards", [1, 2])
def test_an_output_that_tuning_has_set_apart_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_shards: int
) -> None:
    monkeypatch.setattr(config, "LLAMA_3_2_GEOMETRIES", frozenset({(64, 2)}))
    model = hf_model("3.2", tie_word_embeddings=False)
    folder = write_meta(tmp_path, model, n_shards, embedding_dim=n_shards - 1)
    assert open_checkpoint(folder).args.tied  # says the geometry
    check_states([loaded_state(folder, None, torch.float32)], meta_state(model))


def test_one_changed_row_of_the_output_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "LLAMA_3_2_GEOMETRIES", frozenset({(64, 2)}))
    folder, expected = write_meta(tmp_path, hf_model("3.2")), meta_state(hf_model("3.2"))
    expected["output.weight"][-1, -1] += 1
    torch.save(expected, folder / "consolidated.00.pth")
    check_states([loaded_state(folder, None, torch.float32)], expected)


def test_a_stored_output_counts_where_transformers_lets_it_count(tmp_path: Path) -> None:
    hf_tied(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = torch.randn_like(state["model.embed_tokens.weight"])
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(theirs.lm_head.weight, state["lm_head.weight"])
    check_states([loaded_state(tmp_path, None, torch.float32)], meta_state(theirs))


# -- memory ----------------------------------------------------------------------------------------

# About 400 MB in bf16, nearly all of it in tensors of a few MB as in real models.
BIG = {"dim": 1024, "n_layers": 14, "n_heads": 16, "n_kv_heads": 8, "vocab_size": 16000, "multiple_of": 3072}
MIB = 1 << 20

# Runs in a fresh process: the peak of the resident set, mapped pages counted, above where it began.
MEASURE = """
import json, sys, threading, time
import psutil, torch
from llama.checkpoint.load import load_model
from llama.checkpoint.load import cut_model
from llama.checkpoint.source import open_checkpoint
from llama.parallel.groups import Ranks
from llama.quantization.scheme import Asked

folder, rank, world_size, dtype = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), getattr(torch, sys.argv[4])
torch.set_num_threads(1)
torch.ones(100, 100).bfloat16().float() @ torch.ones(100, 100)
resident = psutil.Process().memory_info
before = peak = resident().rss

def watch():
    global peak
    while True:
        peak = max(peak, resident().rss)
        time.sleep(0.001)

threading.Thread(target=watch, daemon=True).start()
checkpoint = open_checkpoint(folder)
scheme = Asked(*sys.argv[5:]).scheme()
partition = cut_model(checkpoint.args, scheme, world_size)
model = load_model(checkpoint, partition, Ranks(rank, world_size), dtype, scheme)
shard = sum(p.nbytes for p in model.parameters())
assert all(bool(p.isfinite().all()) for p in model.parameters())
print(json.dumps({"growth": max(peak, resident().rss) - before, "shard": shard}))
"""


@pytest.fixture(scope="module")
def big_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same model in one file and in two, embedding cut by features."""
    from llama.checkpoint.table import specs
    from llama.config import ModelArgs

    folders = {n: tmp_path_factory.mktemp(f"big{n}") for n in (1, 2)}
    shapes = {name: spec.shape for name, spec in specs(ModelArgs.from_params(BIG)).items()}
    state = {name: torch.randint(-99, 99, shape, dtype=torch.int8).bfloat16() for name, shape in shapes.items()}
    for n_files, folder in folders.items():
        (folder / "params.json").write_text(json.dumps(BIG))
        for i in range(n_files):
            pieces = {name: state[name].chunk(n_files, cut_dim(name, 1) or 0)[i].clone() for name in state}
            whole = {name: state[name] for name in state if cut_dim(name, 1) is None}
            torch.save(pieces | whole, folder / f"consolidated.{i:02d}.pth")
    return folders


def measured(root: Path, folder: Path, *words: str) -> tuple[int, dict[str, int]]:
    """Bytes of the files, and what loading them took."""
    stored = sum(file.stat().st_size for file in folder.glob("*.pth"))
    assert stored > 380 * MIB
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), *words], cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return stored, json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_files", "rank", "world_size", "dtype"),
    [(1, 0, 1, "bfloat16"), (1, 0, 4, "bfloat16"), (2, 0, 4, "bfloat16"), (2, 3, 4, "float32")],
)
def test_loading_costs_little_more_than_the_shard(
    big_folders: dict[int, Path], root: Path, n_files: int, rank: int, world_size: int, dtype: str
) -> None:
    stored, figures = measured(root, big_folders[n_files], str(rank), str(world_size), dtype)
    ideal = stored * {"bfloat16": 1, "float32": 2}[dtype] / world_size
    assert 0.9 * ideal < figures["shard"] < 1.1 * ideal
    # Mapping or reading whole files would cost `stored` on top.
    assert figures["growth"] <= 1.15 * figures["shard"] + 200 * MIB
    assert figures["growth"] <= 1.15 * figures["shard"] + 0.4 * stored


@pytest.mark.slow
@pytest.mark.parametrize(("quantize", "rank", "world_size"), [("int8", 0, 1), ("int4", 0, 1), ("int4", 1, 2)])
def test_quantizing_costs_little_more_than_the_integers(
    big_folders: dict[int, Path], root: Path, quantize: str, rank: int, world_size: int
) -> None:
    stored, figures = measured(root, big_folders[2], str(rank), str(world_size), "bfloat16", quantize)
    # The embedding of 33 MB is kept as it is.
    assert figures["shard"] < stored / world_size * {"int8": 0.56, "int4": 0.36}[quantize]
    # As above; the model in bfloat16 would cost some 200 MB more.
    assert figures["growth"] <= 1.15 * figures["shard"] + 200 * MIB
    assert figures["growth"] <= figures["shard"] + 0.45 * stored
