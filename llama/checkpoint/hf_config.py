"""What Hugging Face's libraries read beside the weights: `config.json` and `generation_config.json`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from llama.config import ModelArgs

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
