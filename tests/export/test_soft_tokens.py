"""Soft prompts on their way to llama.cpp: virtual tokens in the vocabulary, judged by llama.cpp itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_judge import gguf, quiet_export, toy_spm
from launch import ROOT, run_forked
from support import hf_model, write_hf, write_meta

from llama import Llama
from llama.adapters.adapter import PromptAdapter
from llama.chat import chat_format
from llama.checkpoint.source import open_checkpoint
from llama.errors import AdapterError, TokenizerError
from llama.export import soft_tokens
from llama.tokenizer import load_tokenizer
from llama.tokenizer.vocabulary import Kind

VOCAB, PADDING, N_VIRTUAL, DIM = 360, 5, 9, 64
SOFT = range(VOCAB + PADDING, VOCAB + PADDING + N_VIRTUAL)
TEXTS = ["The quick brown", "Once upon", "", "🙂 123"]


def learnt() -> torch.Tensor:
    return torch.randn(N_VIRTUAL, DIM, generator=torch.Generator().manual_seed(3)) * 0.3


def write_model(folder: Path, generation: str = "2", **changes: Any) -> Path:
    model = hf_model(generation, vocab_size=VOCAB + PADDING, intermediate_size=192, **changes)
    (write_hf if generation == "3.2" else write_meta)(folder, model)
    return toy_spm(folder)


def build(folder: Path, **options: Any) -> Llama:
    settings = {"dtype": "fp32", "device": "cpu", "max_seq_len": 230, "adapter": PromptAdapter(learnt())}
    return Llama.build(folder, **{**settings, **options})


def greedy(model: Any, tokens: list[int], most: int) -> list[int]:
    """What llama.cpp says after tokens: all of its vocabulary, but for the padding that we never sample."""
    model.reset()
    model.eval(tokens)
    new: list[int] = []
    while len(new) < most:
        logits = model.scores[model.n_tokens - 1].copy()
        logits[VOCAB : VOCAB + PADDING] = -np.inf
        new.append(int(logits.argmax()))
        if new[-1] == model.token_eos():
            return new[:-1]
        model.eval(new[-1:])
    return new


# 2: an output layer of its own, Meta's files; 3.2: tied, Hugging Face's.
@pytest.mark.parametrize("generation", ["2", "3.2"])
def test_llama_cpp_says_what_we_say(tmp_path: Path, open_gguf: Callable[..., Any], generation: str) -> None:
    folder = write_model(tmp_path / "model", generation)
    model = open_gguf(quiet_export(folder, tmp_path / "out.gguf", prompt=learnt()))
    llama, base = build(folder), build(folder, adapter=None)
    opening = "".join(f"<|soft_{number}|>" for number in range(N_VIRTUAL))
    differs = 0
    for text in TEXTS:
        ids = llama.tokenizer.encode(text, bos=True, eos=False)
        # By default llama.cpp asks the file whether to add BOS.
        assert model.tokenize(f"{opening}<s>{text}".encode(), add_bos=True, special=True) == [*SOFT, *ids]
        expected = llama.generate([ids], 24, temperature=0)[0][0]
        assert greedy(model, [*SOFT, *ids], 24) == expected
        differs += base.generate([ids], 24, temperature=0)[0][0] != expected
    assert differs == len(TEXTS)


def test_llama_cpps_own_completion_through_the_chat_template(tmp_path: Path, open_gguf: Callable[..., Any]) -> None:
    """The text that the file's template makes, cut and continued by llama.cpp alone, is our tuned answer."""
    jinja2 = pytest.importorskip("jinja2")
    folder = write_model(tmp_path / "model")
    model = open_gguf(quiet_export(folder, tmp_path / "out.gguf", prompt=learnt(), chat="alpaca"))
    llama = build(folder, chat_format="alpaca")
    dialog = [{"role": "user", "content": "Name the dog."}]
    template = jinja2.Template(model.metadata["tokenizer.chat_template"], trim_blocks=True, lstrip_blocks=True)
    text = template.render(messages=dialog, bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
    ids = model.tokenize(text.encode(), add_bos=True, special=True)
    assert ids == [*SOFT, *chat_format("alpaca", llama.tokenizer).encode(dialog)]
    expected = llama.answer([dialog], max_gen_len=30, temperature=0)[0].tokens
    assert greedy(model, ids, 30) == expected
    assert model.metadata["tokenizer.ggml.add_bos_token"] == "false"


def test_a_soft_token_is_no_likelier_than_unk(tmp_path: Path, open_gguf: Callable[..., Any]) -> None:
    folder = write_model(tmp_path / "model")
    model = open_gguf(quiet_export(folder, tmp_path / "out.gguf", prompt=learnt()))
    model.eval([*SOFT, 1, 40, 50])
    scores = np.array(model.scores[: model.n_tokens])
    assert np.abs(scores[:, SOFT.start :] - scores[:, :1]).max() < 1e-5


def read_tensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    return {
        tensor.name: (tensor.tensor_type.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        for tensor in gguf.GGUFReader(path).tensors
    }


# What is lost, in per cent of a row's length: the same for rows learnt here and rows that the model came with.
LOSS = {"f32": 0.0, "f16": 0.05, "bf16": 0.3, "q8_0": 1.0, "q4_0": 15.0}


@pytest.mark.parametrize("type_name", LOSS)
@pytest.mark.parametrize("generation", ["2", "3.2"])
def test_learnt_rows_lose_what_others_lose(tmp_path: Path, generation: str, type_name: str) -> None:
    folder = write_model(tmp_path / "model", generation, dtype=torch.float32)
    plain = read_tensors(quiet_export(folder, tmp_path / "plain.gguf"))
    found = read_tensors(quiet_export(folder, tmp_path / "out.gguf", type_name, prompt=learnt()))
    assert found.keys() == plain.keys() | {"output.weight"}
    matrix, output = found["token_embd.weight"], found["output.weight"]
    assert matrix[0] == type_name.upper()
    assert output[0] == ("Q8_0" if type_name == "q4_0" else type_name.upper())
    whole = plain.get("output.weight", plain["token_embd.weight"])[1]
    for values, rows in (
        (matrix[1], np.concatenate([plain["token_embd.weight"][1], learnt().numpy()])),
        (output[1], np.concatenate([whole, np.repeat(whole[:1], N_VIRTUAL, axis=0)])),
    ):
        lost = 100 * np.linalg.norm(values - rows, axis=1) / np.linalg.norm(rows, axis=1)
        assert values.shape == (SOFT.stop, DIM)
        assert lost.max() <= LOSS[type_name]
        assert lost[SOFT.start :].mean() <= 1.2 * lost[: SOFT.start].mean()


def test_a_quantized_file_keeps_the_tuning(tmp_path: Path, open_gguf: Callable[..., Any]) -> None:
    """Nearer to our tuned scores than to the base's."""
    folder = write_model(tmp_path / "model")
    ids = [1, *range(40, 100)]
    tuned, base = (
        torch.tensor(build(folder, adapter=adapter).generate([ids], 0, echo=True, logprobs=True)[1][0][1:])
        for adapter in (PromptAdapter(learnt()), None)
    )
    for type_name, bound in {"f32": 1e-4, "q8_0": 0.1, "q4_0": 0.7}.items():
        model = open_gguf(quiet_export(folder, tmp_path / f"{type_name}.gguf", type_name, prompt=learnt()))
        model.eval([*SOFT, *ids])
        # Among our tokens: here a token never said is as likely as any other, and the virtual ones are copies of it.
        scores = torch.from_numpy(np.array(model.scores[N_VIRTUAL : model.n_tokens - 1, : SOFT.start]))
        theirs = scores.log_softmax(-1).gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
        assert (theirs - tuned).abs().mean() < bound < (theirs - base).abs().mean()


def test_the_modelfile_names_the_virtual_tokens(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    opening = "".join(soft_tokens.token_names(N_VIRTUAL)) + "<s>"
    quiet_export(folder, tmp_path / "one" / "out.gguf", prompt=learnt(), chat="none")
    assert f'TEMPLATE """{opening}{{{{ .Prompt }}}}"""' in (tmp_path / "one" / "Modelfile").read_text()
    quiet_export(folder, tmp_path / "two" / "out.gguf", prompt=learnt(), chat="llama2")
    assert f'TEMPLATE """{opening}{{{{- $system' in (tmp_path / "two" / "Modelfile").read_text()


def test_without_an_unknown_token_the_byte_ff_is_never_said(tmp_path: Path) -> None:
    from test_gguf import as_hf, llama3_hf

    known = load_tokenizer(llama3_hf(tmp_path / "bpe")).vocabulary()
    assert known.unk_id < 0
    # GPT-2's alphabet spells the byte 0xFF as the letter of that number.
    assert known.tokens[soft_tokens.never_said(known)] == "\xff"
    unknown = load_tokenizer(as_hf(toy_spm(tmp_path / "spm"))).vocabulary()
    assert soft_tokens.never_said(unknown) == 0
    assert soft_tokens.add_tokens(known, 2).tokens[-2:] == ["<|soft_0|>", "<|soft_1|>"]
    assert soft_tokens.add_tokens(known, 2).kinds[-2:] == [Kind.CONTROL] * 2


def test_refusals(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    with pytest.raises(AdapterError, match=f"{DIM} wide"):
        soft_tokens.add_rows(open_checkpoint(folder), torch.zeros(3, DIM + 2), 0)
    vocabulary = load_tokenizer(folder).vocabulary()
    with pytest.raises(TokenizerError, match="soft_0"):
        soft_tokens.add_tokens(soft_tokens.add_tokens(vocabulary, 2), 3)


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_exports_what_was_tuned(tmp_path: Path, open_gguf: Callable[..., Any]) -> None:
    """Adapters as PEFT saves them; a soft prompt goes along as tokens, LoRA is in the weights."""
    from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model

    folder, script = write_model(tmp_path / "model"), ROOT / "scripts" / "export_gguf.py"
    torch.manual_seed(4)
    configs = {
        "prompt": PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=N_VIRTUAL),
        "lora": LoraConfig(
            task_type=TaskType.CAUSAL_LM, r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False
        ),
    }
    for name, config in configs.items():
        base = hf_model("2", vocab_size=VOCAB + PADDING, intermediate_size=192)
        get_peft_model(base, config).save_pretrained(tmp_path / name)
        out = tmp_path / f"{name}.gguf"
        words = (script, folder, out, "--type", "f32", "--adapter", tmp_path / name, "--force")
        done = run_forked({name: words})[name]
        assert done.code == 0, done.err
        model, llama = open_gguf(out), build(folder, adapter=tmp_path / name)
        ids = llama.tokenizer.encode("The quick", bos=True, eos=False)
        expected = llama.generate([ids], 30, temperature=0)[0][0]
        assert greedy(model, [*SOFT, *ids] if name == "prompt" else ids, 30) == expected
        assert expected != build(folder, adapter=None).generate([ids], 30, temperature=0)[0][0]
        assert "### Instruction" in model.metadata["tokenizer.chat_template"]
    missing = run_forked({"missing": (script, folder, out, "--adapter", tmp_path / "no")})["missing"]
    assert (missing.code, len(missing.err.splitlines())) == (2, 1)
