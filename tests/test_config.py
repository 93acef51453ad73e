"""Geometries against published parameter counts, and what is refused, ignored or announced."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama.checkpoint.table import layer_params, n_params, n_unique_params
from llama.config import ModelArgs, RopeScaling, ffn_width
from llama.errors import CheckpointError

EPS5, EPS6 = 1e-5, 1e-6
LLAMA3 = {"vocab_size": 128256, "norm_eps": EPS5, "rope_theta": 500000.0}

# params.json as Meta published them, FFN width, parameters as stored, parameters unique.
# Llama 1 and 2 leave the vocabulary to the tokenizer: 32,000.
PUBLISHED: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "1-7B": (
        {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": EPS6, "vocab_size": -1},
        11008, 6_738_415_616, 6_738_415_616,
    ),
    "1-13B": (
        {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": EPS6, "vocab_size": -1},
        13824, 13_015_864_320, 13_015_864_320,
    ),
    "1-33B": (
        {"dim": 6656, "multiple_of": 256, "n_heads": 52, "n_layers": 60, "norm_eps": EPS6, "vocab_size": -1},
        17920, 32_528_943_616, 32_528_943_616,
    ),
    "1-65B": (
        {"dim": 8192, "multiple_of": 256, "n_heads": 64, "n_layers": 80, "norm_eps": EPS5, "vocab_size": -1},
        22016, 65_285_660_672, 65_285_660_672,
    ),
    "2-7B": (
        {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": EPS5, "vocab_size": -1},
        11008, 6_738_415_616, 6_738_415_616,
    ),
    "2-13B": (
        {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": EPS5, "vocab_size": -1},
        13824, 13_015_864_320, 13_015_864_320,
    ),
    "2-70B": (
        {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8,
         "n_layers": 80, "norm_eps": EPS5, "vocab_size": -1},
        28672, 68_976_648_192, 68_976_648_192,
    ),
    "3-8B": (
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "multiple_of": 1024,
         "ffn_dim_multiplier": 1.3, **LLAMA3},
        14336, 8_030_261_248, 8_030_261_248,
    ),
    "3-70B": (
        {"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 4096,
         "ffn_dim_multiplier": 1.3, **LLAMA3},
        28672, 70_553_706_496, 70_553_706_496,
    ),
    "3.1-8B": (
        {"dim": 4096, "ffn_dim_multiplier": 1.3, "multiple_of": 1024, "n_heads": 32, "n_kv_heads": 8,
         "n_layers": 32, "use_scaled_rope": True, **LLAMA3},
        14336, 8_030_261_248, 8_030_261_248,
    ),
    "3.1-405B": (
        {"dim": 16384, "ffn_dim_multiplier": 1.2, "multiple_of": 4096, "n_heads": 128, "n_kv_heads": 8,
         "n_layers": 126, "use_scaled_rope": True, **LLAMA3},
        53248, 405_853_388_800, 405_853_388_800,
    ),
    "3.2-1B": (
        {"dim": 2048, "ffn_dim_multiplier": 1.5, "multiple_of": 256, "n_heads": 32, "n_kv_heads": 8,
         "n_layers": 16, "use_scaled_rope": True, **LLAMA3},
        8192, 1_498_482_688, 1_235_814_400,
    ),
    "3.2-3B": (
        {"dim": 3072, "ffn_dim_multiplier": 1.0, "multiple_of": 256, "n_heads": 24, "n_kv_heads": 8,
         "n_layers": 28, "use_scaled_rope": True, **LLAMA3},
        8192, 3_606_752_256, 3_212_749_824,
    ),
    "3.3-70B": (
        {"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 4096,
         "ffn_dim_multiplier": 1.3, "use_scaled_rope": True, **LLAMA3},
        28672, 70_553_706_496, 70_553_706_496,
    ),
}  # fmt: skip
SMALL = {"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 100}


def with_vocabulary(params: dict[str, Any]) -> ModelArgs:
    args = ModelArgs.from_params(params)
    return args.with_vocab_size(32000) if args.vocab_size == -1 else args


# -- Meta's params.json ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_params_give_the_published_counts(name: str) -> None:
    params, width, stored, unique = PUBLISHED[name]
    args = with_vocabulary(params)
    assert (args.ffn_dim, n_params(args), n_unique_params(args)) == (width, stored, unique)


@pytest.mark.parametrize("name", ["1-7B", "2-70B", "3-8B", "3.2-1B"])
def test_counts_are_those_of_transformers_models(name: str) -> None:
    params, _, _, unique = PUBLISHED[name]
    args = with_vocabulary(params)
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=args.dim, num_hidden_layers=2, num_attention_heads=args.n_heads,
                num_key_value_heads=args.n_kv_heads, intermediate_size=args.ffn_dim,
                vocab_size=args.vocab_size, tie_word_embeddings=args.tied,
            )
        )  # fmt: skip
    assert unique - model.num_parameters() == (args.n_layers - 2) * layer_params(args)


def test_the_ffn_width_takes_the_multiplier_before_rounding_up() -> None:
    assert ffn_width(4096) == 11008
    assert ffn_width(4096, 1024, 1.3) == 14336
    assert ffn_width(96, 1) == 256  # 2/3 of 4 * 96 exactly


def test_unknown_keys_are_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"unknown keys: moe, qk_norm"):
        ModelArgs.from_params({**SMALL, "qk_norm": True, "moe": {}})


@pytest.mark.parametrize("missing", ["dim", "n_layers", "n_heads"])
def test_missing_keys_are_named(missing: str) -> None:
    with pytest.raises(CheckpointError, match=f"lacks {missing}$"):
        ModelArgs.from_params({key: value for key, value in SMALL.items() if key != missing})


def test_null_kv_heads_mean_no_groups() -> None:
    assert ModelArgs.from_params({**SMALL, "n_kv_heads": None}).n_kv_heads == 4
    assert ModelArgs.from_params(SMALL).n_kv_heads == 4


def test_a_vocabulary_of_minus_one_stays_open() -> None:
    args = ModelArgs.from_params({**SMALL, "vocab_size": -1})
    assert args.vocab_size == -1
    assert args.with_vocab_size(32000).vocab_size == 32000


def test_sizes_of_a_request_are_not_the_models() -> None:
    assert ModelArgs.from_params({**SMALL, "max_seq_len": 9, "max_batch_size": 1}) == ModelArgs.from_params(SMALL)


@pytest.mark.parametrize(("name", "factor"), [("3.1-8B", 8), ("3.3-70B", 8), ("3.2-1B", 32), ("3.2-3B", 32)])
def test_use_scaled_rope_means_8_or_32_and_says_so(name: str, factor: int, capsys: pytest.CaptureFixture[str]) -> None:
    args = ModelArgs.from_params(PUBLISHED[name][0])
    assert args.rope_scaling == RopeScaling(factor, "llama3", 1.0, 4.0, 8192)
    printed = capsys.readouterr()
    assert f"RoPE factor {factor} (" in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_an_explicit_rope_scaling_overrides_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    own = {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0,
        "original_max_position_embeddings": 4096,
    }  # fmt: skip
    args = ModelArgs.from_params({**PUBLISHED["3.2-1B"][0], "rope_scaling": own})
    assert args.rope_scaling == RopeScaling(4.0, "llama3", 1.0, 2.0, 4096)
    assert args.tied
    assert not capsys.readouterr().err


def test_unscaled_rope_stays_unscaled(capsys: pytest.CaptureFixture[str]) -> None:
    for params in (PUBLISHED["3-8B"][0], {**PUBLISHED["3.2-1B"][0], "use_scaled_rope": False}):
        assert ModelArgs.from_params(params).rope_scaling is None
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        ({"dim": 66}, ("66", "4")),
        ({"n_kv_heads": 3}, ("4", "3")),
        ({"dim": 60}, ("15",)),
        ({"n_heads": 0}, ("0",)),
        ({"n_layers": -1}, ("-1",)),
        ({"n_layers": 2.5}, ("2.5",)),
        ({"dim": "64"}, ("'64'",)),
        ({"vocab_size": 0}, ("0",)),
        ({"vocab_size": -2}, ("-2",)),
        ({"norm_eps": 0}, ("0",)),
        ({"rope_theta": "big"}, ("'big'",)),
        ({"multiple_of": True}, ("True",)),
        ({"ffn_dim_multiplier": -1.0}, ("-1.0",)),
        ({"rope_scaling": 8}, ("8",)),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, ("low_freq_factor",)),
    ],
)
def test_impossible_sizes_are_refused_with_their_numbers(change: dict[str, Any], numbers: tuple[str, ...]) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelArgs.from_params({**SMALL, **change})
    assert all(number in str(caught.value) for number in numbers)
    assert "\n" not in str(caught.value)


# -- Hugging Face's config.json --------------------------------------------------------------------

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008], "head_dim": 64, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
    "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
SCALED = {
    "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
SPELLINGS = {
    "rope_type": {"rope_theta": 500000.0, "rope_scaling": {**SCALED, "rope_type": "llama3"}},
    "type": {"rope_theta": 500000.0, "rope_scaling": {**SCALED, "type": "llama3"}},
    "both types": {"rope_theta": 500000.0, "rope_scaling": {**SCALED, "type": "llama3", "rope_type": "llama3"}},
    "rope_parameters": {"rope_parameters": {**SCALED, "rope_type": "llama3", "rope_theta": 500000.0}},
    "both": {
        "rope_theta": 500000.0, "rope_scaling": {**SCALED, "rope_type": "llama3"},
        "rope_parameters": {**SCALED, "rope_type": "llama3", "rope_theta": 500000.0},
    },
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_args_of_metas_params(spelling: str, capsys: pytest.CaptureFixture[str]) -> None:
    ours = ModelArgs.from_hf({**CONFIG, **SPELLINGS[spelling]})
    assert not capsys.readouterr().err
    meta = ModelArgs.from_params(PUBLISHED["3.2-1B"][0])
    for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "head_dim", "vocab_size", "tied"):
        assert getattr(ours, name) == getattr(meta, name), name
    assert (ours.norm_eps, ours.rope_theta, ours.rope_scaling) == (EPS5, 500000.0, meta.rope_scaling)
    assert n_unique_params(ours) == 1_235_814_400


def test_what_transformers_writes_is_read_back() -> None:
    written = LlamaConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, intermediate_size=96,
        vocab_size=100, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1234.0},
    )  # fmt: skip
    args = ModelArgs.from_hf(json.loads(written.to_json_string(use_diff=False)))
    assert args == ModelArgs(
        64, 3, 8, 2, 100, ffn_dim=96, norm_eps=1e-6, rope_theta=1234.0, rope_scaling=RopeScaling(2.0, "linear")
    )  # fmt: skip


@pytest.mark.parametrize("nothing", [{}, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}}])
def test_without_rope_keys_the_defaults_are_transformers(nothing: dict[str, Any]) -> None:
    args = ModelArgs.from_hf({**CONFIG, **nothing})
    assert (args.rope_theta, args.rope_scaling) == (10000.0, None)


@pytest.mark.parametrize(
    "change",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"sliding_window": 4096},
        {"num_local_experts": 8},
        {"quantization_config": {"quant_method": "gptq"}},
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"rope_scaling": {"type": "yarn", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}},
        {"model_type": "mistral"},
        {"layer_types": ["full_attention", "sliding_attention"]},
    ],
    ids=str,
)
def test_what_changes_the_computation_is_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelArgs.from_hf({**CONFIG, **change})
    ((key, value),) = change.items()
    named = {"rope_scaling": ("yarn", "dynamic"), "rope_parameters": ("longrope", "partial_rotary_factor")}
    expected = {"model_type": ("mistral",)} | named
    assert any(word in str(caught.value) for word in expected.get(key, (key,))), value
    assert "\n" not in str(caught.value)


def test_neutral_values_pass(capsys: pytest.CaptureFixture[str]) -> None:
    neutral = {"sliding_window": None, "partial_rotary_factor": 1.0, "num_local_experts": None, "hidden_act": "swish"}
    assert ModelArgs.from_hf({**CONFIG, **neutral}) == ModelArgs.from_hf(CONFIG)
    assert not capsys.readouterr().err


def test_ignored_keys_give_exactly_one_notice(capsys: pytest.CaptureFixture[str]) -> None:
    ModelArgs.from_hf({**CONFIG, "zeta": 1, "alpha": {"x": 2}})
    assert capsys.readouterr().err == "config.json: ignored alpha, zeta\n"


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        ({"num_key_value_heads": 5}, ("32", "5")),
        ({"head_dim": None, "hidden_size": 2050}, ("2050", "32")),
        ({"head_dim": 63}, ("63",)),
        ({"intermediate_size": 0}, ("0",)),
        ({"vocab_size": None}, ("vocab_size",)),
    ],
)
def test_contradictory_sizes_are_refused_with_both_numbers(change: dict[str, Any], numbers: tuple[str, ...]) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelArgs.from_hf({**CONFIG, **change})
    assert all(number in str(caught.value) for number in numbers)


# -- files -----------------------------------------------------------------------------------------


def test_files_are_told_apart_by_content(tmp_path: Path) -> None:
    meta, hf = tmp_path / "a.json", tmp_path / "b.json"
    meta.write_text(json.dumps(SMALL))
    hf.write_text(json.dumps(CONFIG))
    assert ModelArgs.from_file(meta) == ModelArgs.from_params(SMALL)
    assert ModelArgs.from_file(hf) == ModelArgs.from_hf(CONFIG)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[1]", b'"text"', b"7", b"null"])
def test_a_damaged_file_is_one_line_that_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "params.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"params\.json") as caught:
        ModelArgs.from_file(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*params\.json: No such file"):
        ModelArgs.from_file(tmp_path / "params.json")
