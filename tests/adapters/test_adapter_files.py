"""Adapters on disk, against PEFT: what it writes we read, what we write it loads, and both compute the same."""

import functools
import json
import os
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import DIM, N_LAYERS, VOCAB, hf_model, meta_params, meta_state
from torch import Tensor
from transformers import LlamaForCausalLM

from llama.adapters.adapter import Adapter, LoraAdapter, PromptAdapter
from llama.adapters.files import read_adapter, write_adapter
from llama.config import ModelArgs
from llama.errors import AdapterError
from llama.model import Transformer

# Two correct float32 programs differ by rounding alone (measured: at most 3.3e-5).
LOGITS = {"atol": 1e-4, "rtol": 0.0}
N_VIRTUAL = 5
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
META = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}  # fmt: skip
PREFIX = "base_model.model.model.layers"
Q_A = f"{PREFIX}.0.self_attn.q_proj.lora_A.weight"
Q_B = f"{PREFIX}.0.self_attn.q_proj.lora_B.weight"
ARGS = ModelArgs.from_params(meta_params(hf_model("2")))
LORA_KINDS: dict[str, dict[str, Any]] = {
    "seven": {"target_modules": SEVEN},
    "q and v": {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.05},
    "rslora": {"target_modules": SEVEN, "use_rslora": True},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*(0\.self_attn\.k_proj|1\.mlp\.up_proj)"},
    "one layer": {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1]},
    "excluded": {"target_modules": SEVEN, "exclude_modules": ["layers.1.self_attn.q_proj"]},
    "gaussian": {"target_modules": ["k_proj"], "init_lora_weights": "gaussian"},
}


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(3))


def peft_lora(base: LlamaForCausalLM, **options: Any) -> PeftModel:
    """PEFT's LoRA on the model, every matrix random as if it had been trained."""
    model = get_peft_model(base, LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 24, **options}))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def peft_prompt(base: LlamaForCausalLM) -> PeftModel:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N_VIRTUAL)
    torch.manual_seed(2)
    return get_peft_model(base, config).eval()


