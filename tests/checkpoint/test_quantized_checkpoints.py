"""Quantized checkpoints: written, read at any world size, cut again exactly; what they cannot become is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_support import (
    CUTS,
    EVERYTHING,
    INT4,
    INT8,
    MIXED,
    SCHEMES,
    joined,
    own_parts,
    same,
    shard,
    wide_model,
    write_state,
)  # fmt: skip
from support import meta_state, sentencepiece_model, write_hf, write_meta
from torch import Tensor

from llama import config
from llama.adapters.adapter import LoraAdapter
from llama.adapters.fold import merge_adapter
from llama.checkpoint import files, folders, manifest, rows
from llama.checkpoint.convert import convert
from llama.checkpoint.quantize import quantize_checkpoint
from llama.checkpoint.source import open_checkpoint
from llama.checkpoint.split import split
from llama.checkpoint.table import specs
from llama.errors import CheckpointError, LlamaError, QuantizationError
from llama.export.gguf import export_gguf
from llama.kernels.formats import quantize
from llama.quantization.scheme import Scheme
from llama.tokenizer import load_tokenizer
from scripts.bench.counters import peak_bytes

OnRanks = Callable[..., list]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    return write_meta(folder / "m", wide_model(), 2, embedding_dim=1, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def written(original: Path) -> dict[str, Path]:
    """The checkpoint in each scheme."""
    return {name: write(original, name.replace(" ", "_"), scheme) for name, scheme in SCHEMES.items()}


def write(source: Path, name: str, scheme: Scheme, **options: Any) -> Path:
    return quantize_checkpoint(open_checkpoint(source), source.parent / name, scheme, **options)


def whole(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, read whole."""
    state = {}
    for name, tensor in open_checkpoint(folder).tensors.items():
        state[name] = torch.empty(tensor.spec.shape, dtype=tensor.dtype)
        tensor.read_into(tensor.spec.whole, state[name])
    return state


@pytest.mark.parametrize("name", SCHEMES)
def test_files_hold_integers_and_scales(original: Path, written: dict[str, Path], name: str) -> None:
    folder, scheme, args = written[name], SCHEMES[name], open_checkpoint(original).args
    expected = {}
    for tensor, weight in meta_state(wide_model()).items():
        form = specs(args, scheme)[tensor].form
        if form is None:
            expected[tensor] = weight.bfloat16()
        else:
            packed, scales = quantize(weight.bfloat16(), form)
            expected |= {tensor: packed, tensor.replace("weight", "scales"): scales}
    state = torch.load(folder / "consolidated.00.pth", weights_only=True)
    assert same(state, expected)
    assert same(whole(folder), expected)
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.scheme, checkpoint.dtype, checkpoint.format) == (scheme, torch.bfloat16, "meta")
    assert manifest.verify(folder) == len(expected)


@pytest.mark.parametrize(("world_size", "tensor_split"), CUTS)
@pytest.mark.parametrize("name", ["int8", "everything int4"])
def test_every_world_size_loads_what_quantizing_at_load_gives(
    on_ranks: OnRanks, original: Path, written: dict[str, Path], name: str, world_size: int, tensor_split: str | None
) -> None:
    expected = joined([own_parts(original, SCHEMES[name])])
    assert same(joined(on_ranks(world_size, own_parts, written[name], None, tensor_split)), expected)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("n_files", "tensor_split"), [(2, None), (3, None), (2, "3,1")])
def test_splitting_and_merging_is_exact(tmp_path: Path, name: str, n_files: int, tensor_split: str | None) -> None:
    source = write_meta(tmp_path / "m", wide_model("3.1"), 2)
    folder = write(source, "q", SCHEMES[name])
    parts = split(folder, n_files, tensor_split=tensor_split)
    assert open_checkpoint(parts).n_shards == n_files
    assert same(whole(parts), whole(folder))
    merged = split(parts, 1, names="consolidated", output_dir=tmp_path / "merged")
    assert same(*(torch.load(f / "consolidated.00.pth", weights_only=True) for f in (merged, folder)))
    assert json.loads((merged / "params.json").read_text()) == json.loads((folder / "params.json").read_text())
    again = split(split(merged, 4, output_dir=tmp_path / "four"), 3, output_dir=tmp_path / "three")
    assert same(whole(again), whole(folder))
    for shards in (parts, again):
        manifest.verify(shards)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("scheme", [INT8, EVERYTHING], ids=["int8", "int4"])
