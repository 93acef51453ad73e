"""A model quantized as it is read: its dequantized reference, the same integers everywhere, little memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quantized_support import (
    CUTS,
    EVERYTHING,
    INT4,
    INT8,
    SCHEMES,
    joined,
    own_parts,
    rounded,
    same,
    shard,
    wide_model,
    write_state,
)
from support import gather_logits, meta_state, write_hf, write_meta
from torch import Tensor

from llama import config
from llama.checkpoint import files, rows
from llama.checkpoint.load import cut_model, load_model, materialise
from llama.checkpoint.source import open_checkpoint
from llama.checkpoint.table import specs
from llama.config import ModelArgs
from llama.errors import QuantizationError
from llama.kernels.formats import quantize
from llama.model import Transformer
from llama.parallel.groups import Ranks
from llama.parallel.partition import Partition
from llama.quantization.scheme import Scheme
from scripts.bench.counters import peak_bytes

OnRanks = Callable[..., list]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_meta(tmp_path_factory.mktemp("wide") / "m", wide_model(), 2, embedding_dim=1, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def references(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each scheme a float32 checkpoint of the numbers that its integers stand for."""
    state = {name: weight.bfloat16() for name, weight in meta_state(wide_model()).items()}
    place = tmp_path_factory.mktemp("references")
    return {
        name: write_state(place / name, wide_model(), {k: w.float() for k, w in rounded(state, scheme).items()})
        for name, scheme in SCHEMES.items()
    }


def answers(folder: Path, scheme: Scheme | None, tensor_split: str | None) -> tuple[Tensor, Tensor]:
    """Whole logits of a few tokens, and the gradient that reaches a soft prompt before them."""
    model = shard(folder, scheme, tensor_split)
    tokens = torch.arange(40).reshape(2, 20) * 7 % model.args.vocab_size
    logits = gather_logits(model, model(tokens).detach())
    generator = torch.Generator().manual_seed(3)
    prompt = (torch.randn(1, 5, model.args.dim, generator=generator) * 0.1).requires_grad_()
    words = model.tok_embeddings(tokens[:1])
    slope = torch.linspace(-1, 1, model.args.vocab_size)
    own = model.partition.vocab[model.ranks.rank]
    out = model(embeddings=torch.cat((prompt, words), dim=1))
    # Of this rank's part of the vocabulary: the blocks sum the gradient over the ranks.
    (out * slope[own.start : own.stop]).mean(dim=1).sum().backward()
    assert prompt.grad is not None
    return logits, prompt.grad


@pytest.fixture(scope="module")
def alone() -> Callable[[Path], tuple[Tensor, Tensor]]:
    """What one process makes of a checkpoint as it is, once."""
    return functools.cache(lambda folder: answers(folder, None, None))


@pytest.mark.parametrize(("world_size", "tensor_split"), CUTS)
@pytest.mark.parametrize("name", SCHEMES)
def test_it_is_its_own_dequantized_reference(
    on_ranks: OnRanks, folder: Path, alone: Callable[[Path], tuple[Tensor, Tensor]], references: dict[str, Path],
    name: str, world_size: int, tensor_split: str | None,
) -> None:  # fmt: skip
    logits, slope = alone(references[name])
    for found, gradient in on_ranks(world_size, answers, folder, SCHEMES[name], tensor_split):
        assert (found - logits).abs().max() < 1e-5 * logits.abs().max()
        assert (gradient - slope).abs().max() < 1e-5 * slope.abs().max()
    plain = alone(folder)[0]
    assert (plain - logits).abs().max() > 1e-3 * logits.abs().max(), "nothing was rounded"


@pytest.mark.parametrize(("world_size", "tensor_split"), CUTS[1:])
@pytest.mark.parametrize("scheme", [INT8, EVERYTHING], ids=["int8", "int4"])
def test_every_world_size_holds_the_same_integers(
    on_ranks: OnRanks, folder: Path, scheme: Scheme, world_size: int, tensor_split: str | None
) -> None:
    whole = joined([own_parts(folder, scheme)])
    assert same(joined(on_ranks(world_size, own_parts, folder, scheme, tensor_split)), whole)


