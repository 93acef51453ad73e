"""The table of tensors: sizes are sums over it, and another family's tensors are rows of it, nothing else."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import hf_model, meta_state, write_hf, write_meta

from llama.checkpoint import manifest, table
from llama.checkpoint.source import open_checkpoint
from llama.checkpoint.split import split
from llama.checkpoint.table import Row, layer_params, n_params, n_unique_params, own_size, rank_params, specs
from llama.config import ModelArgs, geometry
from llama.parallel.partition import Partition
from llama.plan.needs import weight_bytes
from llama.quantization.scheme import Scheme

BIAS, NORM = "layers.{}.attention.wq.bias", "layers.{}.attention.q_norm.weight"


def has_extras(args: ModelArgs) -> bool:
    return args.norm_eps == 1e-5


@pytest.fixture
def _family(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family with a bias on q and a norm on each head of q."""
    more = (
        Row(BIAS, "model.layers.{}.self_attn.q_proj.bias", "blk.{}.attn_q.bias", ("q",), True, "", has_extras),
        Row(NORM, "model.layers.{}.self_attn.q_norm.weight", "", ("head",), True, "", has_extras),
    )  # fmt: skip
    monkeypatch.setattr(table, "BLOCK", (*table.BLOCK, *more))


def test_sizes_are_those_of_what_transformers_makes() -> None:
    model = hf_model("3")
    args = ModelArgs.from_hf(model.config.to_dict())
    assert n_unique_params(args) == model.num_parameters()
    assert layer_params(args) == sum(p.numel() for p in model.model.layers[0].parameters())


def test_a_tied_output_layer_is_counted_once_in_memory_and_twice_in_files() -> None:
    args = geometry("llama-3.2-1b")
    assert n_params(args) - n_unique_params(args) == args.vocab_size * args.dim
    assert rank_params(Partition.create(args, 1), 0) == n_unique_params(args)


@pytest.mark.usefixtures("_family")
def test_a_row_exists_where_its_geometry_says() -> None:
    with_extras, without = geometry("llama-3-8b"), geometry("llama-1-7b")
    assert BIAS.format(31) in specs(with_extras)
    assert BIAS.format(0) not in specs(without)
    assert layer_params(with_extras) == 218_112_000 + 4096 + 128
    assert layer_params(without) == 202_383_360


@pytest.mark.usefixtures("_family")
def test_a_new_row_is_cut_planned_and_kept_from_integers() -> None:
    args = geometry("llama-3-8b")
    for world_size in (1, 2, 3):
        partition = Partition.create(args, world_size)
        bias, norm = specs(args)[BIAS.format(0)], specs(args)[NORM.format(0)]
        for rank in range(world_size):
            assert own_size(bias, partition, rank) == len(partition.q_rows[rank])
            assert own_size(norm, partition, rank) == 128
            layer, _ = weight_bytes(partition, rank, torch.bfloat16)
            assert sum(layer) == 2 * (rank_params(partition, rank) - _outside(partition, rank)) // args.n_layers
    int4 = Scheme.create("int4")
    held = specs(args, int4)
    assert held[BIAS.format(0)].form is held[NORM.format(0)].form is None
    assert held["layers.0.attention.wq.weight"].form == int4.linears


def _outside(partition: Partition, rank: int) -> int:
    return 2 * partition.args.dim * len(partition.vocab[rank]) + partition.args.dim


@pytest.mark.usefixtures("_family")
def test_a_new_row_is_read_from_hugging_faces_order_and_split(tmp_path: Path) -> None:
    model = hf_model("2", rms_norm_eps=1e-5)
    args = ModelArgs.from_hf(model.config.to_dict())
    bias = torch.arange(args.n_heads * args.head_dim, dtype=torch.float32)
    norm = torch.arange(args.head_dim, dtype=torch.float32)
    extras = {}
    for layer in range(args.n_layers):
        extras[f"model.layers.{layer}.self_attn.q_proj.bias"] = bias
        extras[f"model.layers.{layer}.self_attn.q_norm.weight"] = norm
    folder = write_hf(tmp_path / "hf", model)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file({**weights, **{name: tensor.clone() for name, tensor in extras.items()}}, folder / "model.safetensors")

    def in_meta_order(values: torch.Tensor) -> torch.Tensor:
        return values.view(-1, 2, args.head_dim // 2).transpose(1, 2).flatten()

    checkpoint = open_checkpoint(folder)
    for name, wanted in ((BIAS, in_meta_order(bias)), (NORM, in_meta_order(norm))):
        tensor = checkpoint.tensors[name.format(1)]
        found = torch.empty(tensor.spec.shape)
        tensor.read_into(tensor.spec.whole, found)
        assert torch.equal(found, wanted)
    written = split(folder, 2, tmp_path / "fs2")
    assert manifest.verify(written) > 0
    shards = [torch.load(file) for file in sorted(written.glob("*.pth"))]
    assert torch.equal(torch.cat([shard[BIAS.format(0)] for shard in shards]), in_meta_order(bias))
    assert all(torch.equal(shard[NORM.format(0)], in_meta_order(norm)) for shard in shards)


@pytest.mark.usefixtures("_family")
def test_a_file_without_the_new_tensors_is_refused_by_name(tmp_path: Path) -> None:
    model = hf_model("2", rms_norm_eps=1e-5)
    assert BIAS.format(0) not in meta_state(model)
    with pytest.raises(ValueError, match=r"missing.*layers\.0\.attention\.wq\.bias"):
        open_checkpoint(write_meta(tmp_path, model))
