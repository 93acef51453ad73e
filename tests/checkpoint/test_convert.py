"""Conversions: bit for bit between all layouts, and what others load of ours computes what it did."""

import base64
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launch import run_forked
from support import hf_model, meta_state, sentencepiece_model, write_hf, write_meta
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from llama import config
from llama.checkpoint import manifest
from llama.checkpoint.convert import convert, parse_size
from llama.checkpoint.files import StoredTensor
from llama.checkpoint.load import load_model
from llama.checkpoint.scratch import beside, geometry_of
from llama.checkpoint.source import open_checkpoint
from llama.checkpoint.table import specs
from llama.config import ModelArgs
from llama.errors import LlamaError
from llama.parallel import groups
from llama.parallel.partition import Partition
from llama.tokenizer import find_tokenizer, load_tokenizer

SLOW_IS_FINE = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
ALL = ["1", "2", "3", "3.1", "3.2"]
LONG = torch.arange(1, 101)[None] * 3  # past the 64 positions at which the small models' RoPE is scaled
TEXTS = [
    "", "The quick brown fox", "  two  blanks ", "tabs\tand\n\nlines\r\n", "12345 + 678",
    "naïve 你好 🦙👩‍👩‍👧", "e\u0301\x00",
    "w12 number 44 the the",
]  # fmt: skip