def test_a_split_original_quantizes_to_the_same_integers(
    on_ranks: OnRanks, original: Path, tmp_path: Path, scheme: Scheme, world_size: int
) -> None:
    parts = split(original, 2, output_dir=tmp_path / "parts", tensor_split="2,1")
    expected = joined([own_parts(original, scheme)])
    assert same(joined(on_ranks(world_size, own_parts, parts, scheme)), expected)


def test_a_split_converts_the_numbers_alone(written: dict[str, Path], tmp_path: Path) -> None:
    before, after = whole(written["int4"]), whole(split(written["int4"], 2, tmp_path / "half", dtype=torch.float16))
    for name, tensor in before.items():
        is_number = name in ("tok_embeddings.weight",) or "norm" in name
        assert after[name].dtype == (torch.float16 if is_number else tensor.dtype)
        assert torch.equal(after[name], tensor.to(after[name].dtype))


def test_a_quantized_embedding_is_cut_by_rows(original: Path, written: dict[str, Path], tmp_path: Path) -> None:
    for name, dim in (("everything int4", 0), ("int4", 1)):
        parts = split(written[name], 2, tmp_path / name)
        pieces = [torch.load(file, weights_only=True)["tok_embeddings.weight"] for file in sorted(parts.glob("*.pth"))]
        assert torch.equal(torch.cat(pieces, dim), whole(written[name])["tok_embeddings.weight"])
    cut = json.loads((tmp_path / "everything int4" / "manifest.json").read_text())["partition"]
    assert cut["embedding_cut"] == "vocabulary"


# -- tied models -----------------------------------------------------------------------------------


@pytest.fixture
def llama_3_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta's params.json of the small model's sizes means a tied one."""
    monkeypatch.setattr(config, "LLAMA_3_2_GEOMETRIES", frozenset({(256, 2)}))


@pytest.mark.usefixtures("llama_3_2")
@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_a_tied_output_is_written_twice_and_held_once(tmp_path: Path, layout: str) -> None:
    model = wide_model("3.2")
    source = write_hf(tmp_path / "m", model) if layout == "hf" else write_meta(tmp_path / "m", model, 2)
    folder = write(source, "q", EVERYTHING)
    state = torch.load(folder / "consolidated.00.pth", weights_only=True)
    for part in ("weight", "scales"):
        assert torch.equal(state[f"output.{part}"], state[f"tok_embeddings.{part}"])
    held = shard(folder)
    assert held.output.weight is held.tok_embeddings.weight
    assert held.output.scales is held.tok_embeddings.scales
    assert same(joined([own_parts(folder, None)]), joined([own_parts(source, EVERYTHING)]))
    assert same(whole(split(folder, 3)), whole(folder))


@pytest.mark.usefixtures("llama_3_2")
def test_a_tied_output_that_is_stored_once_is_split_into_two_copies(tmp_path: Path) -> None:
    folder = write(write_meta(tmp_path / "m", wide_model("3.2")), "q", EVERYTHING)
    state = torch.load(folder / "consolidated.00.pth", weights_only=True)
    torch.save({k: v for k, v in state.items() if not k.startswith("output")}, folder / "consolidated.00.pth")
    assert same(whole(split(folder, 2)), state)


@pytest.mark.usefixtures("llama_3_2")
@pytest.mark.parametrize("scheme", [INT8, EVERYTHING, MIXED], ids=["int8", "int4", "mixed"])
def test_an_output_that_was_set_apart_stays_apart(tmp_path: Path, scheme: Scheme) -> None:
    state = meta_state(wide_model("3.2"))
    state["output.weight"] = state["output.weight"] + 1
    source = write_state(tmp_path / "m", wide_model("3.2"), state)
    folder = write(source, "q", scheme)
    held = shard(folder)
    assert held.output.weight is not held.tok_embeddings.weight
    assert same(joined([own_parts(folder, None)]), joined([own_parts(source, scheme)]))


@pytest.mark.usefixtures("llama_3_2")
def test_scales_tell_copies_apart_too(tmp_path: Path) -> None:
    for name, scheme in {"int4": EVERYTHING, "int8": INT8}.items():
        folder = write(write_meta(tmp_path / name / "m", wide_model("3.2")), "q", scheme)
        state = torch.load(folder / "consolidated.00.pth", weights_only=True)
        state["output.scales"][-1] *= 2
        torch.save(state, folder / "consolidated.00.pth")
    held = shard(tmp_path / "int4" / "q")
    assert torch.equal(held.output.scales[-1], held.tok_embeddings.scales[-1] * 2)
    # An embedding of its own would not have been quantized.
    with pytest.raises(CheckpointError, match=r"tok_embeddings\.weight is held as the output layer's own integers"):
        shard(tmp_path / "int8" / "q")


def test_a_tie_that_params_cannot_say_gives_the_same_values(tmp_path: Path) -> None:
    """Of sizes that are not Llama 3.2's, the embedding is stored as the output is."""
    source = write_hf(tmp_path / "m", wide_model("3.2"))
    folder = write(source, "q", INT8)
    held, expected = shard(folder), shard(source, INT8)
    for layer in ("tok_embeddings", "output"):
        for part in ("weight", "scales"):
            assert torch.equal(getattr(getattr(held, layer), part), getattr(getattr(expected, layer), part))


