"""The export to GGUF, judged by llama.cpp itself: what it computes, how it cuts text, what it refuses."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_judge import (
    LINES,
    NEAR_TIE,
    assert_same_greedy,
    gguf,
    llama_cpp,
    our_log_probs,
    quiet_export,
    their_greedy,
    their_log_probs,
    toy_spm,
)
from launch import run_forked
from support import LLAMA3_ROPE, hf_model, meta_state, sp_twin, write_hf, write_meta

from llama import Llama, load_tokenizer
from llama.chat import Dialog
from llama.checkpoint import rows
from llama.checkpoint.convert import convert
from llama.checkpoint.source import open_checkpoint
from llama.checkpoint.table import specs
from llama.data.templates import FORMATS
from llama.errors import LlamaError
from llama.export import gguf as export
from llama.export.gguf import TYPES
from llama.export.templates import TEMPLATES
from llama.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
VOCAB = 400
AWKWARD = [
    "",
    " ",
    "   ",
    "the dog",
    " the dog",
    "   the  dog   ",
    "a\nb\n\n c\t\td \r\n\r\n e",
    "\n",
    "\n\nthe",
    "\tthe",
    "🙂 the 🐕 👩‍👩‍👧",
    "你好，世界。 这是一个测试",
    "naïve café e\u0301 \u200b \u3000 \xa0 ß",
    "</s><s>the<unk> <0x0A>",
    "<|eot_id|><|begin_of_text|>the<|start_header_id|>user<|end_header_id|>",
    "[INST] <<SYS>>\nx\n<</SYS>> [/INST]",
    "I'M sure it's 1234567 + 3.14, isn't it?!  'S",
    "▁ is U+2581▁▁",
    "\ufeff\ufffd\u0001",
    "def f(x):\n    return x ** 2\n",
    "مرحبا שלום हिन्दी ไทย 한국어",
    "[PAD399] [UNUSED7]",
]


# -- tools -----------------------------------------------------------------------------------------


def random_text(draw: random.Random) -> str:
    """Pieces of awkward texts in any order, with characters of all planes between them."""
    text = ""
    for _ in range(draw.randrange(1, 6)):
        source = draw.choice([*AWKWARD, *LINES, "the 'll \n  123456 "]) or " "
        start = draw.randrange(len(source))
        text += source[start : start + draw.randrange(1, 12)]
        text += draw.choice(["", " ", "  ", "\n", chr(draw.choice([draw.randrange(0x20, 0xD7FF), 0x1F600, 0x20000]))])
    return text


# -- what it computes ------------------------------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    "1": {},
    "2": {},
    "3": {},
    "3.1": {},
    "3.2": {},
    "wide heads": {"generation": "2", "head_dim": 16, "num_key_value_heads": 4},
    "linear": {"generation": "2", "scaling": {"rope_type": "linear", "factor": 4.0}},
}


def write_model(folder: Path, name: str, layout: str = "meta", **changes: Any) -> Path:
    options = {**MODELS[name], **changes}
    model = hf_model(options.pop("generation", name), vocab_size=VOCAB, intermediate_size=192, **options)
    (write_hf if layout == "hf" else write_meta)(folder, model)
    return toy_spm(folder)


@pytest.mark.parametrize("name", MODELS)
def test_the_greedy_continuation_equals_ours(tmp_path: Path, open_gguf: Callable[..., Any], name: str) -> None:
    layout = "hf" if name in ("3.2", "wide heads") else "meta"
    folder = write_model(tmp_path / "model", name, layout)
    model = open_gguf(quiet_export(folder, tmp_path / "out.gguf"))
    llama = Llama.build(folder, dtype="fp32", device="cpu", max_seq_len=200)
    texts = ["The quick brown", "Once upon", "🙂\n\n 123", ""]
    prompts = [llama.tokenizer.encode(text, bos=True, eos=False) for text in texts]
    # Long enough to pass the positions at which scaled RoPE begins to differ.
    most = 150
    assert most > LLAMA3_ROPE["original_max_position_embeddings"]
    assert_same_greedy(llama, model, prompts, most)
    tokens = [1, *(random.Random(0).randrange(3, VOCAB) for _ in range(180))]
    difference = (their_log_probs(model, tokens) - our_log_probs(llama, tokens)).abs()
    assert difference.max() < 1e-3


def test_scaled_rope_is_needed(tmp_path: Path, open_gguf: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would notice a file without the factors."""
    folder = write_model(tmp_path / "model", "3.1")
    monkeypatch.setattr(export, "_rope_factors", lambda args: None)
    model = open_gguf(quiet_export(folder, tmp_path / "out.gguf"))
    llama = Llama.build(folder, dtype="fp32", device="cpu", max_seq_len=200)
    tokens = [1, *(random.Random(0).randrange(3, VOCAB) for _ in range(180))]
    assert (their_log_probs(model, tokens) - our_log_probs(llama, tokens)).abs().max() > 0.1


