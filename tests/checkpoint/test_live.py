"""A running model is written as its checkpoint would be, bit for bit, whatever the ranks that hold it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from quantized_support import INT4, INT8, shard, wide_model
from support import hf_model, sentencepiece_model, write_hf, write_meta
from torch import Tensor

from llama import config
from llama.checkpoint.convert import convert, convert_checkpoint
from llama.checkpoint.live import save_live
from llama.checkpoint.quantize import quantize_checkpoint
from llama.checkpoint.source import Checkpoint, open_checkpoint
from llama.checkpoint.split import split, split_checkpoint
from llama.errors import LlamaError
from llama.parallel import groups

OnRanks = Callable[..., list]
CUTS = [(1, None), (2, None), (2, "3,1"), (3, None), (3, "1,1,2")]


def contents(path: Path) -> dict[str, bytes]:
    files = path.parent.glob(f"{path.name}*") if path.is_file() else path.iterdir()
    return {file.name: file.read_bytes() for file in files}


def to_two_files(checkpoint: Checkpoint, output: Path) -> Path:
    return split_checkpoint(checkpoint, 2, output, tensor_split="1,1")


def converted(checkpoint: Checkpoint, output: Path, to: str) -> Path:
    return convert_checkpoint(checkpoint, to, output, None, 60_000, None, False)


def saved(folder: Path, out: Path, tensor_split: str | None, dtype: torch.dtype) -> None:
    """On every rank: the model loaded from `folder`, written in all layouts."""
    origin = open_checkpoint(folder)
    model = shard(folder, None, tensor_split, dtype)
    save_live(model, origin, partial(to_two_files, output=out / "parts"))
    if origin.scheme is None:
        save_live(model, origin, partial(converted, output=out / "hf", to="hf"))
        save_live(model, origin, partial(converted, output=out / "single.pth", to="single"))


def expected(folder: Path, out: Path) -> None:
    """The same from the checkpoint itself."""
    split(folder, 2, out / "parts", tensor_split="1,1")
    if open_checkpoint(folder).scheme is None:
        convert(folder, "hf", out / "hf", max_shard_size="60KB")
        convert(folder, "single", out / "single.pth")


def check(
    on_ranks: OnRanks, folder: Path, tmp_path: Path, n_ranks: int, tensor_split: str | None, dtype: torch.dtype
) -> None:
    expected(folder, tmp_path / "expected")
    on_ranks(n_ranks, saved, folder, tmp_path / "found", tensor_split, dtype)
    names = sorted(path.name for path in (tmp_path / "expected").iterdir())
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == names
    for name in names:
        assert contents(tmp_path / "found" / name) == contents(tmp_path / "expected" / name)


@pytest.mark.parametrize(("world_size", "tensor_split"), CUTS)
@pytest.mark.parametrize(("layout", "generation"), [("hf", "2"), ("meta", "3.1"), ("hf", "3.2")])
def test_a_loaded_model_is_written_as_its_checkpoint_is(
    on_ranks: OnRanks, tmp_path: Path, layout: str, generation: str, world_size: int, tensor_split: str | None
) -> None:
    """With two KV heads, three ranks hold copies of them."""
    folder, model = tmp_path / "model", hf_model(generation)
    (write_hf if layout == "hf" else write_meta)(folder, model)
    sentencepiece_model(folder)
    check(on_ranks, folder, tmp_path, world_size, tensor_split, torch.float32)


@pytest.mark.parametrize("world_size", [1, 2])
def test_narrow_dtypes_travel_as_they_are(on_ranks: OnRanks, tmp_path: Path, world_size: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        folder = write_meta(tmp_path / str(dtype) / "model", hf_model("3"), 2, dtype=dtype)
        check(on_ranks, folder, folder.parent, world_size, None, dtype)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("scheme", [INT8, INT4], ids=["int8", "int4"])
def test_integers_and_scales_travel_too(on_ranks: OnRanks, tmp_path: Path, scheme: object, world_size: int) -> None:
    source = open_checkpoint(write_meta(tmp_path / "m", wide_model()))
    folder = quantize_checkpoint(source, tmp_path / "model", scheme)
    check(on_ranks, folder, tmp_path, world_size, None, torch.float32)


def test_metas_second_copy_of_a_tied_output_is_written_again(
    on_ranks: OnRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "LLAMA_3_2_GEOMETRIES", frozenset({(64, 2)}))
    folder = write_meta(tmp_path / "model", hf_model("3.2"))
    assert shard(folder).args.tied
    check(on_ranks, folder, tmp_path, 1, None, torch.float32)


def changed_and_saved(folder: Path, out: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    model = shard(folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(-1.5)
    save_live(model, open_checkpoint(folder), partial(split_checkpoint, n_shards=1, output_dir=out, dtype=dtype))
    return {}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_weights_are_those_of_the_model_not_of_the_files(
    on_ranks: OnRanks, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    folder = write_hf(tmp_path / "model", hf_model("2"))
    on_ranks(2, changed_and_saved, folder, tmp_path / "out", dtype)
    before, after = open_checkpoint(folder).tensors, open_checkpoint(tmp_path / "out").tensors
    for name, tensor in after.items():
        was, now = torch.empty(tensor.spec.shape), torch.empty(tensor.spec.shape, dtype=tensor.dtype)
        before[name].read_into(tensor.spec.whole, was)
        tensor.read_into(tensor.spec.whole, now)
        assert torch.equal(now, (was * -1.5).to(dtype or torch.float32)), name


# -- failures --------------------------------------------------------------------------------------


def refused(folder: Path, out: Path, full: bool) -> tuple[str, int]:
    """On every rank: the words of the refusal, and a collective call that must still work."""
    model, written = shard(folder), os.pwrite

    def pwrite(*_: object) -> int:
        raise OSError(28, "No space left on device")

    if full and groups.current().rank == 0:
        os.pwrite = pwrite
    try:
        save_live(model, open_checkpoint(folder), partial(to_two_files, output=out))
    except LlamaError as error:
        return str(error), len(groups.gather_objects(None))
    finally:
        os.pwrite = written
    return "", 0


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_rank_hears_why_nothing_was_written(on_ranks: OnRanks, tmp_path: Path, world_size: int) -> None:
    folder = write_hf(tmp_path / "model", hf_model("2"))
    for target, full, words in ((folder, False, "is the checkpoint itself"), (tmp_path / "out", True, "No space left")):
        for said, n_ranks in on_ranks(world_size, refused, folder, target, full):
            assert words in said
            assert n_ranks == world_size
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_that_was_quantized_as_it_was_loaded_is_refused(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "model", wide_model())
    for scheme in (INT8, INT4):
        with pytest.raises(LlamaError, match=r"does not hold .*\.weight as .*model does: .*without --quantize"):
            save_live(shard(folder, scheme), open_checkpoint(folder), partial(to_two_files, output=tmp_path / "out"))
