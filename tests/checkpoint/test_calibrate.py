"""Calibration of a checkpoint: block by block, on what the quantized model really computes, from any layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_support import EVERYTHING, INT4, MIXED, shard, wide_model
from support import sentencepiece_model, write_hf, write_meta
from torch import Tensor

from llama.checkpoint import calibrate
from llama.checkpoint.calibrate import FEWEST, LENGTH, MOST, calibrated, read_calibration
from llama.checkpoint.quantize import quantize_checkpoint
from llama.checkpoint.source import open_checkpoint
from llama.checkpoint.table import specs
from llama.errors import LlamaError, QuantizationError
from llama.kernels.formats import dequantize, quantize
from llama.quantization.scheme import Scheme
from llama.tokenizer import Tokenizer, load_tokenizer

Matrices = dict[str, tuple[Tensor, Tensor]]
SEQUENCES = torch.randint(3, 320, (24, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_meta(tmp_path_factory.mktemp("calibrate") / "m", wide_model(), 2, embedding_dim=1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(sentencepiece_model(tmp_path_factory.mktemp("tokenizer")))


def matrices(folder: Path, scheme: Scheme, sequences: Tensor = SEQUENCES) -> Matrices:
    found = list(calibrated(open_checkpoint(folder), scheme, sequences))
    assert len({name for name, _, _ in found}) == len(found)
    return {name: (packed, scales) for name, packed, scales in found}


@dataclasses.dataclass
class Calibration:
    """A calibration that was watched: its result, its run, and the blocks in memory whenever one was calibrated."""

    found: Matrices
    run: Any
    there: list[list[int]]


def watch(folder: Path, scheme: Scheme) -> Calibration:
    runs: list[Any] = []
    there: list[list[int]] = []
    make, inner = calibrate._Run, calibrate.calibrate_block

    def seen(*args: Any) -> Any:
        blocks = runs[0].model.layers
        there.append([n for n, block in enumerate(blocks) if not block.attention.wq.weight.is_meta])
        return inner(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "_Run", lambda *args: runs.append(make(*args)) or runs[-1])
        patch.setattr(calibrate, "calibrate_block", seen)
        return Calibration(matrices(folder, scheme), runs[0], there)


@pytest.fixture(scope="module")
def watched(folder: Path) -> dict[Scheme, Calibration]:
    """Calibrations by the schemes that several tests ask for."""
    return {scheme: watch(folder, scheme) for scheme in (INT4, MIXED, EVERYTHING)}


def stored(folder: Path, name: str) -> Tensor:
    tensor = open_checkpoint(folder).tensors[name]
    out = torch.empty(tensor.spec.shape)
    tensor.read_into(tensor.spec.whole, out)
    return out


def write(folder: Path, name: str, scheme: Scheme, found: Matrices) -> Path:
    chosen = ((key, *pair) for key, pair in found.items())
    return quantize_checkpoint(open_checkpoint(folder), folder.parent / name, scheme, chosen=chosen)


@pytest.mark.parametrize("scheme", [INT4, MIXED, EVERYTHING])
def test_every_matrix_of_the_scheme_comes_once_in_its_form(
    folder: Path, watched: dict[Scheme, Calibration], scheme: Scheme
) -> None:
    found = watched[scheme].found
    listed = specs(open_checkpoint(folder).args, scheme)
    assert set(found) == {name for name, spec in listed.items() if spec.form and name.endswith(".weight")}
    for name, (packed, scales) in found.items():
        held = listed[name], listed[name.replace(".weight", ".scales")]
        assert [(t.dtype, tuple(t.shape)) for t in (packed, scales)] == [(s.dtype, s.shape) for s in held]


def test_int4_is_chosen_and_the_rest_rounded_to_the_nearest(folder: Path) -> None:
    found = matrices(folder, Scheme.create("int4", 32, "int8", "int4"))
    for name, packed in found.items():
        form = specs(open_checkpoint(folder).args, Scheme.create("int4", 32, "int8", "int4"))[name].form
        assert form is not None
        nearest = all(map(torch.equal, packed, quantize(stored(folder, name), form)))
        assert nearest == (name in ("output.weight", "tok_embeddings.weight")), name


@pytest.mark.parametrize("scheme", [MIXED, EVERYTHING])
def test_each_block_is_calibrated_on_what_the_quantized_model_gives_it(
    folder: Path, watched: dict[Scheme, Calibration], scheme: Scheme
) -> None:
    """The stream behind the last block is that of the finished model, and the other that of the original."""
    run = watched[scheme].run
    model = shard(write(folder, f"streams_{scheme.to_json()['embedding']}", scheme, watched[scheme].found))
    with torch.no_grad():
        for stream, other in ((run.x, model), (run.original, shard(folder))):
            normed = other.norm(stream)
            assert torch.allclose(normed, other.hidden(SEQUENCES), atol=2e-5)


@pytest.mark.parametrize(("n_sequences", "bar"), [(24, 0.97), (128, 0.85)])
def test_the_outputs_err_less_than_with_plain_rounding(folder: Path, n_sequences: int, bar: float) -> None:
    """Also where there are hardly more tokens than columns: the worst case, since nothing in random weights repeats."""
    scheme = Scheme.create("int4", 64, "int4")
    sequences = torch.randint(3, 320, (n_sequences, 32), generator=torch.Generator().manual_seed(0))
    chosen = shard(write(folder, f"chosen_{n_sequences}", scheme, matrices(folder, scheme, sequences)))
    plain, exact = shard(folder, scheme), shard(folder)
    tokens = torch.randint(3, 320, (24, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = exact(tokens)
        errors = [(model(tokens) - wanted).norm() / wanted.norm() for model in (chosen, plain)]
    assert errors[0] < bar * errors[1]


def test_the_layout_of_the_files_changes_nothing(watched: dict[Scheme, Calibration], tmp_path: Path) -> None:
    ours, theirs = watched[EVERYTHING].found, matrices(write_hf(tmp_path / "hf", wide_model()), EVERYTHING)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(*pair) for name in ours for pair in zip(ours[name], theirs[name], strict=True))


def test_a_tied_output_layer_is_rounded_to_the_nearest(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "tied", wide_model("3.2"))
    found = matrices(folder, EVERYTHING)
    assert "output.weight" not in found
    embedding = quantize(stored(folder, "tok_embeddings.weight"), EVERYTHING.linears)
    assert all(map(torch.equal, found["tok_embeddings.weight"], embedding))
    model = shard(write(folder, "written", EVERYTHING, found))
    assert torch.equal(dequantize(model.output.weight, model.output.scales), dequantize(*embedding))


def test_one_block_at_a_time_is_in_memory(watched: dict[Scheme, Calibration]) -> None:
    one = watched[INT4]
    assert all(len(blocks) == 1 for blocks in one.there)
    assert {block for blocks in one.there for block in blocks} == {0, 1}
    assert all(parameter.is_meta for parameter in one.run.model.layers.parameters())


def test_nothing_to_calibrate_is_refused(folder: Path, watched: dict[Scheme, Calibration]) -> None:
    with pytest.raises(QuantizationError, match="nothing is int4"):
        calibrated(open_checkpoint(folder), Scheme.create("int8"), SEQUENCES)
    written = write(folder, "twice", INT4, watched[INT4].found)
    with pytest.raises(QuantizationError, match="is quantized"):
        calibrated(open_checkpoint(written), INT4, SEQUENCES)
    with pytest.raises(QuantizationError, match="704"):
        calibrated(open_checkpoint(folder), Scheme.create("int4", 128), SEQUENCES)


def test_int8_linears_let_the_output_layer_be_calibrated(folder: Path) -> None:
    scheme = dataclasses.replace(Scheme.create("int8"), output=INT4.linears)
    found = matrices(folder, scheme)
    for name, packed in found.items():
        form = specs(open_checkpoint(folder).args, scheme)[name].form
        assert form is not None
        assert all(map(torch.equal, packed, quantize(stored(folder, name), form))) == (name != "output.weight"), name


# -- the text --------------------------------------------------------------------------------------


def text_of(tokenizer: Tokenizer, n_tokens: int) -> str:
    text = "the quick brown fox " * n_tokens
    return tokenizer.decode(tokenizer.encode(text, bos=False, eos=False)[:n_tokens])


def test_a_text_becomes_whole_sequences(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text(text_of(tokenizer, 5 * LENGTH))
    sequences = read_calibration(file, tokenizer)
    assert sequences.shape == (5, LENGTH)
    assert sequences[:, 0].eq(tokenizer.bos_id).all()
    tokens = tokenizer.encode(file.read_text(), bos=False, eos=False)
    assert sequences[:, 1:].flatten().tolist() == tokens[: 5 * (LENGTH - 1)]


def test_of_a_long_text_sequences_are_drawn_evenly(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("".join(f"number {n} " for n in range(MOST)))
    tokens = tokenizer.encode(file.read_text(), bos=False, eos=False)
    n_whole, n_drawn = len(tokens) // (LENGTH - 1), MOST // LENGTH
    assert n_whole > 2 * n_drawn
    firsts = [number * n_whole // n_drawn * (LENGTH - 1) for number in range(n_drawn)]
    sequences = read_calibration(file, tokenizer)
    assert sequences[:, 1:].tolist() == [tokens[first : first + LENGTH - 1] for first in firsts]


def test_a_short_text_is_refused_with_both_numbers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file, needed = tmp_path / "short.txt", FEWEST // LENGTH * (LENGTH - 1)
    file.write_text(text_of(tokenizer, needed - 1))
    with pytest.raises(QuantizationError, match=rf"short.txt has {needed - 1} tokens.*{needed} at least"):
        read_calibration(file, tokenizer)
    file.write_text(text_of(tokenizer, needed))
    assert len(read_calibration(file, tokenizer)) == FEWEST // LENGTH


def test_a_file_that_is_no_text_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 9000)
    with pytest.raises(LlamaError, match=r"latin.txt is not UTF-8"):
        read_calibration(tmp_path / "latin.txt", tokenizer)
    with pytest.raises(LlamaError, match=r"cannot read .*nowhere"):
        read_calibration(tmp_path / "nowhere", tokenizer)