@pytest.mark.parametrize("layout", ["meta", "hf"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_integers_are_those_of_the_stored_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, stored: torch.dtype
) -> None:
    """Whatever the chunks, and whatever is computed in."""
    monkeypatch.setattr(rows, "CHUNK_BYTES", 40_000)
    monkeypatch.setattr(files, "PIECE_BYTES", 10_000)
    model = wide_model("3.1").to(stored)
    folder = write_hf(tmp_path, model) if layout == "hf" else write_meta(tmp_path, model, 2, 1, dtype=stored)
    held = dict(shard(folder, INT4, dtype=torch.bfloat16).named_parameters())
    for name, weight in meta_state(model).items():
        form = specs(open_checkpoint(folder).args, INT4)[name].form
        if form is None:
            assert torch.equal(held[name], weight.bfloat16())
            continue
        packed, scales = quantize(weight, form)
        assert torch.equal(held[name], packed), name
        assert torch.equal(held[name.replace("weight", "scales")], scales), name


# -- tied models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("scheme", [INT8, EVERYTHING], ids=["int8", "int4"])
def test_a_tied_output_is_quantized_once(on_ranks: OnRanks, tmp_path: Path, scheme: Scheme, world_size: int) -> None:
    model = wide_model("3.2")
    write_hf(tmp_path / "m", model)
    state = rounded(meta_state(model), scheme, tied=True)
    untied = write_state(tmp_path / "reference", model, state)
    expected = answers(untied, None, None)[0]
    for found, _ in on_ranks(world_size, answers, tmp_path / "m", scheme, None):
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    held = shard(tmp_path / "m", scheme)
    assert held.output.weight is held.tok_embeddings.weight
    assert held.output.scales is held.tok_embeddings.scales


def test_a_tie_is_kept_where_nothing_of_it_is_quantized(tmp_path: Path) -> None:
    held = shard(write_hf(tmp_path, wide_model("3.2")), Scheme.create("int8", output="none"))
    assert held.output.weight is held.tok_embeddings.weight
    assert held.output.weight.dtype == torch.float32


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_output_that_tuning_set_apart_is_seen_by_every_rank(
    on_ranks: OnRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    """One row differs, and one rank alone holds it; the embedding is rounded with the output or not at all."""
    model = wide_model("3.2")
    state = meta_state(model)
    state["output.weight"][-1] += 1
    write_state(tmp_path / "m", model, state)
    parts = on_ranks(world_size, apart_parts, tmp_path / "m")
    assert {name for part in parts for name in part if name.startswith("tok_embeddings")} == {"tok_embeddings.weight"}
    assert torch.equal(joined(parts)["tok_embeddings.weight"], state["tok_embeddings.weight"])


def apart_parts(folder: Path) -> dict[str, tuple[tuple[slice, ...], Tensor]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "LLAMA_3_2_GEOMETRIES", frozenset({(256, 2)}))
        return own_parts(folder, INT8)


# -- memory ----------------------------------------------------------------------------------------


def test_materialising_keeps_ties_and_angles() -> None:
    args = ModelArgs(64, 2, 8, vocab_size=320, multiple_of=32, tied=True)
    model = Transformer(args, Partition.create(args), Ranks(), device="meta")
    materialise(model, "cpu")
    assert model.output.weight is model.tok_embeddings.weight
    assert not model.output.weight.is_meta
    assert torch.equal(model.rope_frequencies, Transformer(args, Partition.create(args), Ranks()).rope_frequencies)
    assert "rope_frequencies" not in model.state_dict()


@pytest.mark.parametrize("scheme", [INT8, EVERYTHING], ids=["int8", "int4"])
@pytest.mark.parametrize("rank", [0, 1])
def test_loading_takes_the_quantized_size_and_a_few_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: Scheme, rank: int
) -> None:
    monkeypatch.setattr(rows, "CHUNK_BYTES", 64 << 10)
    monkeypatch.setattr(files, "PIECE_BYTES", 64 << 10)
    folder = write_meta(tmp_path, wide_model(num_hidden_layers=4), dtype=torch.bfloat16)
    checkpoint = open_checkpoint(folder)
    partition = cut_model(checkpoint.args, scheme, 2)
    held: list[Transformer] = []
    peak = peak_bytes(lambda: held.append(load_model(checkpoint, partition, Ranks(rank, 2), torch.bfloat16, scheme)))
    size = sum(parameter.nbytes for parameter in held[0].parameters())
    # A matrix in float32 would be 0.7 MB of the 1.5.
    assert size < peak < size + 6 * rows.CHUNK_BYTES


# -- what cannot be --------------------------------------------------------------------------------


def test_a_cut_inside_a_group_is_refused_before_anything_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(folder)
    monkeypatch.delattr(files.StoredTensor, "pieces")
    for size, n_ranks, column in ((64, 8, 32), (128, 4, 64)):
        scheme = Scheme.create("int4", size)
        words = rf"attention\.wo\.weight would be cut at column {column}, inside a group of {size}.*fewer ranks"
        with pytest.raises(QuantizationError, match=words):
            cut_model(wide_args(n_kv_heads=8), scheme, n_ranks)
    partition = Partition.create(checkpoint.args, 8, ffn_block=64)
    with pytest.raises(QuantizationError, match="or groups of 32"):
        load_model(checkpoint, partition, Ranks(0, 8), torch.float32, Scheme.create("int4", 64))


def wide_args(**changes: int) -> ModelArgs:
    return ModelArgs(**{"dim": 256, "n_layers": 2, "n_heads": 8, "vocab_size": 320, "ffn_dim": 1024, **changes})


def test_narrow_heads_leave_int8(folder: Path) -> None:
    args = wide_args(dim=128, n_kv_heads=8)
    with pytest.raises(QuantizationError, match=r"column 16, inside a group of 32.*or int8"):
        cut_model(args, INT4, 8)
    cut_model(args, INT8, 8)


def test_groups_must_divide_the_rows() -> None:
    with pytest.raises(QuantizationError, match=r"rows of 1000, which groups of 32 do not divide: use int8"):
        cut_model(wide_args(ffn_dim=1000), INT4, 1)
