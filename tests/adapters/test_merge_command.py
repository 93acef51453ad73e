"""`scripts/merge_adapter.py` as it is run, on what PEFT saved."""

from pathlib import Path

import pytest
import torch
from launch import Outcome, run_forked
from peft_lora import peft_model
from support import hf_model, write_hf, write_meta
from transformers import LlamaForCausalLM

pytestmark = pytest.mark.slow


def merge(root: Path, *words: object) -> Outcome:
    return run_forked({"merge": [root / "scripts" / "merge_adapter.py", *words]})["merge"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """PEFT's folder."""
    peft_model().save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


def test_what_peft_saved_is_folded_as_peft_folds_it(root: Path, tmp_path: Path, saved: Path) -> None:
    source, target = write_meta(tmp_path / "base", hf_model("2"), n_shards=2), tmp_path / "merged"
    run = merge(root, "--ckpt_dir", source, "--adapter", saved, "--output", target, "--to", "hf")
    assert run.code == 0, run.err
    assert f"wrote {target}" in run.out
    assert f"example.py --ckpt_dir {target}" in run.out
    tokens = torch.arange(1, 101)[None] * 3
    with torch.no_grad():
        found = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32)(tokens).logits
        torch.testing.assert_close(found, peft_model()(tokens).logits, atol=1e-4, rtol=0)


def test_a_soft_prompt_is_told_where_to_go_in_one_line(root: Path, tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    get_peft_model(hf_model("2"), config).save_pretrained(tmp_path / "tuned")
    source, target = write_hf(tmp_path / "base", hf_model("2")), tmp_path / "merged"
    run = merge(root, "--ckpt_dir", source, "--adapter", tmp_path / "tuned", "--output", target)
    assert run.code == 2
    assert len(run.err.strip().splitlines()) == 1
    assert "tuned is a soft prompt, which cannot be folded into weights" in run.err
    assert not target.exists()


def test_the_folder_of_the_adapter_is_not_written_over(root: Path, tmp_path: Path, saved: Path) -> None:
    source = write_hf(tmp_path / "base", hf_model("2"))
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    for force in ([], ["--force"]):
        run = merge(root, "--ckpt_dir", source, "--adapter", saved, "--output", saved, *force)
        assert run.code == 2, run.out
        assert len(run.err.strip().splitlines()) == 1
        assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