# Largest mean difference of log-probabilities, in nats; llama.cpp rounds the activations to the same type.
TOLERANCES = {"f32": 1e-5, "f16": 0.003, "bf16": 0.05, "q8_0": 0.2, "q4_0": 1.0}


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("name", ["2", "3.2"])
def test_every_type_is_close(tmp_path: Path, open_gguf: Callable[..., Any], name: str, type_name: str) -> None:
    folder = write_model(tmp_path / "model", name)
    model = open_gguf(quiet_export(folder, tmp_path / "out.gguf", type_name))
    llama = Llama.build(folder, dtype="fp32", device="cpu", max_seq_len=256)
    tokens = [1, *(random.Random(1).randrange(3, VOCAB) for _ in range(200))]
    difference = (their_log_probs(model, tokens) - our_log_probs(llama, tokens)).abs().mean()
    assert difference < TOLERANCES[type_name]


def test_the_bundled_model(tmp_path: Path, open_gguf: Callable[..., Any], root: Path) -> None:
    folder = root / "ckpts" / "tiny"
    if not list(folder.glob("*.pth")):
        pytest.skip("the bundled model is not here")
    llama = Llama.build(folder, dtype="fp32", device="cpu", max_seq_len=256)
    texts = ["3 + 4 =", "Once upon a time", "Repeat: red, blue, green.", "The capital of"]
    prompts = [llama.tokenizer.encode(text, bos=True, eos=False) for text in texts]
    # A text of the kind that it was trained on: what it finds absurd, rounding moves by more than any bound says.
    story = llama.generate(prompts[1:2], max_gen_len=80, temperature=0)[0][0]
    tokens = [*prompts[1], *story]
    expected = our_log_probs(llama, tokens).mean()
    # Nats a token: what each type adds to the loss, or takes off it.
    for type_name, tolerance in {"f32": 1e-5, "f16": 0.001, "bf16": 0.01, "q8_0": 0.02, "q4_0": 0.2}.items():
        model = open_gguf(quiet_export(folder, tmp_path / f"{type_name}.gguf", type_name))
        if type_name == "f32":
            ours, _ = llama.generate(prompts, max_gen_len=48, temperature=0)
            for prompt, mine in zip(prompts, ours, strict=True):
                theirs, gaps = their_greedy(model, prompt, len(mine), llama.tokenizer.n_words)
                clear = next((i for i, gap in enumerate(gaps) if gap < NEAR_TIE), len(mine))
                assert mine[:clear] == theirs[:clear]
        assert abs(their_log_probs(model, tokens).mean() - expected) < tolerance


# -- what is in the file ---------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Type and values of every tensor, dequantized by the `gguf` package."""
    return {
        tensor.name: (tensor.tensor_type.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        for tensor in gguf.GGUFReader(path).tensors
    }


def expected_values(weight: torch.Tensor, type_name: str) -> torch.Tensor:
    """The nearest values of a type, from its definition: blocks of 32 that share a float16 scale."""
    if type_name in ("F32", "F16", "BF16"):
        return weight.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[type_name]).float()
    blocks = weight.reshape(-1, 32).double()
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = largest.abs() / 127 if type_name == "Q8_0" else largest / -8
    levels = (blocks / scale).round() if type_name == "Q8_0" else ((blocks / scale) + 8.5).floor().clamp(0, 15) - 8
    return (levels * scale.half().double()).reshape(weight.shape).float()


