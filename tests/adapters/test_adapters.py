"""Generation with adapters against PEFT's on the Hugging Face twin, in float32, at every world size."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from ranks import RankPools
from support import DIM, hf_model, sentencepiece_model, write_meta

from llama import Llama
from llama.adapters.adapter import PromptAdapter
from llama.errors import AdapterError

# The bar for log-probabilities.
NATS = 1e-4
N_VIRTUAL = 7
PROMPTS = [[1, 5, 9], [1], [1, *range(40, 110)], [1, 300, 7, 7, 2, 9], [1, 30], [1, 31, 32, 33, 34, 35, 36]]
N_NEW = 12


def soft_prompt(n_tokens: int = N_VIRTUAL) -> PromptAdapter:
    """Random embeddings, as large as those of the tests' models."""
    return PromptAdapter(torch.randn(n_tokens, DIM, generator=torch.Generator().manual_seed(5)) * 0.3)


@cache
def peft_twin() -> PeftModel:
    """PEFT over transformers' model, with the same soft prompt set by hand."""
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=N_VIRTUAL)
    model = get_peft_model(hf_model("2"), config).eval()
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(soft_prompt().prompt)
    return model


@cache
def lora_twin() -> PeftModel:
    """PEFT over transformers' model, with random matrices of LoRA on linears of every kind of cut."""
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]
    )
    model = get_peft_model(hf_model("2"), config).eval()
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def greedy_by_peft(prompt: list[int], n_new: int = N_NEW, model: PeftModel | None = None) -> list[int]:
    with torch.no_grad():
        tokens = (model or peft_twin()).generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=n_new, do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return tokens[0, len(prompt) :].tolist()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama 2 of two KV heads with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("adapted")
    sentencepiece_model(folder)
    return write_meta(folder, hf_model("2"))


def build(folder: Path, adapter: Any, **options: Any) -> Llama:
    settings = {"dtype": "fp32", "device": "cpu", "max_seq_len": 128, "max_batch_size": 4, **options}
    llama = Llama.build(folder, adapter=adapter, **settings)
    llama.tokenizer.stop_tokens = frozenset()  # random weights: let every text run to its end
    return llama


@pytest.fixture(scope="session")
def base(folder: Path) -> Llama:
    return build(folder, None)


@pytest.fixture(scope="session")
def tuned(folder: Path) -> Llama:
    return build(folder, soft_prompt())


# -- a soft prompt ---------------------------------------------------------------------------------


def test_a_soft_prompt_gives_what_peft_gives(tuned: Llama, base: Llama) -> None:
    """A batch of ragged prompts, more of them than there are slots, against PEFT's generation of each alone."""
    expected = [greedy_by_peft(prompt) for prompt in PROMPTS]
    assert tuned.generate(PROMPTS, N_NEW, temperature=0)[0] == expected
    assert [tuned.generate([prompt], N_NEW, temperature=0)[0][0] for prompt in PROMPTS] == expected
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        assert base.generate([prompt], N_NEW, temperature=0)[0][0] != tokens


def test_prompts_of_several_lengths_of_answer_share_the_slots(tuned: Llama) -> None:
    """Rows leave and join: a stop string of one prompt's own ends it while its neighbours go on."""
    expected = [greedy_by_peft(prompt, 20) for prompt in PROMPTS]
    stops = [tokens[4 + 2 * number] for number, tokens in enumerate(expected)]
    found = tuned.generate(PROMPTS, 20, temperature=0, stop=stops)[0]
    for tokens, whole in zip(found, expected, strict=True):
        cut = min(whole.index(stop) for stop in stops if stop in whole)
        assert tokens == whole[:cut]
    assert len({len(tokens) for tokens in found}) > 2


def test_scores_are_those_of_peft(tuned: Llama) -> None:
    tokens, scores = tuned.generate(PROMPTS, 0, echo=True, logprobs=True)
    assert tokens == PROMPTS
    assert scores is not None
    for prompt, found in zip(PROMPTS, scores, strict=True):
        with torch.no_grad():
            logits = peft_twin()(input_ids=torch.tensor([prompt])).logits[0, N_VIRTUAL:].log_softmax(-1)
        assert found[0] == 0.0
        assert found[1:] == pytest.approx([logits[i, t].item() for i, t in enumerate(prompt[1:])], abs=NATS)