# -- writing ---------------------------------------------------------------------------------------


class Nowhere:
    """A writer that keeps nothing; laying a file out would count untouched memory."""

    def __init__(self, *_: object) -> None: ...

    def append(self, *_: object) -> list[Any]:
        return []

    def finish(self) -> dict[str, str]:
        return {}

    def close(self) -> None: ...


def test_memory_is_a_few_rows(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama.checkpoint.save.PthWriter", Nowhere)
    monkeypatch.setattr(rows, "CHUNK_BYTES", 64 << 10)
    monkeypatch.setattr(files, "PIECE_BYTES", 64 << 10)
    checkpoint = open_checkpoint(original)
    peak = peak_bytes(lambda: quantize_checkpoint(checkpoint, original.parent / "streamed", INT4))
    assert peak < 6 * rows.CHUNK_BYTES


def test_chosen_roundings_are_written_in_their_order(original: Path) -> None:
    """What a calibration gives, whichever tensor it comes to first; the others are rounded to the nearest."""
    nearest = whole(write(original, "nearest", INT4))
    names = ["layers.1.feed_forward.w2.weight", "layers.0.attention.wq.weight"]

    def chosen() -> Iterator[tuple[str, Tensor, Tensor]]:
        for name in names:
            yield name, torch.zeros_like(nearest[name]), nearest[name.replace("weight", "scales")] * 2

    found = whole(write(original, "chosen", Scheme.create("int4", calibrated=True), chosen=chosen()))
    for name, tensor in nearest.items():
        if name in names:
            assert not found[name].any()
        elif name.replace("scales", "weight") in names:
            assert torch.equal(found[name], tensor * 2)
        else:
            assert torch.equal(found[name], tensor)
    assert open_checkpoint(original.parent / "chosen").scheme == Scheme.create("int4", calibrated=True)


def test_a_failure_leaves_nothing(original: Path, tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, Tensor, Tensor]]:
        raise QuantizationError("the text is too short")
        yield

    with pytest.raises(QuantizationError, match="too short"):
        quantize_checkpoint(open_checkpoint(original), tmp_path / "out", INT4, chosen=broken())
    assert not list(tmp_path.iterdir())