@pytest.mark.parametrize(
    ("name", "layout", "tokens"),
    [("1", "meta", 2048), ("linear", "meta", 16384), ("3", "meta", 8192), ("3.1", "meta", 1024), ("3.1", "hf", 512)],
)
def test_the_context_is_stated_or_that_of_the_geometry(tmp_path: Path, name: str, layout: str, tokens: int) -> None:
    folder = write_model(tmp_path / "model", name, layout)
    exported = quiet_export(folder, tmp_path / "out.gguf")
    assert gguf.GGUFReader(exported).get_field("llama.context_length").contents() == tokens
    # The same is written for Hugging Face, and stays with the model whatever it goes through.
    single = convert(convert(folder, "hf", tmp_path / "hf"), "single", tmp_path / "single" / "model.pth")
    config = json.loads((convert(single, "hf", tmp_path / "back") / "config.json").read_text())
    assert config["max_position_embeddings"] == tokens


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize(("name", "layout"), [("2", "meta"), ("3", "hf"), ("3.2", "hf")])
def test_every_value_is_what_the_type_makes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, layout: str, type_name: str
) -> None:
    monkeypatch.setattr(rows, "CHUNK_BYTES", 5000)  # several pieces a tensor, of uneven size
    folder = write_model(tmp_path / "model", name, layout, torch_dtype=torch.float32)
    args = open_checkpoint(folder).args
    found = read_tensors(quiet_export(folder, tmp_path / "out.gguf", type_name))
    model = hf_model(name, vocab_size=VOCAB, intermediate_size=192)
    state = meta_state(model)
    wanted = {spec.gguf_name: (spec, state[spec.name]) for spec in specs(args).values()}
    if args.tied:
        del wanted["output.weight"]
    assert found.keys() == wanted.keys() | ({"rope_freqs.weight"} if args.rope_scaling else set())
    for gguf_name, (spec, weight) in wanted.items():
        stored, values = found[gguf_name]
        is_output = gguf_name == "output.weight" or (args.tied and gguf_name == "token_embd.weight")
        matrix = "Q8_0" if is_output and type_name == "q4_0" else type_name.upper()
        assert stored == ("F32" if len(spec.shape) == 1 else matrix)
        difference = np.abs(values - expected_values(weight, stored).numpy())
        # A value halfway between two levels may fall to either, by the order of float32 operations.
        assert (difference > 1e-6).mean() < (0.002 if stored.startswith("Q") else 1e-9), gguf_name


@pytest.mark.parametrize(("type_name", "number"), [("q8_0", 7), ("q4_0", 2)])
@pytest.mark.parametrize("name", ["3.1", "3.2"])
def test_blocks_are_those_of_llama_cpps_own_quantizer(tmp_path: Path, name: str, type_name: str, number: int) -> None:
    """Bit for bit, at widths where its blocks of 6 bits, which need rows of 256, fall back to 8 as ours do."""
    folder = write_model(tmp_path / "model", name)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = number, 1
    whole = quiet_export(folder, tmp_path / "whole.gguf")
    assert llama_cpp.llama_model_quantize(str(whole).encode(), str(tmp_path / "theirs.gguf").encode(), params) == 0
    ours = {t.name: t for t in gguf.GGUFReader(quiet_export(folder, tmp_path / "ours.gguf", type_name)).tensors}
    theirs = {t.name: t for t in gguf.GGUFReader(tmp_path / "theirs.gguf").tensors}
    assert ours.keys() == theirs.keys()
    for tensor, other in ((ours[tensor_name], theirs[tensor_name]) for tensor_name in ours):
        assert tensor.tensor_type == other.tensor_type
        assert np.array_equal(tensor.data, other.data)


def test_rows_that_no_block_fits_stay_f16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_meta(tmp_path / "model", hf_model("2", vocab_size=VOCAB, intermediate_size=176))
    found = read_tensors(quiet_export(toy_spm(tmp_path / "model"), tmp_path / "out.gguf", "q4_0"))
    assert {found[f"blk.{layer}.ffn_down.weight"][0] for layer in range(2)} == {"F16"}
    assert found["blk.0.ffn_up.weight"][0] == "Q4_0"
    assert "2 tensors stay f16" in capsys.readouterr().err


def test_a_tied_output_layer_that_was_tuned_apart_is_written(tmp_path: Path) -> None:
    model = hf_model("3.2", vocab_size=VOCAB)
    folder = toy_spm(write_meta(tmp_path / "model", model, dim=64))
    (folder / "params.json").unlink()
    write_config(folder, model)
    assert "output.weight" not in read_tensors(quiet_export(folder, tmp_path / "same.gguf"))
    state = torch.load(folder / "consolidated.00.pth")
    state["output.weight"][7, 3] += 1
    torch.save(state, folder / "consolidated.00.pth")
    found = read_tensors(quiet_export(folder, tmp_path / "apart.gguf"))
    assert found["output.weight"][1][7, 3] == pytest.approx(found["token_embd.weight"][1][7, 3] + 1)


