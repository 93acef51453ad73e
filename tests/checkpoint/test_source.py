"""Every layout gives the same tensors, whole and in parts, bit for bit; what does not add up is refused."""

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import hf_model, meta_params, meta_state, write_hf, write_meta
from torch import Tensor
from transformers import LlamaForCausalLM

from llama import config
from llama.checkpoint import files
from llama.checkpoint.source import Checkpoint, open_checkpoint
from llama.errors import CheckpointError
from llama.parallel.partition import Partition

model_of = cache(hf_model)


def as_bin(folder: Path, model: LlamaForCausalLM) -> Path:
    write_hf(folder, model)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def as_indexed_bin(folder: Path, model: LlamaForCausalLM) -> Path:
    as_bin(folder, model)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    names = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(state)}
    for file in set(names.values()):
        torch.save({name: weight for name, weight in state.items() if names[name] == file}, folder / file)
    (folder / "pytorch_model.bin").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def meta(**options: Any) -> Callable[[Path, LlamaForCausalLM], Path]:
    return lambda folder, model: write_meta(folder, model, **options)


LAYOUTS: dict[str, Callable[[Path, LlamaForCausalLM], Path]] = {
    **{
        f"{stem} {n} cut {'vocab' if dim == 0 else 'dim'}{' views' if views else ''}": meta(
            n_shards=n, embedding_dim=dim, stem=stem, views=views
        )
        for stem in ("consolidated", "fs_consolidated")
        for n, dim in ((1, 0), (2, 0), (2, 1), (4, 0), (4, 1))
        for views in (False, True)
    },
    "hf single": write_hf,
    "hf indexed": lambda folder, model: write_hf(folder, model, shard_size="50KB"),
    "hf bin": as_bin,
    "hf indexed bin": as_indexed_bin,
}


def whole(checkpoint: Checkpoint, name: str) -> Tensor:
    tensor = checkpoint.tensors[name]
    out = torch.full(tensor.spec.shape, torch.nan)
    tensor.read_into(tuple(slice(0, size) for size in tensor.spec.shape), out)
    return out


def random_partitions(checkpoint: Checkpoint, count: int) -> list[Partition]:
    draw, partitions = random.Random(2), []
    for _ in range(count):
        world_size = draw.randint(1, checkpoint.args.n_heads)
        weights = [draw.uniform(0.5, 4) for _ in range(world_size)]
        partitions.append(Partition.create(checkpoint.args, world_size, weights))
    return partitions


def check_tensors(folder: Path, expected: dict[str, Tensor], n_partitions: int = 3) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors.keys() == expected.keys()
    partitions = random_partitions(checkpoint, n_partitions)
    for name, weight in expected.items():
        assert torch.equal(whole(checkpoint, name), weight), name
        spec = checkpoint.tensors[name].spec
        for partition in partitions:
            for rank in range(partition.world_size):
                index = spec.own(partition, rank)
                own = torch.full([part.stop - part.start for part in index], torch.nan)
                checkpoint.tensors[name].read_into(index, own)
                assert torch.equal(own, weight[index]), (name, rank, partition.weights)


# -- layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tensors(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE_BYTES", 5000)  # several pieces a tensor
    model = model_of("2")
    folder = LAYOUTS[layout](tmp_path / "model", model)
    if "indexed" in layout:
        assert not list(folder.glob("model.safetensors"))
        assert open_checkpoint(folder).n_shards > 1
    check_tensors(folder, meta_state(model))


@pytest.mark.parametrize("generation", ["1", "3.1"])
@pytest.mark.parametrize("layout", ["consolidated 4 cut dim", "hf indexed"])
def test_other_generations_too(tmp_path: Path, layout: str, generation: str) -> None:
    check_tensors(LAYOUTS[layout](tmp_path, model_of(generation)), meta_state(model_of(generation)), 1)


def test_eight_shards_of_a_model_with_two_kv_heads_split_the_kv_rows(tmp_path: Path) -> None:
    """Meta's own files cut KV heads across shards where there are more shards than heads."""
    check_tensors(write_meta(tmp_path, model_of("2"), 8), meta_state(model_of("2")))


def test_the_geometry_and_the_stored_dtype_are_told(tmp_path: Path) -> None:
    meta_folder = write_meta(tmp_path / "a", model_of("3.1"), 2, dtype=torch.bfloat16)
    hf_folder = write_hf(tmp_path / "b", model_of("3.1"))
    ours, theirs = open_checkpoint(meta_folder), open_checkpoint(hf_folder)
    assert (ours.format, ours.n_shards, ours.dtype) == ("meta", 2, torch.bfloat16)
    assert (theirs.format, theirs.n_shards, theirs.dtype) == ("hf", 1, torch.float32)
    for name in ("dim", "n_layers", "n_kv_heads", "vocab_size", "ffn_dim", "rope_theta", "rope_scaling", "norm_eps"):
        assert getattr(ours.args, name) == getattr(theirs.args, name), name


