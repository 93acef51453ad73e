"""The published geometries, whose parameter counts are known, and the page and picture that are made from them."""

import dataclasses
import doctest
import re
from pathlib import Path

import pytest

from llama.checkpoint.table import n_unique_params
from llama.config import ALIASES, GEOMETRIES, ModelArgs, RopeScaling, geometry, trained_context
from llama.errors import LlamaError
from llama.parallel.partition import Partition
from scripts.draw_partition import as_text, draw, summary

# As Hugging Face's model cards and safetensors indices count them (tied tables once).
N_PARAMS = {
    "llama-1-7b": 6_738_415_616,
    "llama-1-13b": 13_015_864_320,
    "llama-1-30b": 32_528_943_616,
    "llama-1-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
}
# As transformers' config.json of each spells it.
FFN = {
    "llama-1-7b": 11008,
    "llama-1-13b": 13824,
    "llama-1-30b": 17920,
    "llama-1-65b": 22016,
    "llama-2-70b": 28672,
    "llama-3-8b": 14336,
    "llama-3.1-405b": 53248,
    "llama-3.2-1b": 8192,
    "llama-3.2-3b": 8192,
}


def test_every_geometry_is_counted() -> None:
    assert set(GEOMETRIES) == set(N_PARAMS)


@pytest.mark.parametrize("name", N_PARAMS)
def test_parameter_count(name: str) -> None:
    assert n_unique_params(geometry(name)) == N_PARAMS[name]


@pytest.mark.parametrize("name", FFN)
def test_ffn_width(name: str) -> None:
    assert geometry(name).ffn_dim == FFN[name]


@pytest.mark.parametrize(("name", "factor"), [("llama-3-8b", None), ("llama-3.1-8b", 8), ("llama-3.2-1b", 32)])
def test_rope_scaling_is_that_of_the_generation(name: str, factor: float | None) -> None:
    assert geometry(name).rope_scaling == (None if factor is None else RopeScaling(factor))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_context_is_that_of_the_generation(name: str) -> None:
    generation = name.split("-")[1]
    assert trained_context(geometry(name)) == {"1": 2048, "2": 4096, "3": 8192}.get(generation, 131072)


@pytest.mark.parametrize(("name", "tokens"), [("llama-1-7b", 4096), ("llama-2-7b", 8192), ("llama-3-8b", 16384)])
def test_interpolated_positions_make_the_context_longer(name: str, tokens: int) -> None:
    stretched = dataclasses.replace(geometry(name), rope_scaling=RopeScaling(2.0, kind="linear"))
    assert trained_context(stretched) == tokens


def test_another_vocabulary_changes_no_context() -> None:
    assert trained_context(geometry("llama-2-7b").with_vocab_size(128256)) == 4096
    assert trained_context(geometry("llama-3-8b", vocab_size=400)) == 8192


def test_agrees_with_params_json_of_llama_3_2_1b() -> None:
    # https://huggingface.co/meta-llama/Llama-3.2-1B, original/params.json
    params = {
        "dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "ffn_dim_multiplier": 1.5,
        "multiple_of": 256, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True,
    }  # fmt: skip
    assert ModelArgs.from_params(params) == geometry("llama-3.2-1b")


def test_names_are_found_in_any_case_and_by_alias() -> None:
    assert geometry("Llama-2-7B") is not None
    assert all(geometry(alias) == GEOMETRIES[name] for alias, name in ALIASES.items())


def test_a_size_can_be_changed() -> None:
    assert geometry("llama-2-7b", n_layers=2).n_layers == 2


def test_an_unknown_name_is_refused_with_the_closest() -> None:
    with pytest.raises(LlamaError, match=r"'llama-2-7bb': try llama-2-7b"):
        geometry("llama-2-7bb")


def blocks(root: Path, language: str) -> list[str]:
    page = (root / "docs" / "partition.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def test_the_page_on_partition_computes_what_it_shows(root: Path) -> None:
    for block in blocks(root, "python"):
        example = doctest.DocTestParser().get_doctest(block, {}, "partition.md", None, 0)
        result = doctest.DocTestRunner().run(example)
        assert result.attempted
        assert not result.failed


def test_the_page_on_partition_shows_what_the_script_prints(root: Path) -> None:
    cuts = (("llama-2-7b", 3, None), ("llama-3-8b", 5, None), ("llama-3-8b", 16, None), ("llama-2-7b", 2, "3,1"))
    printed = [as_text(summary(Partition.create(geometry(name), n, split))) + "\n" for name, n, split in cuts]
    tables = blocks(root, "text")
    assert len(tables) == len(cuts)
    for whole, table in zip(printed, tables, strict=True):
        assert whole.startswith(table)


@pytest.mark.slow
def test_a_partition_with_copies_of_kv_heads_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    draw(Partition.create(geometry("llama-3.2-1b"), 12), "Llama 3.2 1B", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 300_000