def write_config(folder: Path, model: Any) -> None:
    """Hugging Face's config under the name that Meta's layout reads: it can say "tied"."""
    model.config.to_json_file(folder / "params.json")


# -- how it cuts text ------------------------------------------------------------------------------


def assert_same_ids(tokenizer: Tokenizer, model: Any, n_random: int = 300) -> None:
    draw = random.Random(0)
    for text in [*AWKWARD, *LINES, *(random_text(draw) for _ in range(n_random))]:
        theirs = model.tokenize(text.encode(), add_bos=False, special=False)
        assert theirs == tokenizer.encode(text, bos=False, eos=False), repr(text)
    text = "the dog"
    assert model.tokenize(text.encode(), add_bos=True) == tokenizer.encode(text, bos=True, eos=False)


def write_for(folder: Path, vocab_size: int) -> Path:
    """The smallest model for a vocabulary."""
    changes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return write_meta(folder, hf_model("2", vocab_size=vocab_size, intermediate_size=96, **changes))


def toy_ranks(folder: Path) -> Path:
    """tiktoken ranks with merges that can be made in more ways than one."""
    import base64

    merges = [b"th", b"he", b"the", b" the", b"\xe4\xbd", b"\xe4\xbd\xa0", b"\n\n", b"  ", b"12", b"23", b"123", b"eot"]
    merges += [b"aa", b"aaa", b"aaaa", b"<|", b"|>", b" d", b"og", b" dog"]
    tokens = [*(bytes([byte]) for byte in range(256)), *merges]
    folder.mkdir(parents=True, exist_ok=True)
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    (folder / "tokenizer.model").write_bytes(lines)
    return folder


def as_hf(folder: Path) -> Path:
    """Replace SentencePiece's model by its tokenizer.json."""
    core = sp_twin((folder / "tokenizer.model").read_bytes())
    (folder / "tokenizer.json").write_text(core.to_str(), encoding="utf-8")
    (folder / "tokenizer.model").unlink()
    return folder


def byte_level(merges: list[tuple[str, str]], vocab: dict[str, int], special: Sequence[str]) -> str:
    """A tokenizer.json with the settings of Meta's Llama 3 on Hugging Face."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Core

    from llama.tokenizer.bpe import SPLIT_PATTERN

    core = Core(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    return core.to_str()


def llama3_hf(folder: Path) -> Path:
    """A small byte-level tokenizer.json."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ċ", "Ċ"), ("1", "2"), ("12", "3"), ("Ġ", "d"), ("o", "g")]
    vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(byte_level(merges, vocab, names), encoding="utf-8")
    return folder


def ranks_as_hf(folder: Path) -> Path:
    """Replace tiktoken's ranks by the tokenizer.json that they amount to."""
    from llama.tokenizer.bpe import SPECIAL_TOKENS

    known = load_tokenizer(folder).vocabulary()
    vocab = {token: number for number, token in enumerate(known.tokens[: -len(SPECIAL_TOKENS)])}
    merges = [(left, right) for left, right in (merge.split(" ") for merge in known.merges)]
    (folder / "tokenizer.json").write_text(byte_level(merges, vocab, SPECIAL_TOKENS), encoding="utf-8")
    (folder / "tokenizer.model").unlink()
    return folder


TOYS: dict[str, Callable[[Path], Path]] = {
    "spm": toy_spm,
    "spm without prefix": lambda folder: toy_spm(folder, add_dummy_prefix=False),
    "spm as tokenizer.json": lambda folder: as_hf(toy_spm(folder)),
    "ranks": toy_ranks,
    "llama 3 as tokenizer.json": llama3_hf,
}


@pytest.mark.parametrize("kind", TOYS)
def test_a_toy_tokenizer_cuts_text_the_same(tmp_path: Path, open_gguf: Callable[..., Any], kind: str) -> None:
    tokenizer = load_tokenizer(TOYS[kind](tmp_path / "model"))
    folder = write_for(tmp_path / "model", tokenizer.n_words + 3)
    assert_same_ids(tokenizer, open_gguf(quiet_export(folder, tmp_path / "out.gguf"), vocab_only=True))