def test_space_is_checked_and_the_tokenizer_comes_along(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentencepiece_model(original.parent)
    assert (write(original, "with_tokenizer", INT4) / "tokenizer.model").exists()
    with pytest.raises(CheckpointError, match="add --force"):
        write(original, "with_tokenizer", INT4)
    write(original, "with_tokenizer", INT8, force=True)
    monkeypatch.setattr(folders, "OVERHEAD_BYTES", 1 << 60)
    with pytest.raises(CheckpointError, match="GB free"):
        write(original, "large", INT4)


# -- what is refused -------------------------------------------------------------------------------


def lora() -> LoraAdapter:
    return LoraAdapter(1, 1.0, ("wq",), {"layers.0.attention.wq": (torch.ones(1, 256), torch.ones(256, 1))})


def test_what_needs_the_weights_themselves_is_refused(written: dict[str, Path], tmp_path: Path) -> None:
    folder = written["int4"]
    model = sentencepiece_model(tmp_path / "tokenizer")
    ways: dict[str, Callable[[], object]] = {
        "--to hf": lambda: convert(folder, "hf", tmp_path / "out"),
        "--to single": lambda: convert(folder, "single", tmp_path / "out.pth"),
        "folding an adapter in": lambda: merge_adapter(folder, lora(), "lora", tmp_path / "out"),
        "a GGUF file": lambda: export_gguf(
            open_checkpoint(folder), load_tokenizer(model), tmp_path / "out.gguf", "f16"
        ),
        "quantizing it anew": lambda: quantize_checkpoint(open_checkpoint(folder), tmp_path / "out", INT8),
    }
    for words, way in ways.items():
        with pytest.raises(
            QuantizationError, match=rf"int4 in groups of 32, output int8\).*{words}.*original checkpoint"
        ):
            way()
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_converting_to_metas_layout_is_a_merge(written: dict[str, Path], tmp_path: Path) -> None:
    assert same(
        whole(convert(split(written["mixed"], 2, tmp_path / "s"), "meta", tmp_path / "m")), whole(written["mixed"])
    )


Break = Callable[[dict[str, Tensor], dict[str, Any]], object]
BROKEN: dict[str, tuple[Break, str]] = {
    "integers without a word": (
        lambda _, params: params.pop("quantization"),
        r"output\.weight is stored as int8; only float32",
    ),
    "integers where numbers are expected": (
        lambda state, _: state.update({"norm.weight": state["norm.weight"].to(torch.int8)}),
        r"of another dtype.*norm\.weight is int8, expected a dtype of numbers",
    ),
    "numbers where integers are expected": (
        lambda state, _: state.update({"output.weight": state["output.weight"].float()}),
        r"output\.weight is float32, expected int8",
    ),
    "another type": (
        lambda _, params: params["quantization"].update(type="int8", group_size=0),
        r"wq\.weight is uint8, expected int8",
    ),
    "another group size": (
        lambda _, params: params["quantization"].update(group_size=64),
        r"wq\.scales is \[256, 8\], expected \[256, 4\]",
    ),
    "scales missing": (
        lambda state, _: state.pop("layers.1.attention.wo.scales"), r"missing: layers\.1\.attention\.wo\.scales"
    ),
    "scales in other numbers": (
        lambda state, _: state.update({"output.scales": state["output.scales"].bfloat16()}),
        r"output\.scales is bfloat16, expected float32",
    ),
    "a type that does not exist": (
        lambda _, params: params["quantization"].update(type="int3"), r"params\.json: .*'int3' is not one of int8, int4"
    ),
    "half a scheme": (
        lambda _, params: params["quantization"].pop("output"), r"params\.json: quantization must be an object of"
    ),
    "groups that do not divide": (
        lambda _, params: params["quantization"].update(group_size=128), r"w2\) has rows of 704, which groups of 128"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_contradicts_itself_is_refused(written: dict[str, Path], tmp_path: Path, name: str) -> None:
    source, (change, words) = written["int4"], BROKEN[name]
    state = torch.load(source / "consolidated.00.pth", weights_only=True)
    params = json.loads((source / "params.json").read_text())
    change(state, params)
    torch.save(state, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps(params))
    with pytest.raises(LlamaError, match=words):
        open_checkpoint(tmp_path)