@functools.cache
def peft_files(kind: str) -> dict[str, bytes]:
    """The files of an adapter as PEFT saves it."""
    model = (
        peft_prompt(hf_model("2"))
        if kind == "prompt"
        else peft_lora(hf_model("2"), target_modules=["q_proj", "v_proj"])
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {
            name: (Path(folder) / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")
        }


def saved_lora(folder: Path, kind: str = "lora") -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in peft_files(kind).items():
        (folder / name).write_bytes(content)
    return folder


def saved_prompt(folder: Path) -> Path:
    return saved_lora(folder, "prompt")


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def to_bin(folder: Path, **options: Any) -> Path:
    """The folder as older versions of PEFT wrote it."""
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin", **options)
    return folder


def meta_rows(b: Tensor, head_dim: int) -> Tensor:
    """Rows in Meta's order, row by row: of each head, row 2i is Hugging Face's i, row 2i + 1 its i + D/2."""
    half = head_dim // 2
    order = [h * head_dim + i + part * half for h in range(len(b) // head_dim) for i in range(half) for part in (0, 1)]
    return b[order]


def lora_of(model: PeftModel) -> dict[str, tuple[Tensor, Tensor]]:
    """PEFT's matrices in memory by Meta's names."""
    state, found = model.state_dict(), {}
    for layer in range(N_LAYERS):
        for theirs, ours in META.items():
            stem = f"{PREFIX}.{layer}.{theirs}"
            if f"{stem}.lora_A.default.weight" in state:
                b = state[f"{stem}.lora_B.default.weight"]
                b = meta_rows(b, ARGS.head_dim) if ours in ("attention.wq", "attention.wk") else b
                found[f"layers.{layer}.{ours}"] = (state[f"{stem}.lora_A.default.weight"], b)
    return found


def folded(base: LlamaForCausalLM, adapter: LoraAdapter) -> Transformer:
    """Our model with the updates added to its weights."""
    state = meta_state(base)
    for name, (a, b) in adapter.weights.items():
        state[f"{name}.weight"] += adapter.scaling * b @ a
    model = Transformer(ModelArgs.from_params(meta_params(base)))
    model.load_state_dict(state)
    return model


def random_lora(args: ModelArgs, names: list[str], **changes: Any) -> LoraAdapter:
    """Random matrices on linears that transformers' own model says the shapes of."""
    shapes = {name: weight.shape for name, weight in meta_state(hf_model("2")).items()}
    generator = torch.Generator().manual_seed(4)
    weights = {
        name: (
            torch.randn(3, shapes[f"{name}.weight"][1], generator=generator) * 0.1,
            torch.randn(shapes[f"{name}.weight"][0], 3, generator=generator) * 0.1,
        )
        for name in names
    }
    targets = tuple(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return LoraAdapter(**{"r": 3, "alpha": 6.0, "targets": targets, "weights": weights, **changes})


def random_prompt() -> PromptAdapter:
    return PromptAdapter(torch.randn(N_VIRTUAL, DIM, generator=torch.Generator().manual_seed(5)), "Below is", "a/base")


def same(one: Adapter, other: Adapter) -> bool:
    if isinstance(one, PromptAdapter) and isinstance(other, PromptAdapter):
        return torch.equal(one.prompt, other.prompt) and one.init_text == other.init_text
    assert isinstance(one, LoraAdapter)
    assert isinstance(other, LoraAdapter)
    assert replace(one, weights={}) == replace(other, weights={})
    assert list(one.weights) == list(other.weights)
    return all(
        torch.equal(x, y) for name in one.weights for x, y in zip(one.weights[name], other.weights[name], strict=True)
    )


def loaded_by_peft(base: LlamaForCausalLM, folder: Path) -> PeftModel:
    """PEFT's model, which may not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, to PEFT
        return PeftModel.from_pretrained(base, folder).eval()


# -- what PEFT writes ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LORA_KINDS)
@pytest.mark.parametrize("generation", ["2", "3.2"])
@torch.no_grad()
def test_lora_of_peft(generation: str, kind: str, tmp_path: Path) -> None:
    model = peft_lora(hf_model(generation), **LORA_KINDS[kind])
    model.save_pretrained(tmp_path)
    args = ModelArgs.from_params(meta_params(hf_model(generation)))
    adapter = read_adapter(tmp_path, args)
    assert isinstance(adapter, LoraAdapter)
    expected = lora_of(model)
    assert expected
    assert adapter.weights.keys() == expected.keys()
    for name, halves in expected.items():
        for found, wanted in zip(adapter.weights[name], halves, strict=True):
            assert torch.equal(found, wanted)
    assert set(adapter.targets) == {name.rpartition(".")[2] for name in expected}
    assert adapter.scaling == pytest.approx(24 / (2 if kind == "rslora" else 4))
    assert adapter.dropout == LORA_KINDS[kind].get("lora_dropout", 0.0)
    logits = model(tokens()).logits
    assert (logits - hf_model(generation)(tokens()).logits).abs().max() > 0.05
    torch.testing.assert_close(folded(hf_model(generation), adapter)(tokens()), logits, **LOGITS)


def test_prompt_of_peft(tmp_path: Path) -> None:
    model = peft_prompt(hf_model("2"))
    model.save_pretrained(tmp_path)
    adapter = read_adapter(str(tmp_path), ARGS)
    assert isinstance(adapter, PromptAdapter)
    assert torch.equal(adapter.prompt, model.get_prompt_embedding_to_save("default"))
    assert adapter.prompt.dtype == torch.float32
    assert not adapter.prompt.requires_grad


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("save", [saved_prompt, saved_lora])
def test_older_bin_files(save: Callable[[Path], Path], zipped: bool, tmp_path: Path) -> None:
    expected = read_adapter(save(tmp_path), ARGS)
    to_bin(tmp_path, _use_new_zipfile_serialization=zipped)
    assert same(read_adapter(tmp_path, ARGS), expected)
    assert same(read_adapter(tmp_path / "adapter_model.bin", ARGS), expected)


@pytest.mark.parametrize("save", [saved_prompt, saved_lora])
def test_any_file_of_the_folder_names_the_adapter(
    save: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = read_adapter(save(tmp_path), ARGS)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert same(read_adapter(tmp_path / name, ARGS), expected)
    assert capsys.readouterr().err == ""
    assert same(read_adapter(tmp_path / "adapter_model.bin", ARGS), expected)
    assert "adapter_model.safetensors beside it is taken" in capsys.readouterr().err
    to_bin(tmp_path)
    assert same(read_adapter(tmp_path / "adapter_model.safetensors", ARGS), expected)
    assert "adapter_model.bin beside it is taken" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    saved_lora(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    edit_tensors(tmp_path, lambda tensors: tensors.update({k: v.to(dtype) for k, v in stored.items()}))
    adapter = read_adapter(tmp_path, ARGS)
    assert isinstance(adapter, LoraAdapter)
    a, _ = adapter.weights["layers.0.attention.wq"]
    assert torch.equal(a, stored[Q_A].to(dtype).float())


def test_all_linear_means_the_seven(tmp_path: Path) -> None:
    """PEFT spells it out when it saves; others may leave it."""
    adapter = random_lora(ARGS, FULL)
    write_adapter(tmp_path, adapter, ARGS)
    assert same(read_adapter(edit_config(tmp_path, target_modules="all-linear"), ARGS), adapter)
    assert same(read_adapter(edit_config(tmp_path, target_modules=None), ARGS), adapter)
    saved_lora(tmp_path)
    message = refusal(edit_config(tmp_path, target_modules="all-linear"))
    assert "lacks the updates of model.layers.0.mlp.down_proj" in message


def test_names_of_a_state_dict_in_memory(tmp_path: Path) -> None:
    expected = read_adapter(saved_lora(tmp_path), ARGS)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    inside = {key.replace(".weight", ".default.weight"): torch.nn.Parameter(v) for key, v in tensors.items()}
    torch.save(inside, tmp_path / "adapter_model.bin", _use_new_zipfile_serialization=False)
    adapter = read_adapter(tmp_path, ARGS)
    assert same(adapter, expected)
    assert isinstance(adapter, LoraAdapter)
    assert not any(half.requires_grad for halves in adapter.weights.values() for half in halves)


# -- what the original fork wrote -----------------------------------------------------------------------


def test_published_adapters_of_the_original_fork(tmp_path: Path) -> None:
    """TEXT with a null tokenizer, which PEFT refuses: the fields are those of the published saved-alpaca7b."""
    prompt = random_prompt().prompt
    config = {
        "base_model_name_or_path": "some/llama-7b-hf", "inference_mode": True,
        "num_attention_heads": ARGS.n_heads, "num_layers": ARGS.n_layers, "num_transformer_submodules": 1,
        "num_virtual_tokens": N_VIRTUAL, "peft_type": "PROMPT_TUNING", "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "Below is\n\n", "task_type": "CAUSAL_LM", "token_dim": DIM,
        "tokenizer_name_or_path": None,
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"prompt_embeddings": prompt}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="tokenizer_name_or_path can't be None"):
        PromptTuningConfig.from_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "adapter_model.bin"):
        adapter = read_adapter(path, ARGS)
        assert same(adapter, PromptAdapter(prompt, "Below is\n\n"))
        assert adapter.base_model == "some/llama-7b-hf"


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("location", ["cpu", "cuda:3"])
def test_prefix_files(location: str, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(N_VIRTUAL, DIM)}).half()
    # As if it had been saved from a card that is not here.
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: location)
    torch.save(encoder.state_dict(), tmp_path / "prefix.3.pth", _use_new_zipfile_serialization=zipped)
    adapter = read_adapter(tmp_path / "prefix.3.pth", ARGS)
    assert same(adapter, PromptAdapter(encoder["embedding"].weight.detach().float()))


def test_a_prompt_without_its_configuration(tmp_path: Path) -> None:
    prompt = random_prompt().prompt
    torch.save({"prompt_embeddings": prompt}, tmp_path / "pytorch_model.bin")
    assert same(read_adapter(tmp_path / "pytorch_model.bin", ARGS), PromptAdapter(prompt))


# -- what we write ---------------------------------------------------------------------------------

FULL = [f"layers.{layer}.{ours}" for layer in range(N_LAYERS) for ours in META.values()]
PARTS = {
    "all": FULL,
    "wq and wv": [name for name in FULL if name.endswith(("wq", "wv"))],
    "uneven": ["layers.0.attention.wk", "layers.0.feed_forward.w2", "layers.1.attention.wk"],
    "one layer": ["layers.1.attention.wq", "layers.1.attention.wk"],
}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_peft_loads_our_lora(part: str, use_rslora: bool, tmp_path: Path) -> None:
    adapter = random_lora(ARGS, PARTS[part], use_rslora=use_rslora, dropout=0.05, alpha=7.5)
    base_name = "the/base" if use_rslora else None
    write_adapter(tmp_path / "new" / "out", adapter, ARGS, base_name)
    assert same(read_adapter(tmp_path / "new" / "out", ARGS), replace(adapter, base_model=base_name))
    base = hf_model("2")
    for name, (a, b) in adapter.weights.items():
        layer, ours = name.removeprefix("layers.").split(".", 1)
        theirs = {ours: theirs for theirs, ours in META.items()}[ours]
        if ours in ("attention.wq", "attention.wk"):
            b = torch.empty_like(b).index_copy_(0, meta_rows(torch.arange(len(b)), ARGS.head_dim), b)
        scaling = 7.5 / (3**0.5 if use_rslora else 3)
        base.get_submodule(f"model.layers.{layer}.{theirs}").weight += scaling * b @ a
    expected = base(tokens()).logits
    assert (expected - hf_model("2")(tokens()).logits).abs().max() > 0.05
    logits = loaded_by_peft(hf_model("2"), tmp_path / "new" / "out")(tokens()).logits
    torch.testing.assert_close(logits, expected, **LOGITS)


@torch.no_grad()
def test_peft_loads_our_prompt(tmp_path: Path) -> None:
    adapter, base = random_prompt(), hf_model("2")
    write_adapter(tmp_path, adapter, ARGS)
    embedded = torch.cat((adapter.prompt.expand(2, -1, -1), base.get_input_embeddings()(tokens())), dim=1)
    expected = base(inputs_embeds=embedded).logits
    logits = loaded_by_peft(hf_model("2"), tmp_path)(tokens()).logits
    torch.testing.assert_close(logits, expected, **LOGITS)
    ours = Transformer(ARGS)
    ours.load_state_dict(meta_state(base))
    torch.testing.assert_close(ours(embeddings=embedded), logits, **LOGITS)
    found = read_adapter(tmp_path, ARGS)
    assert same(found, adapter)
    assert found.base_model == "a/base"


@pytest.mark.parametrize("kind", ["prompt", "lora"])
def test_every_field_is_one_of_pefts(kind: str, tmp_path: Path) -> None:
    adapter = random_prompt() if kind == "prompt" else random_lora(ARGS, FULL)
    write_adapter(tmp_path, adapter, ARGS)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    theirs = PromptTuningConfig if kind == "prompt" else LoraConfig
    assert config.keys() <= {field.name for field in fields(theirs)}
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    with (tmp_path / "adapter_model.safetensors").open("rb") as file:
        header = json.loads(file.read(8 + int.from_bytes(file.read(8), "little") - 8))
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {entry["dtype"] for entry in header.values()} == {"F32"}


def test_every_field_of_pefts_own_is_decided(tmp_path: Path) -> None:
    """A configuration as PEFT writes it today, every field at its default, holds nothing that is refused."""
    read_adapter(saved_lora(tmp_path / "lora"), ARGS)
    read_adapter(saved_prompt(tmp_path / "prompt"), ARGS)


def test_an_adapter_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    to_bin(saved_lora(tmp_path))
    (tmp_path / "metrics.jsonl").write_text("{}")
    for leftover in ("adapter.new", "adapter.new.partial"):  # of a run that was killed
        saved_lora(tmp_path / leftover)
    adapter = random_lora(ARGS, PARTS["uneven"])
    write_adapter(tmp_path, adapter, ARGS)
    assert len(list(tmp_path.iterdir())) == 3
    assert same(read_adapter(tmp_path / "adapter_model.bin", ARGS), adapter)
    write_adapter(tmp_path, random_prompt(), ARGS)
    assert same(read_adapter(tmp_path, ARGS), random_prompt())
    assert (tmp_path / "metrics.jsonl").read_text() == "{}"
    assert not (tmp_path / "adapter_model.bin").exists()


def test_bfloat16_and_shared_memory_are_written_as_float32(tmp_path: Path) -> None:
    both = torch.randn(2 * N_VIRTUAL, DIM).bfloat16()
    write_adapter(tmp_path, PromptAdapter(both[::2].requires_grad_()), ARGS)
    assert same(read_adapter(tmp_path, ARGS), PromptAdapter(both[::2].detach().float()))


def test_a_full_disk_leaves_the_earlier_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapter(tmp_path, random_prompt(), ARGS)

    def fsync(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(AdapterError, match=r"^cannot write .*No space left on device[^\n]*$"):
        write_adapter(tmp_path, random_lora(ARGS, FULL), ARGS)
    assert same(read_adapter(tmp_path, ARGS), random_prompt())
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (PromptAdapter(torch.full((2, DIM), torch.nan)), "128 values of 128 that are NaN"),
        (PromptAdapter(torch.zeros(2, 32)), "the adapter has 32 features, the model 64"),
        (random_lora(ARGS, FULL, r=4), "rank 3, adapter_config.json says r = 4"),
        (random_lora(replace(ARGS, n_layers=1), []), "holds no tensors"),
        (LoraAdapter(1, 1.0, ("wq",), {"layers.2.attention.wq": (torch.ones(1, 1),) * 2}), "no linear layers.2.att"),
    ],
)
def test_what_would_not_be_read_is_not_written(adapter: Adapter, message: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, random_prompt(), ARGS)
    with pytest.raises(AdapterError, match=message):
        write_adapter(tmp_path, adapter, ARGS)
    assert same(read_adapter(tmp_path, ARGS), random_prompt())
    assert len(list(tmp_path.iterdir())) == 2


def test_a_disk_that_alters_what_is_written_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapter(tmp_path, random_prompt(), ARGS)
    from llama.adapters import files

    def flip(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
        content = bytearray(save(tensors, metadata))
        content[-1] ^= 1
        return bytes(content)

    save = files.save
    monkeypatch.setattr(files, "save", flip)
    for adapter in (PromptAdapter(torch.ones(2, DIM)), random_lora(ARGS, FULL)):
        with pytest.raises(AdapterError, match="not read back as it was written"):
            write_adapter(tmp_path, adapter, ARGS)
    assert same(read_adapter(tmp_path, ARGS), random_prompt())


# -- bad input -------------------------------------------------------------------------------------


def refusal(path: Path, args: ModelArgs = ARGS) -> str:
    with pytest.raises(AdapterError) as raised:
        read_adapter(path, args)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_nothing_there(tmp_path: Path) -> None:
    assert "no adapter at" in refusal(tmp_path / "nowhere")
    assert "no adapter at" in refusal(tmp_path / "nowhere" / "adapter_model.bin")
    assert "holds no adapter: expected adapter_config.json with adapter_model.safetensors" in refusal(tmp_path)
    assert "cannot use" in refusal(tmp_path / ("x" * 300))


@pytest.mark.parametrize("save", [saved_prompt, saved_lora])
def test_a_folder_without_its_configuration(save: Callable[[Path], Path], tmp_path: Path) -> None:
    (save(tmp_path) / "adapter_config.json").unlink()
    assert "lacks adapter_config.json" in refusal(tmp_path)


def test_a_lora_file_without_its_configuration(tmp_path: Path) -> None:
    shutil.copy(saved_lora(tmp_path / "a") / "adapter_model.safetensors", tmp_path / "lora.safetensors")
    assert "is no soft prompt, and there is no adapter_config.json beside it" in refusal(tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[]", "must hold an object, found list"),
        (b"{}", "peft_type None"),
    ],
)
def test_a_broken_configuration(content: bytes, message: str, tmp_path: Path) -> None:
    (saved_prompt(tmp_path) / "adapter_config.json").write_bytes(content)
    assert message in refusal(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *[({"peft_type": kind}, repr(kind)) for kind in ("P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING")],
        ({"peft_type": ["LORA"]}, "['LORA']"),
        ({"peft_type": "LORA"}, "lacks r, lora_alpha"),
        ({"num_virtual_tokens": None}, "lacks num_virtual_tokens"),
        ({"num_virtual_tokens": "5"}, "num_virtual_tokens must be a positive integer, found '5'"),
        ({"num_virtual_tokens": 6}, "has 5 virtual tokens, num_virtual_tokens in adapter_config.json is 6"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules = 2"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head']"),
        ({"num_ranks": 4}, "num_ranks = 4"),
        ({"num_layers": 32}, "num_layers is 32, the model has 2: it was trained for another model"),
    ],
)
def test_refused_configurations_of_prompts(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in refusal(edit_config(saved_prompt(tmp_path), **changes))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True), ("alpha_pattern", {"q_proj": 32}), ("rank_pattern", {"q_proj": 8}), ("bias", "all"),
        ("bias", "lora_only"), ("modules_to_save", ["lm_head"]), ("layer_replication", [[0, 1], [0, 2]]),
        ("fan_in_fan_out", True), ("megatron_config", {"tensor_model_parallel_size": 2}), ("lora_bias", True),
        ("target_parameters", ["experts"]), ("trainable_token_indices", [1, 2]), ("use_qalora", True),
        ("alora_invocation_tokens", [1]), ("monteclora_config", {"n": 1}), ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 3}), ("kasa_config", {"beta": 1}), ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "olora"), ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"), ("init_lora_weights", "lora_ga"), ("an_option_of_tomorrow", "on"),
    ],
)  # fmt: skip
def test_refused_options_of_lora(field: str, value: Any, tmp_path: Path) -> None:
    message = refusal(edit_config(saved_lora(tmp_path), **{field: value}))
    assert f"{field} = {value!r} changes the computation" in message


def test_options_that_do_not_matter(tmp_path: Path) -> None:
    expected = read_adapter(saved_lora(tmp_path), ARGS)
    harmless = {
        "init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "runtime_config": {"ephemeral_gpu_offload": False},
        "an_option_of_tomorrow": None, "another": [], "lora_bias": False, "megatron_core": "megatron.core",
        "revision": "main", "task_type": None, "merge_weights": False, "enable_lora": None, "auto_mapping": {"a": 1},
    }  # fmt: skip
    assert same(read_adapter(edit_config(tmp_path, **harmless), ARGS), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 8}, "has rank 4, adapter_config.json says r = 8"),
        ({"r": 0}, "r must be a positive integer, found 0"),
        ({"r": True}, "r must be a positive integer, found True"),
        ({"r": None}, "lacks r"),
        ({"lora_alpha": "16"}, "lora_alpha must be a number, found '16'"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number, found nan"),
        ({"lora_dropout": 1.5}, "lora_dropout must be at least 0 and less than 1, found 1.5"),
        ({"use_rslora": "no"}, "use_rslora must be true or false, found 'no'"),
        ({"target_modules": "("}, "target_modules is no regular expression"),
        ({"target_modules": 7}, "target_modules must be a text or a list of texts, found 7"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules has lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules has model.embed_tokens"),
        ({"target_modules": ["q_proj"]}, "has updates of model.layers.0.self_attn.v_proj, model.layers.1"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj"]}, "lacks the updates of model.layers.0.self_attn.k_proj"),
        ({"layers_to_transform": 0}, "has updates of model.layers.1"),
    ],
)
def test_configurations_of_lora_that_do_not_fit(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in refusal(edit_config(saved_lora(tmp_path), **changes))


def test_a_lora_of_a_model_with_fewer_layers(tmp_path: Path) -> None:
    message = refusal(saved_lora(tmp_path), replace(ARGS, n_layers=3))
    assert "ends with layer 1, the model has 3 layers (from 0): it was trained for another model" in message


def drop(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(key)


def put(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({key: value})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop(Q_B), f"{Q_A} is there without its lora_B"),
        (drop(Q_A), f"{Q_B} is there without its lora_A"),
        (put(Q_A, torch.zeros(4, 32)), f"{Q_A}: the adapter has 32 features, the model 64: it was trained for another"),
        (put(Q_B, torch.zeros(32, 4)), f"{Q_B}: the adapter has 32 features, the model 64: it was trained for another"),
        (put(Q_B, torch.zeros(64, 2)), f"{Q_B} has rank 2, adapter_config.json says r = 4"),
        (put(Q_A, torch.zeros(0)), f"{Q_A} is [0], expected [4, 64]"),
        (put(Q_A, torch.full((4, 64), torch.inf)), f"{Q_A} has 256 values of 256 that are NaN or infinite"),
        (put(Q_A.replace("layers.0", "layers.7"), torch.zeros(4, 64)), "layer 7, the model has 2 layers"),
        (put("base_model.model.lm_head.lora_A.weight", torch.zeros(4, 64)), "base_model.model.lm_head.lora_A.weight"),
        (put("base_model.model.model.embed_tokens.lora_embedding_A", torch.zeros(4, 64)), "embed_tokens.lora_emb"),
        (put(f"{PREFIX}.0.self_attn.q_proj.lora_magnitude_vector", torch.zeros(64)), "q_proj.lora_magnitude_vector"),
        (put(Q_A.replace("lora_A", "lora_A.default"), torch.zeros(4, 64)), "holds several adapters"),
        (put(Q_A, torch.zeros(4, 64, dtype=torch.int8)), "I8"),
        (dict.clear, "holds no tensors"),
    ],
)
def test_lora_tensors_that_do_not_fit(
    edit: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    found = refusal(edit_tensors(saved_lora(tmp_path), edit))
    assert message in found
    assert "adapter_model.safetensors" in found


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(N_VIRTUAL, 4096), "prompt_embeddings: the adapter has 4096 features, the model 64"),
        (torch.zeros(0, DIM), "prompt_embeddings is [0, 64], expected [virtual tokens, 64]"),
        (torch.zeros(DIM), "prompt_embeddings is [64]"),
        (torch.full((N_VIRTUAL, DIM), torch.nan), "320 values of 320 that are NaN or infinite"),
    ],
)
def test_prompts_that_do_not_fit(value: Tensor, message: str, tmp_path: Path) -> None:
    saved_prompt(tmp_path)
    assert message in refusal(edit_tensors(tmp_path, put("prompt_embeddings", value)))
    torch.save({"embedding.weight": value}, tmp_path / "prefix.0.pth")
    assert message.replace("prompt_embeddings", "embedding.weight") in refusal(tmp_path / "prefix.0.pth")


def test_other_tensors_beside_a_prompt_are_named(tmp_path: Path) -> None:
    saved_prompt(tmp_path)
    edit_tensors(tmp_path, put("prefix_task_cols", torch.zeros(2)))
    assert "holds tensors that no adapter of this model has: prefix_task_cols" in refusal(tmp_path)
    edit_tensors(tmp_path, lambda tensors: (tensors.clear(), tensors.update({"other": torch.zeros(2)})))
    assert "has: other" in refusal(tmp_path)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("save", [saved_prompt, saved_lora])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "is damaged or cut off"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is damaged or cut off"),
        (lambda path: path.write_bytes(b"no pickle at all"), "is damaged"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
        (lambda path: path.write_bytes(pickle.dumps(Bomb())), "is damaged or not a PyTorch checkpoint"),
        (lambda path: torch.save(Bomb(), path), "loading it could run code"),
        (lambda path: torch.save(Bomb(), path, _use_new_zipfile_serialization=False), "loading it could run code"),
        (lambda path: torch.save({}, path), "holds no tensors"),
        (lambda path: torch.save({}, path, _use_new_zipfile_serialization=False), "holds no tensors"),
        (lambda path: torch.save([1], path), "holds a list, not named tensors"),
        (lambda path: torch.save({"prompt_embeddings": 1}, path), "no plain tensors: prompt_embeddings"),
    ],
)
def test_damaged_files(
    save: Callable[[Path], Path], damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    path = to_bin(save(tmp_path)) / "adapter_model.bin"
    damage(path)
    found = refusal(tmp_path)
    assert message in found
    assert str(path) in found
    assert not Path("harmed").exists()


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_cut_off_safetensors(size: int, tmp_path: Path) -> None:
    path = saved_prompt(tmp_path) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert str(path) in refusal(tmp_path)
