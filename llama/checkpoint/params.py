"""Parameter files of Meta and of Hugging Face for a geometry, and the context length that a checkpoint states."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch

from llama.checkpoint.scratch import beside
from llama.checkpoint.source import Checkpoint
from llama.config import ModelArgs, RopeScaling, ffn_width, implied_factor, read_json, trained_context
from llama.errors import CheckpointError
from llama.quantization.scheme import Scheme

# Those of published models, tried first so that files look like Meta's.
MULTIPLES_OF = (256, 1024, 4096, 512, 128, 64, 32)
MULTIPLIERS = (None, 1.3, 1.5, 1.0)


def to_params(args: ModelArgs, scheme: Scheme | None = None) -> dict[str, Any]:
    """Return the content of `params.json`, from which `ModelArgs.from_params` reads the same geometry.

    Meta's keys give the FFN's width by a rule of three numbers, which are solved for.

    Args:
        args: the geometry.
        scheme: the tensors that are integers; None for none.

    Raises:
        CheckpointError: for a head width that Meta's keys cannot express.
    """
    if args.head_dim * args.n_heads != args.dim:
        raise CheckpointError(
            f"Meta's params.json cannot express heads of width {args.head_dim} with dim {args.dim} and "
            f"{args.n_heads} heads: keep this model in Hugging Face's layout"
        )
    multiple_of, multiplier = solve_ffn(args.dim, args.ffn_dim)
    params: dict[str, Any] = {
        "dim": args.dim,
        "n_layers": args.n_layers,
        "n_heads": args.n_heads,
        "n_kv_heads": args.n_kv_heads,
        "vocab_size": args.vocab_size,
        "multiple_of": multiple_of,
        "ffn_dim_multiplier": multiplier,
        "norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
    }
    if multiplier is None:
        del params["ffn_dim_multiplier"]
    if scheme is not None:
        params["quantization"] = scheme.to_json()
    return params | _scaling_params(args)


def solve_ffn(dim: int, ffn_dim: int) -> tuple[int, float | None]:
    """Return a `multiple_of` and an `ffn_dim_multiplier` with which `ffn_width` gives `ffn_dim`.

    Raises:
        CheckpointError: when there are none.
    """
    for multiplier in MULTIPLIERS:
        for multiple_of in MULTIPLES_OF:
            if ffn_width(dim, multiple_of, multiplier) == ffn_dim:
                return multiple_of, multiplier
    # The largest power of two in the width, up to 256; the multiplier that brings the rule just below.
    multiple_of = math.gcd(ffn_dim, 256)
    multiplier = (ffn_dim - multiple_of / 2) / int(2 * (4 * dim) / 3)
    if ffn_width(dim, multiple_of, multiplier) != ffn_dim:
        raise CheckpointError(f"no multiple_of and ffn_dim_multiplier of Meta's give an FFN of {ffn_dim} columns")
    return multiple_of, multiplier


def _scaling_params(args: ModelArgs) -> dict[str, Any]:
    """Return `use_scaled_rope` where that means this scaling, and our own `rope_scaling` where it would not."""
    scaling = args.rope_scaling
    if scaling is None:
        return {}
    if scaling == RopeScaling(implied_factor(args.dim, args.n_layers)):
        return {"use_scaled_rope": True}
    explicit = {"rope_scaling": _rope_scaling(scaling)}
    return explicit if scaling.kind == "linear" else {"use_scaled_rope": True, **explicit}


def hf_config(
    args: ModelArgs,
    dtype: torch.dtype,
    bos_id: int | None = None,
    stop_ids: Collection[int] = (),
    context: int | None = None,
) -> dict[str, Any]:
    """Return the content of `config.json`, from which `ModelArgs.from_hf` reads the same geometry.

    RoPE is spelled as in published checkpoints, which transformers 4 and 5 and others read alike.

    Args:
        args: the geometry.
        dtype: of the stored weights.
        bos_id, stop_ids: of the tokenizer, where it is known.
        context: tokens that the model was made for; None for `trained_context`.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "intermediate_size": args.ffn_dim,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "max_position_embeddings": context or trained_context(args),
        "rope_theta": args.rope_theta,
        "rope_scaling": None if args.rope_scaling is None else _rope_scaling(args.rope_scaling),
        "tie_word_embeddings": args.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        **_token_ids(bos_id, stop_ids),
        "pad_token_id": None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def generation_config(bos_id: int | None, stop_ids: Collection[int]) -> dict[str, Any]:
    """Return the content of `generation_config.json`: generation ends at any of the stop tokens, as ours does."""
    return _token_ids(bos_id, stop_ids)


def context_length(checkpoint: Checkpoint) -> int:
    """Return the tokens that a model was made for: those that its files state, else those of its geometry.

    No computation depends on them: they are the default context of other programs.
    """
    stated = _hf_parameters(checkpoint).get("max_position_embeddings")
    if isinstance(stated, int) and stated > 0:
        return stated
    return trained_context(checkpoint.args)


def _hf_parameters(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return the `config.json` of a checkpoint, or the one in the manifest beside a single file; {} without either."""
    if checkpoint.format == "hf":
        return read_json(checkpoint.path / "config.json")
    if checkpoint.format == "single" and beside(checkpoint.path).exists():
        content = read_json(beside(checkpoint.path))
        return content.get("config", content)
    return {}


def _token_ids(bos_id: int | None, stop_ids: Collection[int]) -> dict[str, Any]:
    """Return the ids of BOS and EOS: one stop token as a number, several as a list."""
    stops = sorted(stop_ids)
    return {"bos_token_id": bos_id, "eos_token_id": stops if len(stops) > 1 else stops[0] if stops else None}


def _rope_scaling(scaling: RopeScaling) -> dict[str, Any]:
    """Return RoPE's scaling in Hugging Face's spelling."""
    spelled = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return spelled
    return {
        **spelled,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context,
    }
