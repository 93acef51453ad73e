"""Write a geometry as Meta's `params.json`, solving for what Meta's keys only say in a roundabout way."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch

from llama.config import LLAMA_3_2_GEOMETRIES, ModelArgs, RopeScaling, ffn_width
from llama.errors import CheckpointError
from llama.quantization.scheme import Scheme

# What published models use, tried first so that files look like Meta's.
MULTIPLES_OF = (256, 1024, 4096, 512, 128, 64, 32)
MULTIPLIERS = (None, 1.3, 1.5, 1.0)


def to_params(args: ModelArgs, scheme: Scheme | None = None) -> dict[str, Any]:
    """The content of `params.json`, from which `ModelArgs.from_params` reads the same geometry.

    Args:
        args: the geometry.
        scheme: which tensors beside it are integers; None for none.

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
    """A `multiple_of` and an `ffn_dim_multiplier` for which Meta's rule gives `ffn_dim`."""
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
    """`use_scaled_rope` where it means this scaling; our own `rope_scaling` where it would not."""
    scaling = args.rope_scaling
    if scaling is None:
        return {}
    implied = 32.0 if (args.dim, args.n_layers) in LLAMA_3_2_GEOMETRIES else 8.0
    if scaling == RopeScaling(implied):
        return {"use_scaled_rope": True}
    if scaling.kind == "linear":
        return {"rope_scaling": {"rope_type": "linear", "factor": scaling.factor}}
    return {
        "use_scaled_rope": True,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        },
    }


# Llama 1 was trained on 2,048 positions, 2 on 4,096, 3 on 8,192; from 3.1 on, RoPE is scaled for 131,072.
LONG_CONTEXT = 131072


def hf_config(
    args: ModelArgs, dtype: torch.dtype, bos_id: int | None = None, stop_ids: Collection[int] = ()
) -> dict[str, Any]:
    """The content of `config.json`, from which `ModelArgs.from_hf` reads the same geometry.

    RoPE is spelled as in published checkpoints, which transformers 4 and 5 and others read alike.

    Args:
        args: the geometry.
        dtype: what the weights are stored in.
        bos_id, stop_ids: of the tokenizer, where it is known.
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
        "max_position_embeddings": context_length(args),
        "rope_theta": args.rope_theta,
        "rope_scaling": _rope_scaling(args),
        "tie_word_embeddings": args.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        **_token_ids(bos_id, stop_ids),
        "pad_token_id": None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def generation_config(bos_id: int | None, stop_ids: Collection[int]) -> dict[str, Any]:
    """The content of `generation_config.json`: generation ends at any of the stop tokens, as ours does."""
    return _token_ids(bos_id, stop_ids)


def context_length(args: ModelArgs) -> int:
    """Positions that a model of this geometry was made for, as far as the geometry tells."""
    if args.rope_scaling is not None:
        if args.rope_scaling.kind == "llama3":
            return LONG_CONTEXT
        return int(4096 * args.rope_scaling.factor)
    if args.rope_theta >= 500_000:
        return 8192
    return 2048 if args.norm_eps <= 1e-6 else 4096


def _token_ids(bos_id: int | None, stop_ids: Collection[int]) -> dict[str, Any]:
    """One stop token as a number, several as a list."""
    stops = sorted(stop_ids)
    return {"bos_token_id": bos_id, "eos_token_id": stops if len(stops) > 1 else stops[0] if stops else None}


def _rope_scaling(args: ModelArgs) -> dict[str, Any] | None:
    scaling = args.rope_scaling
    if scaling is None:
        return None
    if scaling.kind != "llama3":
        return {"rope_type": scaling.kind, "factor": scaling.factor}
    return {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context,
    }
