"""The bundled model: small, of the promised geometry, and right on items it has never seen."""

import re
from pathlib import Path

import pytest

from llama import Llama, ModelArgs
from scripts.tiny.corpus import FAMILIES, heldout

N_ITEMS = 100
BAR = 0.95
MAX_BYTES = 8 << 20


@pytest.fixture(scope="module")
def tiny(root: Path) -> Path:
    return root / "ckpts" / "tiny"


@pytest.fixture(scope="module")
def llama(tiny: Path) -> Llama:
    return Llama.build(tiny, device="cpu", max_seq_len=256, max_batch_size=50)


def test_it_is_small_and_complete(tiny: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in tiny.iterdir()}
    assert {"consolidated.00.pth", "params.json", "tokenizer.model", "README.md"} <= set(sizes)
    assert sum(sizes.values()) <= MAX_BYTES


def test_its_geometry_cuts_as_promised(tiny: Path) -> None:
    args = ModelArgs.from_file(tiny / "params.json")
    assert (args.n_heads, args.n_kv_heads) == (8, 4)
    assert args.dim % 128 == args.ffn_dim % 128 == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_it_answers_held_out_items(llama: Llama, family: str) -> None:
    items = heldout(family, N_ITEMS, seed=2024)
    results = llama.text_completion([prompt for prompt, _ in items], temperature=0, max_gen_len=40)
    right = sum(result["generation"].strip() == answer for result, (_, answer) in zip(results, items, strict=True))
    assert right >= BAR * len(items), f"{right} of {len(items)}"
    assert all(result["finish_reason"] == "stop" for result in results[:10])


def test_it_tells_stories_that_end(llama: Llama) -> None:
    results = llama.text_completion(["Once upon a time"] * 4, temperature=0.8, top_p=0.95, max_gen_len=200)
    for result in results:
        assert result["finish_reason"] == "stop"
        assert re.fullmatch(r"[A-Za-z0-9 ,.;:'\"!?\n-]+", result["generation"])
    assert len({result["generation"] for result in results}) > 1