def whole(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, a tied output layer too."""
    state = {}
    for name, tensor in open_checkpoint(path).tensors.items():
        state[name] = torch.empty(tensor.spec.shape, dtype=tensor.dtype)
        tensor.read_into(tuple(slice(0, size) for size in tensor.spec.shape), state[name])
    state.setdefault("output.weight", state["tok_embeddings.weight"])
    return state


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def same_geometry(left: ModelArgs, right: ModelArgs) -> bool:
    """The FFN's width counts, not the rule that gave it; nor a tie that Meta's params do not tell."""
    rule: dict[str, Any] = {"multiple_of": 256, "ffn_dim_multiplier": None, "tied": False}
    return dataclasses.replace(left, **rule) == dataclasses.replace(right, **rule)


def scratch_state(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """LLMs-from-scratch's names, as its notebooks fill them from Hugging Face's weights, row for row."""
    names = {
        "self_attn.q_proj": "att.W_query", "self_attn.k_proj": "att.W_key", "self_attn.v_proj": "att.W_value",
        "self_attn.o_proj": "att.out_proj", "mlp.gate_proj": "ff.fc1", "mlp.up_proj": "ff.fc2",
        "mlp.down_proj": "ff.fc3", "input_layernorm": "norm1", "post_attention_layernorm": "norm2",
    }  # fmt: skip
    weights = model.state_dict()
    state = {
        "tok_emb.weight": weights["model.embed_tokens.weight"],
        "final_norm.weight": weights["model.norm.weight"],
        "out_head.weight": weights["lm_head.weight"],
    }
    for layer in range(model.config.num_hidden_layers):
        for theirs, name in names.items():
            state[f"trf_blocks.{layer}.{name}.weight"] = weights[f"model.layers.{layer}.{theirs}.weight"]
    return state


def toy_ranks(folder: Path) -> Path:
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the", b"\xe4\xbd", b"\xe4\xbd\xa0", b"12"]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path


def output_of(folder: Path, step: int, kind: str) -> Path:
    return folder / f"step{step}.pth" if kind == "single" else folder / f"step{step}"


# -- weights ---------------------------------------------------------------------------------------


@given(
    generation=st.sampled_from(ALL),
    layout=st.sampled_from(["meta", "hf"]),
    shards=st.sampled_from([1, 2]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    steps=st.lists(st.sampled_from(["hf", "meta", "single"]), min_size=2, max_size=3),
    shard_size=st.sampled_from(["5GB", "60KB"]),
)
@SLOW_IS_FINE
def test_every_chain_of_conversions_gives_every_tensor_back(
    tmp_path_factory: pytest.TempPathFactory, generation: str, layout: str, shards: int, dtype: torch.dtype,
    steps: list[str], shard_size: str,
) -> None:  # fmt: skip
    folder, model = tmp_path_factory.mktemp("convert"), hf_model(generation)
    if layout == "hf":
        path = write_hf(folder / "model", model.to(dtype))
    else:
        path = write_meta(folder / "model", model, shards, dtype=dtype)
    expected = {name: weight.to(dtype) for name, weight in meta_state(model).items()}
    args = open_checkpoint(path).args
    for step, kind in enumerate(steps):
        path = convert(path, kind, output_of(folder, step, kind), max_shard_size=shard_size)
        assert open_checkpoint(path).format == kind
        assert same_geometry(open_checkpoint(path).args, args)
        assert same(whole(path), expected)
        assert manifest.verify(beside(path) if kind == "single" else path) >= len(expected) - 1


@pytest.mark.parametrize("generation", ALL)
def test_transformers_computes_the_same(tmp_path: Path, generation: str) -> None:
    model = hf_model(generation)
    source = write_meta(tmp_path / "meta", model, 2)
    folder = convert(source, "hf", tmp_path / "hf")
    loaded, info = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.config.tie_word_embeddings == (generation == "3.2")
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(LONG).logits, model(LONG).logits, atol=1e-4, rtol=0)


def test_metas_file_is_the_one_that_meta_writes(tmp_path: Path) -> None:
    model = hf_model("2")
    folder = convert(write_hf(tmp_path / "hf", model), "meta", tmp_path / "meta")
    state = torch.load(folder / "consolidated.00.pth", weights_only=True)
    assert same(state, meta_state(model))


@pytest.mark.parametrize("generation", ["2", "3.2"])
def test_the_single_file_is_the_one_that_llms_from_scratch_fills(tmp_path: Path, generation: str) -> None:
    model = hf_model(generation)
    file = convert(write_meta(tmp_path / "meta", model), "single", tmp_path / "out" / "model.pth")
    assert same(torch.load(file, weights_only=True), scratch_state(model))


def test_a_dtype_converts_every_tensor(tmp_path: Path) -> None:
    model = hf_model("3")
    folder = convert(write_meta(tmp_path / "meta", model), "hf", tmp_path / "hf", dtype=torch.bfloat16)
    assert same(whole(folder), {name: weight.bfloat16() for name, weight in meta_state(model).items()})
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_large_models_are_written_in_indexed_shards(tmp_path: Path) -> None:
    model = hf_model("3.1")
    folder = convert(write_meta(tmp_path / "meta", model), "hf", tmp_path / "hf", max_shard_size="90KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))
    ]
    assert len(files) > 3
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert all(file.stat().st_size < 90_000 + 4_000 for file in files)
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    loaded = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in loaded.state_dict().items())


def test_an_output_that_tuning_set_apart_is_kept(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "meta", hf_model("3.2"))
    state = torch.load(source / "consolidated.00.pth", weights_only=True)
    state["output.weight"] += 1
    torch.save(state, source / "consolidated.00.pth")
    folder = convert(source, "hf", tmp_path / "hf")
    assert not json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    assert same(whole(folder), state)


# -- the single file -------------------------------------------------------------------------------


def args_of(model: LlamaForCausalLM, folder: Path) -> ModelArgs:
    return open_checkpoint(write_hf(folder, model)).args


@pytest.mark.parametrize("generation", ["2", "3.2"])
def test_a_single_file_runs_by_its_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generation: str) -> None:
    model = hf_model(generation)
    monkeypatch.setitem(config.GEOMETRIES, "llama-3.2-toy", args_of(model, tmp_path / "hf"))
    # Older versions of its model save computed tables too.
    tables = {"cos": torch.ones(8, 4), "trf_blocks.0.att.mask": torch.ones(8, 8, dtype=torch.bool)}
    file = tmp_path / "model.pth"
    torch.save(scratch_state(model) | tables, file)
    checkpoint = open_checkpoint(file)
    ranks = groups.current()
    ours = load_model(checkpoint, Partition.create(checkpoint.args, 1), ranks, torch.float32)
    with torch.no_grad():
        logits = ours(LONG)
        torch.testing.assert_close(logits, model(LONG).logits, atol=1e-4, rtol=0)


def shapes_of(name: str) -> dict[str, StoredTensor]:
    args = config.GEOMETRIES[name]
    return {
        spec.scratch_name: StoredTensor(Path("x"), torch.bfloat16, spec.shape, (), 0) for spec in specs(args).values()
    }


@pytest.mark.parametrize(
    ("shapes", "path", "expected"),
    [
        ("llama-3.2-1b", "llama3.2-1B-instruct.pth", "llama-3.2-1b"),
        ("llama-3.2-3b", "anything.pth", "llama-3.2-3b"),
        ("llama-2-7b", "anything.pth", "llama-2-7b"),
        ("llama-2-7b", "llama1-7b.pth", "llama-1-7b"),
        ("llama-3-8b", "llama3-8B-instruct.pth", "llama-3-8b"),
        ("llama-3-8b", "Llama-3.1-8B.pth", "llama-3.1-8b"),
        ("llama-3-8b", "llama_3_1_8b.pth", "llama-3.1-8b"),
        ("llama-3-8b", "llama-3-1-8b.pth", "llama-3.1-8b"),
        ("llama-3-8b", "Llama-3.1-8B-Instruct/model.pth", "llama-3.1-8b"),
        ("llama-3-70b", "llama3.3-70b.pth", "llama-3.3-70b"),
    ],
)
def test_the_geometry_is_found_by_shapes_and_name(tmp_path: Path, shapes: str, path: str, expected: str) -> None:
    assert geometry_of(tmp_path / path, shapes_of(shapes)) == config.GEOMETRIES[expected]


@pytest.mark.parametrize("name", ["model.pth", "llama-4-8b.pth", "llama3.2-8b.pth"])
def test_shapes_of_several_models_are_refused_without_a_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(LlamaError, match=r"llama-3-8b and llama-3\.1-8b, which compute differently.*llama3\.1-8b\.pth"):
        geometry_of(tmp_path / name, shapes_of("llama-3-8b"))


def test_parameters_beside_a_file_decide(tmp_path: Path) -> None:
    model = hf_model("3.1")
    torch.save(scratch_state(model), tmp_path / "model.pth")
    with pytest.raises(LlamaError, match=r"no published Llama \(dim 64, n_layers 2.*model\.pth\.json"):
        open_checkpoint(tmp_path / "model.pth")
    shutil.copy(write_hf(tmp_path / "hf", model) / "config.json", tmp_path / "model.pth.json")
    assert same(whole(tmp_path / "model.pth"), meta_state(model))


def test_the_tokenizer_lies_beside_a_file_or_one_folder_up(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    file = tmp_path / "a" / "b" / "model.pth"
    file.write_bytes(b"")
    (tmp_path / "a" / "tokenizer.model").write_bytes(b"x")
    assert find_tokenizer(file) == (tmp_path / "a").resolve()
    (tmp_path / "a" / "b" / "tokenizer.model").write_bytes(b"x")
    assert find_tokenizer(file) == (tmp_path / "a" / "b").resolve()


# -- tokenizers ------------------------------------------------------------------------------------


@pytest.fixture(params=["toy sentencepiece", "toy tiktoken", "llama 2", "llama 3"])
def tokenizer_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param.startswith("toy"):
        return (sentencepiece_model if "piece" in request.param else toy_ranks)(tmp_path / "tokenizer")
    return request.getfixturevalue("test_data") / f"{request.param.replace(' ', '')}_tokenizer.model"


def test_auto_tokenizer_gives_the_same_ids(tmp_path: Path, tokenizer_file: Path) -> None:
    ours = load_tokenizer(tokenizer_file)
    source = write_meta(tmp_path / "meta", hf_model("2", vocab_size=ours.n_words, num_hidden_layers=1))
    folder = convert(source, "hf", tmp_path / "hf", tokenizer_path=tokenizer_file)
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = ours.encode(text, bos=True, eos=False)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids[1:])
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert load_tokenizer(folder / "tokenizer.json").stop_tokens == ours.stop_tokens
    generation = json.loads((folder / "generation_config.json").read_text())
    stops = generation["eos_token_id"]
    assert set(stops if isinstance(stops, list) else [stops]) == ours.stop_tokens
    assert generation["bos_token_id"] == ours.bos_id


def test_a_tokenizer_travels_through_all_layouts(tmp_path: Path) -> None:
    sentencepiece_model(tmp_path / "meta")
    path = write_meta(tmp_path / "meta", hf_model("2"))
    ids = load_tokenizer(path).encode("the quick fox", bos=True, eos=False)
    for step, kind in enumerate(["hf", "single", "hf", "meta"]):
        path = convert(path, kind, output_of(tmp_path / f"in{step}", step, kind))
        assert load_tokenizer(find_tokenizer(path)).encode("the quick fox", bos=True, eos=False) == ids
    assert (path / "tokenizer.model").exists()


def test_one_folder_up_may_lie_another_models_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    sentencepiece_model(tmp_path / "meta")
    folder = convert(write_meta(tmp_path / "meta", hf_model("2")), "hf", tmp_path / "hf")
    assert AutoTokenizer.from_pretrained(folder)("the").input_ids == load_tokenizer(
        tmp_path / "meta" / "tokenizer.model"
    ).encode("the", bos=True, eos=False)


def test_a_tokenizer_json_without_settings_gets_them(tmp_path: Path) -> None:
    sentencepiece_model(tmp_path / "meta")
    folder = convert(write_meta(tmp_path / "meta", hf_model("2")), "hf", tmp_path / "hf")
    (folder / "tokenizer_config.json").unlink()
    again = AutoTokenizer.from_pretrained(convert(folder, "hf", tmp_path / "again"))
    assert (again.bos_token, again("w12").input_ids[0]) == ("<s>", 1)


def test_a_tokenizer_that_is_there_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentencepiece_model(tmp_path / "meta")
    (tmp_path / "tokenizer.model").write_bytes(b"another")
    convert(write_meta(tmp_path / "meta", hf_model("2")), "single", tmp_path / "x.pth")
    assert (tmp_path / "tokenizer.model").read_bytes() == b"another"
    assert "is there already" in capsys.readouterr().err


def test_a_larger_tokenizer_is_refused(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "meta", hf_model("2", vocab_size=100))
    with pytest.raises(LlamaError, match="320 tokens but the model only 100"):
        convert(source, "hf", tmp_path / "hf", tokenizer_path=sentencepiece_model(tmp_path / "t"))
    assert not (tmp_path / "hf").exists()


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hf", "meta", "single"])
def test_what_is_not_ours_is_never_touched(tmp_path: Path, kind: str) -> None:
    source = write_meta(tmp_path / "m", hf_model("2"))
    target = tmp_path / "out.pth"
    if kind == "single":
        target.write_text("dear")
    else:
        target.mkdir()
        (target / "diary.txt").write_text("dear")
    with pytest.raises(LlamaError, match="not written by a split or a conversion"):
        convert(source, kind, target, force=True)
    assert (target if kind == "single" else target / "diary.txt").read_text() == "dear"


@pytest.mark.parametrize("kind", ["hf", "meta", "single"])
def test_an_earlier_conversion_is_replaced_only_by_force(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out.pth"
    convert(write_meta(tmp_path / "a", hf_model("2", seed=1)), kind, target)
    other = write_meta(tmp_path / "b", hf_model("3.1", seed=2))
    with pytest.raises(LlamaError, match="--force"):
        convert(other, kind, target)
    assert same(whole(convert(other, kind, target, force=True)), meta_state(hf_model("3.1", seed=2)))
    assert not list(tmp_path.glob("*.partial"))


def test_the_source_is_never_replaced(tmp_path: Path) -> None:
    file = convert(write_meta(tmp_path / "m", hf_model("2")), "single", tmp_path / "x.pth")
    folder = convert(file, "hf", tmp_path / "hf")
    shutil.move(file, folder / "x.pth")
    shutil.move(beside(file), folder / "x.pth.json")
    for kind, target in (("single", folder / "x.pth"), ("hf", folder), ("meta", folder)):
        with pytest.raises(LlamaError, match="itself or holds it"):
            convert(folder / "x.pth", kind, target, force=True)


@pytest.mark.parametrize("kind", ["hf", "meta", "single"])
def test_a_full_disk_is_told_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    source = write_meta(tmp_path / "m", hf_model("2"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(LlamaError, match=r"needs .* GB free"):
        convert(source, kind, tmp_path / "out.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("kind", ["hf", "meta", "single"])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    source = write_meta(tmp_path / "m", hf_model("2"))

    def pwrite(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", pwrite)
    with pytest.raises(LlamaError, match="No space left"):
        convert(source, kind, tmp_path / "out.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("kind", ["meta", "single"])
def test_heads_that_a_layout_cannot_express_are_refused(tmp_path: Path, kind: str) -> None:
    source = write_hf(tmp_path / "m", hf_model("3", head_dim=16))
    with pytest.raises(LlamaError, match="cannot express heads of width 16"):
        convert(source, kind, tmp_path / "out.pth")
    assert same(whole(convert(source, "hf", tmp_path / "hf")), whole(source))


def refusal(path: Path) -> str:
    with pytest.raises(LlamaError) as caught:
        open_checkpoint(path)
    return str(caught.value)


def test_files_of_another_kind_are_refused_in_one_line(tmp_path: Path) -> None:
    model = hf_model("2")
    meta = write_meta(tmp_path / "meta", model) / "consolidated.00.pth"
    assert "not a model of LLMs-from-scratch (it lacks tok_emb.weight): --ckpt_dir names the folder" in refusal(meta)
    assert "is a file: --ckpt_dir names the folder" in refusal(write_hf(tmp_path / "hf", model) / "model.safetensors")
    state = scratch_state(model)
    del state["trf_blocks.0.ff.fc1.weight"]
    torch.save(state, tmp_path / "gpt.pth")
    assert "it lacks 'trf_blocks.0.ff.fc1.weight'" in refusal(tmp_path / "gpt.pth")
    (tmp_path / "x.pth.partial").write_bytes(b"PK")
    assert "was not finished" in refusal(tmp_path / "x.pth.partial")


def test_wrong_words_are_told_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(LlamaError, match="use hf, meta, single"):
        convert(tmp_path, "gguf", tmp_path / "out")
    with pytest.raises(LlamaError, match=r"let it end in \.pth"):
        convert(write_meta(tmp_path / "m", hf_model("2")), "single", tmp_path / "out")


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500MiB", 500 * 2**20), ("1.5kb", 1500), ("7", 7)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 TB", "five"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(LlamaError, match="max_shard_size"):
        parse_size(text)


@pytest.mark.slow
def test_the_command(root: Path, tmp_path: Path) -> None:
    sentencepiece_model(tmp_path / "m")
    source = write_meta(tmp_path / "m", hf_model("2"))
    commands = [
        ["scripts/convert.py", "--ckpt_dir", str(source), "--to", "single", "--output", str(tmp_path / "a" / "x.pth")],
        ["example.py", "--ckpt_dir", str(tmp_path / "a" / "x.pth"), "--prompts", "the", "--max_gen_len", "2"],
        ["scripts/convert.py", "--ckpt_dir", str(source), "--to", "onnx", "--output", str(tmp_path / "b")],
    ]
    runs = run_forked({str(n): [root / script, *words] for n, (script, *words) in enumerate(commands)}, root)
    assert [run.code for run in runs.values()] == [0, 0, 2], runs
    assert runs["2"].err.strip() == "error: --to is 'onnx': use hf, meta, single"