@pytest.mark.parametrize("name", ["llama2", "llama2 as tokenizer.json", "llama3", "llama3 as tokenizer.json"])
def test_a_real_tokenizer_cuts_text_the_same(
    tmp_path: Path, open_gguf: Callable[..., Any], test_data: Path, name: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((test_data / f"{name.split()[0]}_tokenizer.model").read_bytes())
    if name.endswith("json"):
        (as_hf if "llama2" in name else ranks_as_hf)(folder)
    tokenizer = load_tokenizer(folder)
    write_for(folder, tokenizer.n_words)
    model = open_gguf(quiet_export(folder, tmp_path / "out.gguf", "f16"), vocab_only=True)
    assert_same_ids(tokenizer, model, n_random=1000)
    for special, number in list(tokenizer.special_tokens.items())[:20]:
        assert number in model.tokenize(f"a{special}b".encode(), add_bos=False, special=True) or special == "<unk>"
        assert number not in model.tokenize(f"a{special}b".encode(), add_bos=False, special=False)


DIALOGS: list[Dialog] = [
    [{"role": "user", "content": "the dog"}],
    [{"role": "system", "content": "Be  brief."}, {"role": "user", "content": "the dog"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "the dog "},
        {"role": "assistant", "content": " 12 and 123"},
        {"role": "user", "content": "once\n\nupon"},
        {"role": "assistant", "content": "a time"},
        {"role": "user", "content": "?"},
    ],
]


@pytest.mark.parametrize("name", ["llama2", "llama3", "alpaca", "plain"])
@pytest.mark.parametrize("dialog", DIALOGS, ids=["one", "system", "long"])
def test_the_chat_template_says_what_our_format_says(
    tmp_path: Path, open_gguf: Callable[..., Any], name: str, dialog: Dialog
) -> None:
    jinja2 = pytest.importorskip("jinja2")
    folder = (toy_ranks if name == "llama3" else toy_spm)(tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    write_for(folder, tokenizer.n_words)
    model = open_gguf(quiet_export(folder, tmp_path / "out.gguf", chat=name), vocab_only=True)
    template = jinja2.Template(model.metadata["tokenizer.chat_template"])
    bos, eos = ("<|begin_of_text|>", "<|end_of_text|>") if name == "llama3" else ("<s>", "</s>")
    text = template.render(messages=dialog, bos_token=bos, eos_token=eos, add_generation_prompt=True)
    ids = model.tokenize(text.encode(), add_bos=False, special=True)
    assert ids == FORMATS[name](tokenizer).encode(dialog)


def test_every_format_has_templates() -> None:
    assert TEMPLATES.keys() == FORMATS.keys()


def test_ids_and_modelfile(tmp_path: Path, open_gguf: Callable[..., Any]) -> None:
    folder = toy_ranks(tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    write_for(folder, tokenizer.n_words)
    metadata = open_gguf(quiet_export(folder, tmp_path / "out.gguf"), vocab_only=True).metadata
    for key, number in {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "eot": tokenizer.special_tokens["<|eot_id|>"],
        "eom": tokenizer.special_tokens["<|eom_id|>"],
        "padding": tokenizer.pad_id,
    }.items():
        assert int(metadata[f"tokenizer.ggml.{key}_token_id"]) == number
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert "FROM ./out.gguf" in lines
    assert 'PARAMETER stop "<|eot_id|>"' in lines
    assert TEMPLATES["llama3"].go in (tmp_path / "Modelfile").read_text()


# -- what goes wrong -------------------------------------------------------------------------------


def refusal(folder: Path, output: Path, type_name: str = "f32", **options: Any) -> str:
    with pytest.raises(LlamaError) as caught:
        quiet_export(folder, output, type_name, **options)
    assert "\n" not in str(caught.value)
    assert not list(output.parent.glob("*.partial"))
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return toy_spm(write_for(tmp_path / "model", VOCAB))


def test_refusals(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out" / "x.gguf"
    assert "--type is 'q3'" in refusal(folder, out, "q3")
    assert "must end in .gguf" in refusal(folder, folder / "consolidated.00.pth", force=True)
    assert "is a folder" in refusal(folder, tmp_path)
    assert "no template" in refusal(folder, out, chat="vicuna")
    assert not out.parent.exists()
    other = toy_spm(write_for(tmp_path / "other", 350))
    assert "360 tokens, the model 350" in refusal(other, out)
    other = toy_spm(write_for(tmp_path / "third", 721))
    assert "360 tokens, the model 721" in refusal(other, out)
    quiet_export(folder, out)
    assert "--force" in refusal(folder, out)
    quiet_export(folder, out, force=True)
    (out.parent / "Modelfile").write_text("FROM llama2\n")
    assert "not of an export" in refusal(folder, out, force=True)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert "GB free" in refusal(folder, tmp_path / "y.gguf")


def test_no_gguf_package(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'llama-shards[gguf]'" in refusal(folder, tmp_path / "x.gguf")


def test_values_that_float16_cannot_hold(folder: Path, tmp_path: Path) -> None:
    state = torch.load(folder / "consolidated.00.pth")
    state["layers.0.attention.wq.weight"][3, 3] = 1e6
    torch.save(state, folder / "consolidated.00.pth")
    assert "float16 cannot hold" in refusal(folder, tmp_path / "x.gguf", "f16")
    quiet_export(folder, tmp_path / "x.gguf", "bf16")


def test_a_full_disk_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_write_tensor", fail)
    assert "No space left on device; nothing was left behind" in refusal(folder, tmp_path / "x.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"model_type": "unigram"}, "no BPE"), ({"byte_fallback": False, "vocab_size": 70}, "0 byte tokens, not 256")],
)
def test_sentencepiece_models_that_llama_cpp_lacks(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    folder = toy_spm(write_for(tmp_path / "model", VOCAB), **{"vocab_size": 310, **options})
    assert message in refusal(folder, tmp_path / "x.gguf")


def edited(core_json: str, **changes: Any) -> str:
    spec = json.loads(core_json)
    for key, value in changes.items():
        (spec["model"] if key == "merges" else spec)[key] = value(spec) if callable(value) else value
    return json.dumps(spec)


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (lambda f: as_hf(toy_spm(f)), {"merges": lambda spec: spec["model"]["merges"][::2]}, "that its merges do not"),
        (lambda f: as_hf(toy_spm(f)), {"normalizer": {"type": "NFKC"}}, "goes through NFKC"),
        (llama3_hf, {"normalizer": {"type": "NFC"}}, "rewrites text"),
        (llama3_hf, {"pre_tokenizer": {"type": "Whitespace"}}, "another rule than Llama 3's"),
    ],
)
def test_tokenizer_json_that_llama_cpp_lacks(
    tmp_path: Path, make: Callable[[Path], Path], changes: dict[str, Any], message: str
) -> None:
    file = make(write_for(tmp_path / "model", VOCAB)) / "tokenizer.json"
    file.write_text(edited(file.read_text(), **changes))
    assert message in refusal(file.parent, tmp_path / "x.gguf")


# -- the command -----------------------------------------------------------------------------------


def command(*words: object) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "export_gguf.py"), *map(str, words)]


def run(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=300, env=environment, check=False)


@pytest.mark.slow
def test_the_command(folder: Path, tmp_path: Path) -> None:
    script, out = ROOT / "scripts" / "export_gguf.py", tmp_path / "x.gguf"
    runs = run_forked(
        {
            "done": [script, folder, out, "--type", "q8_0"],
            "again": [script, folder, out, "--type", "q8_0"],
            "named": [script, "--ckpt_dir", folder, "--output", tmp_path / "y.gguf", "--type=f32"],
            "stray": [script, folder, tmp_path / "z.gguf", "more"],
        }
    )
    assert runs["done"].code == 0, runs["done"].err
    assert out.exists()
    assert runs["again"].code == 2
    assert runs["again"].err == f"error: {out} exists: add --force to replace it, or choose another name\n"
    assert runs["named"].code == 0
    assert "stray word" in runs["stray"].err


@pytest.mark.slow
def test_killed_at_any_moment_it_leaves_no_gguf(tmp_path: Path) -> None:
    model = hf_model("2", vocab_size=VOCAB, hidden_size=256, intermediate_size=2048, num_hidden_layers=8)
    folder, out = toy_spm(write_meta(tmp_path / "model", model)), tmp_path / "x.gguf"
    draw = random.Random(0)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(3):
        process = subprocess.Popen(
            command(folder, out, "--type", "q4_0"),
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("*.partial")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():  # it had finished
            assert len(read_tensors(out)) == 8 * 9 + 3
            out.unlink()
    assert run(folder, out, "--type", "q4_0").returncode == 0