def test_an_open_vocabulary_is_settled_by_the_tensors(tmp_path: Path) -> None:
    folder = write_meta(tmp_path, model_of("1"), 4, embedding_dim=1, vocab_size=-1)
    assert open_checkpoint(folder).args.vocab_size == 320
    check_tensors(folder, meta_state(model_of("1")), 1)


def test_of_two_sets_the_original_one_is_read(tmp_path: Path) -> None:
    write_meta(tmp_path, model_of("1"), 4, stem="fs_consolidated", dtype=torch.bfloat16)
    write_meta(tmp_path, model_of("1"), 2)
    check_tensors(tmp_path, meta_state(model_of("1")), 1)


def test_tables_that_are_computed_are_ignored(tmp_path: Path) -> None:
    for shard in (path for path in write_meta(tmp_path, model_of("2"), 2).glob("*.pth")):
        state = torch.load(shard, weights_only=True)
        torch.save({**state, "rope.freqs": torch.ones(4, dtype=torch.float64)}, shard)
    check_tensors(tmp_path, meta_state(model_of("2")), 1)


def test_inverse_frequencies_of_old_hf_files_are_ignored(tmp_path: Path) -> None:
    folder = write_hf(tmp_path, model_of("2"))
    state = load_file(folder / "model.safetensors")
    save_file({**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, folder / "model.safetensors")
    check_tensors(folder, meta_state(model_of("2")), 1)


# -- tied models -----------------------------------------------------------------------------------


@pytest.fixture
def small_is_3_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the test models' geometry pass for Llama 3.2's."""
    monkeypatch.setattr(config, "LLAMA_3_2_GEOMETRIES", frozenset({(64, 2)}))


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != name}


def test_a_tied_hf_model_stores_no_output(tmp_path: Path) -> None:
    folder = write_hf(tmp_path, model_of("3.2"))
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert open_checkpoint(folder).args.tied
    check_tensors(folder, without(meta_state(model_of("3.2")), "output.weight"))


def test_a_tied_hf_model_may_store_only_its_output(tmp_path: Path) -> None:
    folder = write_hf(tmp_path, model_of("3.2"))
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    check_tensors(folder, without(meta_state(model_of("3.2")), "output.weight"))


@pytest.mark.usefixtures("small_is_3_2")
@pytest.mark.parametrize("stored", [True, False])
def test_metas_tied_model_may_store_its_output_or_not(tmp_path: Path, stored: bool) -> None:
    folder, expected = write_meta(tmp_path, model_of("3.2")), meta_state(model_of("3.2"))
    if not stored:
        expected = without(expected, "output.weight")
        torch.save(expected, folder / "consolidated.00.pth")
    assert open_checkpoint(folder).args.tied
    check_tensors(folder, expected)


# -- what does not add up --------------------------------------------------------------------------


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize("n_shards", [1, 2])
def test_missing_unexpected_and_misshapen_tensors_are_named_in_one_error(tmp_path: Path, n_shards: int) -> None:
    folder = write_meta(tmp_path, model_of("2"), n_shards)

    def spoil(state: dict[str, Tensor]) -> None:
        del state["layers.1.attention.wv.weight"]
        state["layers.0.attention.wq.bias"] = torch.ones(8)
        state["layers.0.feed_forward.w2.weight"] = torch.ones(3, 5)

    rewrite(folder / f"consolidated.0{n_shards - 1}.pth", spoil)
    message = refusal(folder)
    assert "1 missing: layers.1.attention.wv.weight" in message
    assert "1 unexpected: layers.0.attention.wq.bias" in message
    assert "layers.0.feed_forward.w2.weight is" in message
    assert "expected [64, 176]" in message
    assert ("in consolidated.01.pth" in message) == (n_shards == 2)


def test_the_same_holds_for_hugging_faces_files(tmp_path: Path) -> None:
    folder = write_hf(tmp_path, model_of("2"))
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    state["model.norm.weight"] = torch.ones(63)
    del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors")
    message = refusal(folder)
    assert "1 missing: lm_head.weight" in message
    assert "1 unexpected: model.layers.0.self_attn.q_proj.bias" in message
    assert "norm.weight is [63], expected [64]" in message


@pytest.mark.parametrize(
    ("change", "found", "expected"),
    [
        ({"vocab_size": 321}, "tok_embeddings.weight is [320, 64]", "[321, 64]"),
        ({"n_kv_heads": 4}, "attention.wk.weight is [16, 64]", "[32, 64]"),
        ({"multiple_of": 177}, "feed_forward.w1.weight is [176, 64]", "[177, 64]"),
        ({"n_layers": 3}, "9 missing: layers.2.attention.wq.weight", ""),
        ({"n_layers": 1}, "9 unexpected: layers.1.attention.wq.weight", ""),
    ],
)
def test_params_that_contradict_the_tensors_are_refused(
    tmp_path: Path, change: dict[str, int], found: str, expected: str
) -> None:
    message = refusal(write_meta(tmp_path, model_of("2"), **change))
    assert found in message
    assert expected in message


def test_a_shard_missing_in_the_middle_is_named(tmp_path: Path) -> None:
    folder = write_meta(tmp_path, model_of("2"), 4)
    (folder / "consolidated.01.pth").unlink()
    (folder / "consolidated.02.pth").unlink()
    assert "lacks consolidated.01.pth, consolidated.02.pth" in refusal(folder)


@pytest.mark.parametrize("embedding_dim", [0, 1])
@pytest.mark.parametrize("vocab_size", [-1, 320])
@pytest.mark.parametrize("n_shards", [2, 4])
def test_a_shard_missing_at_the_end_is_noticed(
    tmp_path: Path, n_shards: int, vocab_size: int, embedding_dim: int
) -> None:
    folder = write_meta(tmp_path, model_of("2"), n_shards, embedding_dim, vocab_size=vocab_size)
    (folder / f"consolidated.{n_shards - 1:02d}.pth").unlink()
    message = refusal(folder)
    assert "is a shard missing" in message
    assert "layers.0.attention.wq.weight is" in message


def test_shards_of_two_sets_do_not_mix(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "a", model_of("2"), 2)
    other = write_meta(tmp_path / "b", model_of("2"), 4)
    (other / "consolidated.01.pth").rename(folder / "consolidated.01.pth")
    assert "layers.0.attention.wq.weight is [48, 64], expected [64, 64]" in refusal(folder)


def test_an_open_vocabulary_without_an_output_is_refused(tmp_path: Path) -> None:
    folder = write_meta(tmp_path, model_of("2"), vocab_size=-1)
    rewrite(folder / "consolidated.00.pth", lambda state: state.__delitem__("output.weight"))
    assert "vocab_size open (-1) and output.weight is missing" in refusal(folder)


def test_folders_without_a_checkpoint_say_what_was_expected(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "consolidated.NN.pth" in refusal(tmp_path)
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(tmp_path / "file")


def test_weights_without_parameters_are_refused(tmp_path: Path) -> None:
    (write_meta(tmp_path / "a", model_of("2")) / "params.json").unlink()
    (write_hf(tmp_path / "b", model_of("2")) / "config.json").unlink()
    assert "has no params.json" in refusal(tmp_path / "a")
    assert "has no config.json" in refusal(tmp_path / "b")


def test_unknown_params_are_refused_with_their_file(tmp_path: Path) -> None:
    message = refusal(write_meta(tmp_path, model_of("2"), moe_args={}))
    assert "params.json" in message
    assert "moe_args" in message


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({"weight_map": {"lm_head.weight": "../model.safetensors"}}, "outside its folder: ../model.safetensors"),
        ({"weight_map": {"lm_head.weight": "/etc/hostname"}}, "outside its folder: /etc/hostname"),
        ({"weight_map": {"lm_head.weight": "model-9.safetensors"}}, "lacks model-9.safetensors"),
        ({"weight_map": {"lm_head.weight": 9}}, "has no weight_map"),
        ({"weights": {}}, "has no weight_map"),
        ([], "has no weight_map"),
    ],
)
def test_an_index_that_does_not_hold_is_refused(tmp_path: Path, index: object, reason: str) -> None:
    folder = write_hf(tmp_path / "model", model_of("2"), "50KB")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert reason in refusal(folder)


def test_an_indexed_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = write_hf(tmp_path, model_of("2"), "50KB")
    gone = min(folder.glob("model-*.safetensors"))
    gone.unlink()
    assert f"lacks {gone.name}" in refusal(folder)


def test_a_damaged_shard_among_good_ones_is_named(tmp_path: Path) -> None:
    folder = write_meta(tmp_path, model_of("2"), 2)
    (folder / "consolidated.01.pth").write_bytes((folder / "consolidated.01.pth").read_bytes()[:5000])
    assert "consolidated.01.pth is damaged or cut off" in refusal(folder)


def test_the_models_written_here_differ_from_their_neighbours() -> None:
    """Otherwise a tensor read in the wrong order could pass."""
    state = meta_state(model_of("2"))
    assert meta_params(model_of("2"))["n_kv_heads"] == 2
    for weight in state.values():
        assert weight.unique().numel() > 0.99 * weight.numel()