def test_prompts_of_several_prefill_passes(tuned: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tuned.generate(PROMPTS, 5, temperature=0, echo=True, logprobs=True)
    monkeypatch.setattr("llama.generation.engine.PREFILL_TOKENS", 16)
    tokens, scores = tuned.generate(PROMPTS, 5, temperature=0, echo=True, logprobs=True)
    assert tokens == expected[0]
    for found, wanted in zip(scores or [], expected[1] or [], strict=True):
        assert found == pytest.approx(wanted, abs=NATS)


def test_the_soft_prompt_runs_once(tuned: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pass of a request is longer than its prompt."""
    seen, hidden = [], tuned.model.hidden

    def watched(tokens: torch.Tensor, **rest: Any) -> torch.Tensor:
        seen.append(tokens.shape[1])
        return hidden(tokens, **rest)

    monkeypatch.setattr(tuned.model, "hidden", watched)
    tuned.generate([[1, 5, 9], [1, 7]], 3, temperature=0)
    assert seen == [3, 1, 1]


def test_virtual_tokens_do_not_count_for_max_seq_len(tuned: Llama) -> None:
    tokens = tuned.generate([[1] * 120], temperature=0)[0][0]
    assert len(tokens) == 8
    assert tokens == greedy_by_peft([1] * 120, 8)


def greedy_on_rank(folder: Path, adapter: Any) -> tuple[list[list[int]], list[list[float]] | None]:
    """What a rank gives; threads as in the other ranks."""
    threads = torch.get_num_threads()
    llama = build(folder, adapter, threads=1)
    torch.set_num_threads(threads)
    return llama.generate(PROMPTS, N_NEW, temperature=0, logprobs=True, echo=True)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_world_size_changes_nothing(pools: RankPools, folder: Path, tuned: Llama, world_size: int) -> None:
    tokens, scores = tuned.generate(PROMPTS, N_NEW, temperature=0, logprobs=True, echo=True)
    for found, found_scores in pools.run(world_size, greedy_on_rank, folder, soft_prompt()):
        assert found == tokens
        for ours, others in zip(found_scores, scores or [], strict=True):
            assert ours == pytest.approx(others, abs=NATS)


def test_a_soft_prompt_of_another_width_is_refused(folder: Path) -> None:
    with pytest.raises(AdapterError, match=f"{DIM} wide"):
        build(folder, PromptAdapter(torch.zeros(3, DIM + 1)))


def test_the_line_that_tells_what_was_loaded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(folder, soft_prompt())
    assert f"with a soft prompt of {N_VIRTUAL} tokens" in capsys.readouterr().err
    build(folder, None)
    assert "soft prompt" not in capsys.readouterr().err


# -- LoRA ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def lora_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What PEFT itself saves."""
    folder = tmp_path_factory.mktemp("lora")
    lora_twin().save_pretrained(folder)
    return folder


def test_lora_gives_what_peft_gives(folder: Path, lora_folder: Path, base: Llama) -> None:
    llama = build(folder, lora_folder)
    expected = [greedy_by_peft(prompt, model=lora_twin()) for prompt in PROMPTS]
    assert llama.generate(PROMPTS, N_NEW, temperature=0)[0] == expected
    assert base.generate(PROMPTS, N_NEW, temperature=0)[0] != expected
    prompt = PROMPTS[2]
    _, scores = llama.generate([prompt], 0, echo=True, logprobs=True)
    assert scores is not None
    with torch.no_grad():
        logits = lora_twin()(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert scores[0][1:] == pytest.approx([logits[i, t].item() for i, t in enumerate(prompt[1:])], abs=NATS)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_lora_is_the_same_at_every_world_size(
    pools: RankPools, folder: Path, lora_folder: Path, world_size: int
) -> None:
    expected = [greedy_by_peft(prompt, model=lora_twin()) for prompt in PROMPTS]
    for tokens, _ in pools.run(world_size, greedy_on_rank, folder, lora_folder):
        assert [new[len(prompt) :] for prompt, new in zip(PROMPTS, tokens, strict=True)] == expected


def test_lora_is_told_and_checked(folder: Path, lora_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(folder, lora_folder)
    assert "with LoRA r 4 on wq, wv, w2" in capsys.readouterr().err
    with pytest.raises(AdapterError, match="no adapter"):
        build(folder, folder / "nowhere")


# -- files -----------------------------------------------------------------------------------------


def test_a_soft_prompt_that_peft_saved(folder: Path, tuned: Llama, tmp_path: Path) -> None:
    peft_twin().save_pretrained(tmp_path)
    expected = tuned.generate(PROMPTS, N_NEW, temperature=0)
    for path in (tmp_path, str(tmp_path / "adapter_model.safetensors")):
        assert build(folder, path).generate(PROMPTS, N_NEW, temperature=0) == expected
