"""The geometry of a Llama, read from Meta's `params.json` or Hugging Face's `config.json`, or known by its name.

Nothing here needs torch, which takes seconds to import.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.env import notice
from llama.errors import CheckpointError, LlamaError

# Llama 3's base of RoPE, where Llama 1 and 2 have 10,000; and the factors of RoPE's scaling from 3.1 on.
LLAMA_3_THETA = 500_000.0
LLAMA_3_1_FACTOR, LLAMA_3_2_FACTOR = 8.0, 32.0


@dataclass(frozen=True)
class RopeScaling:
    """A stretch of RoPE's wavelengths beyond the context that a model was trained on.

    Args:
        factor: low frequencies are divided by it.
        kind: `llama3` (Llama 3.1, section 3.4.2 of arXiv:2407.21783, as in llama-models) or
            `linear` (position interpolation, arXiv:2306.15595).
        low_freq_factor, high_freq_factor: wavelengths longer than `original_context / low` are
            scaled in full, wavelengths shorter than `original_context / high` not at all.
        original_context: tokens of context before the stretch.
    """

    factor: float
    kind: str = "llama3"
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("llama3", "linear"):
            raise CheckpointError(f"RoPE scaling of type {self.kind!r} is not one of llama3, linear, default")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_context"):
            value = getattr(self, name)
            if not _is_number(value) or value <= 0:
                raise CheckpointError(f"RoPE scaling: {name} must be a positive number, found {value!r}")
        if self.high_freq_factor <= self.low_freq_factor:
            raise CheckpointError(
                f"RoPE scaling: high_freq_factor {self.high_freq_factor} must exceed "
                f"low_freq_factor {self.low_freq_factor}"
            )


def ffn_width(dim: int, multiple_of: int = 256, ffn_dim_multiplier: float | None = None) -> int:
    """Return the FFN's width by Meta's rule: 2/3 of 4 * dim, times the multiplier, rounded up."""
    width = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        width = int(ffn_dim_multiplier * width)
    return multiple_of * -(-width // multiple_of)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@dataclass(frozen=True)
class ModelArgs:
    """Every size of a Llama text model.

    Args:
        dim: width of the residual stream.
        n_layers, n_heads: transformer blocks; query heads of each.
        n_kv_heads: key and value heads (grouped-query attention); None means `n_heads`.
        vocab_size: rows of the embedding; -1 until the tokenizer has decided (Llama 1 and 2).
        multiple_of, ffn_dim_multiplier: Meta's rule for the FFN width, see `ffn_width`.
        norm_eps: epsilon of RMSNorm.
        rope_theta: base of the rotary embedding.
        rope_scaling: see `RopeScaling`; None for none.
        ffn_dim: the FFN's final width; None means the rule's.
        head_dim: width of one head; None means `dim / n_heads`.
        tied: the output layer is the embedding (Llama 3.2 1B and 3B).

    Raises:
        CheckpointError: when a size is not positive or the sizes contradict each other.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int = None  # type: ignore[assignment]  # an int once __post_init__ has run
    vocab_size: int = -1
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    ffn_dim: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    tied: bool = False

    def __post_init__(self) -> None:
        self._check_counts("dim", "n_layers", "n_heads", "multiple_of")
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        if self.vocab_size != -1:
            self._check_counts("vocab_size")
        for name in ("norm_eps", "rope_theta"):
            if not _is_number(getattr(self, name)) or getattr(self, name) <= 0:
                raise CheckpointError(f"{name} must be a positive number, found {getattr(self, name)!r}")
        if self.ffn_dim_multiplier is not None and (
            not _is_number(self.ffn_dim_multiplier) or self.ffn_dim_multiplier <= 0
        ):
            raise CheckpointError(f"ffn_dim_multiplier must be a positive number, found {self.ffn_dim_multiplier!r}")
        if self.head_dim is None:
            if self.dim % self.n_heads:
                raise CheckpointError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if self.ffn_dim is None:
            width = ffn_width(self.dim, self.multiple_of, self.ffn_dim_multiplier)
            object.__setattr__(self, "ffn_dim", width)
        self._check_counts("n_kv_heads", "head_dim", "ffn_dim")
        if self.n_heads % self.n_kv_heads:
            raise CheckpointError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim {self.head_dim} is odd: RoPE turns pairs")

    def _check_counts(self, *names: str) -> None:
        for name in names:
            if not _is_count(getattr(self, name)):
                raise CheckpointError(f"{name} must be a positive integer, found {getattr(self, name)!r}")

    @property
    def group_size(self) -> int:
        """Query heads that share one key and value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def is_llama_3_2(self) -> bool:
        """True for the sizes of Llama 3.2 1B and 3B: the only sign in Meta's `params.json` that a model is tied."""
        return self.rope_scaling is not None and (self.dim, self.n_layers) in LLAMA_3_2_GEOMETRIES

    def with_vocab_size(self, vocab_size: int) -> ModelArgs:
        """Return the geometry with the vocabulary that the tokenizer or the tensors decide."""
        return dataclasses.replace(self, vocab_size=vocab_size)

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> ModelArgs:
        """Read the content of Meta's `params.json`.

        `use_scaled_rope` means Llama 3.1's scaling with the factor of `implied_factor`, unless an explicit
        `rope_scaling` (our own extension) or Meta's later `rope_scaling_factor` says otherwise.

        Raises:
            CheckpointError: for an unknown or missing key, named, or an impossible size.
        """
        if not isinstance(params, Mapping):
            raise CheckpointError(f"params.json must hold an object, found {type(params).__name__}")
        unknown = sorted(set(params) - _PARAMS_USED - _PARAMS_IGNORED - _PARAMS_OF_THE_FILES)
        if unknown:
            raise CheckpointError(
                f"params.json has unknown keys: {', '.join(unknown)}; they may change the computation, "
                "so this checkpoint is not loaded: remove them only if you know that they do not"
            )
        _require(params, ("dim", "n_layers", "n_heads"), "params.json")
        sizes = {key: params[key] for key in _PARAMS_SIZES if params.get(key) is not None}
        scaling = _scaling_from_params(params)
        args = cls(**sizes, rope_scaling=scaling)
        return dataclasses.replace(args, tied=args.is_llama_3_2)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelArgs:
        """Read the content of Hugging Face's `config.json`, in transformers 4's or 5's spelling.

        Raises:
            CheckpointError: for a missing key, or one that changes the computation, named.
        """
        if not isinstance(config, Mapping):
            raise CheckpointError(f"config.json must hold an object, found {type(config).__name__}")
        _refuse_other_models(config)
        _require(config, _HF_REQUIRED, "config.json")
        theta, scaling = _rope_from_hf(config)
        sizes = {ours: config[theirs] for theirs, ours in _HF_SIZES.items() if config.get(theirs) is not None}
        sizes.setdefault("norm_eps", 1e-6)  # transformers' default, where Meta's is 1e-5
        ignored = sorted(set(config) - set(_HF_SIZES) - _HF_ROPE - _HF_HARMLESS - set(_HF_NEUTRAL) - set(_HF_REFUSED))
        if ignored:
            notice(f"config.json: ignored {', '.join(ignored)}")
        return cls(
            **sizes,
            rope_theta=theta,
            rope_scaling=scaling,
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @classmethod
    def from_file(cls, path: str | Path) -> ModelArgs:
        """Read `params.json` or `config.json`, told apart by content.

        Raises:
            CheckpointError: also when the file is missing or is no JSON.
        """
        content = read_json(path)
        is_hf = isinstance(content, Mapping) and ("hidden_size" in content or "model_type" in content)
        try:
            return cls.from_hf(content) if is_hf else cls.from_params(content)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        CheckpointError: when it cannot be read or is no JSON, naming the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None


def _require(content: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    missing = [key for key in keys if content.get(key) is None]
    if missing:
        raise CheckpointError(f"{where} lacks {', '.join(missing)}")


# -- Meta ------------------------------------------------------------------------------------------

_PARAMS_SIZES = (
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "multiple_of",
    "ffn_dim_multiplier",
    "norm_eps",
    "rope_theta",
)
_PARAMS_USED = frozenset(
    {*_PARAMS_SIZES, "use_scaled_rope", "rope_scaling", "rope_scaling_factor", "rope_high_freq_factor"}
)
# Limits of a request, which say nothing of the model.
_PARAMS_IGNORED = frozenset({"max_seq_len", "max_batch_size"})
# The format of the tensors, which is no part of the geometry: see `llama.quantization.scheme`.
_PARAMS_OF_THE_FILES = frozenset({"quantization"})


def _scaling_from_params(params: Mapping[str, Any]) -> RopeScaling | None:
    explicit = params.get("rope_scaling")
    if explicit is not None:
        return _scaling_from_mapping(explicit, "params.json")
    if not params.get("use_scaled_rope"):
        return None
    options = {}
    if params.get("rope_high_freq_factor") is not None:
        options["high_freq_factor"] = params["rope_high_freq_factor"]
    factor = params.get("rope_scaling_factor")
    if factor is None:
        factor = implied_factor(params["dim"], params["n_layers"])
        notice(
            f"use_scaled_rope: RoPE factor {factor:g} "
            f"({'as in Llama 3.1' if factor == LLAMA_3_1_FACTOR else 'the geometry of Llama 3.2'}); "
            "a rope_scaling in params.json overrides it"
        )
    return RopeScaling(factor, **options)


def _scaling_from_mapping(scaling: Any, where: str) -> RopeScaling | None:
    """Read Hugging Face's spelling of RoPE scaling; None where it scales nothing."""
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"{where}: rope_scaling must be an object, found {scaling!r}")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    _require(scaling, ("factor",), f"{where}: rope_scaling")
    if kind == "linear":
        return RopeScaling(scaling["factor"], kind="linear")
    if kind == "llama3":
        keys = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        _require(scaling, keys, f"{where}: rope_scaling")
        low, high, original = (scaling[key] for key in keys)
        return RopeScaling(scaling["factor"], "llama3", low, high, original)
    raise CheckpointError(f"{where}: RoPE scaling of type {kind!r} is not one of llama3, linear, default")


# -- Hugging Face ----------------------------------------------------------------------------------

_HF_SIZES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "ffn_dim",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "norm_eps",
    "head_dim": "head_dim",
}
_HF_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
_HF_ROPE = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings"})
_HF_HARMLESS = frozenset(
    {
        "architectures", "model_type", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range",
        "max_position_embeddings", "torch_dtype", "dtype", "transformers_version", "use_cache",
        "layer_types", "attention_dropout", "pretraining_tp", "_name_or_path", "max_sequence_length",
    }
)  # fmt: skip
# Keys that are fine at this value and change the computation at any other.
_HF_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", "swish", None),
    "partial_rotary_factor": (1, 1.0, None),
    "use_sliding_window": (False, None),
}
# Keys that change the computation whenever they hold anything.
_HF_REFUSED = (
    "sliding_window", "num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok",
    "quantization_config", "attn_logit_softcapping", "final_logit_softcapping", "logit_scale",
    "logits_scaling", "embedding_multiplier", "residual_multiplier", "attention_multiplier",
    "query_pre_attn_scalar", "qk_norm", "use_qk_norm", "no_rope_layers", "vision_config", "text_config",
)  # fmt: skip


def _refuse_other_models(config: Mapping[str, Any]) -> None:
    kind = config.get("model_type", "llama")
    if kind != "llama":
        raise CheckpointError(f"config.json describes a model of type {kind!r}; only 'llama' is run here")
    changed = [f"{k}={config[k]!r}" for k, neutral in _HF_NEUTRAL.items() if config.get(k) not in neutral]
    changed += [f"{k}={config[k]!r}" for k in _HF_REFUSED if config.get(k)]
    changed += [f"layer_types={kind!r}" for kind in config.get("layer_types") or [] if kind != "full_attention"][:1]
    if changed:
        raise CheckpointError(
            f"config.json asks for a computation that is not Llama's: {', '.join(changed)}; not loaded"
        )


def _rope_from_hf(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    parameters = config.get("rope_parameters")
    scaling = config.get("rope_scaling") if parameters is None else parameters
    theta = config.get("rope_theta")
    if isinstance(scaling, Mapping):
        if scaling.get("partial_rotary_factor", 1) not in (1, None):
            raise CheckpointError("config.json turns only part of each head: partial_rotary_factor is not 1")
        theta = scaling.get("rope_theta", theta)
    parsed = None if scaling is None else _scaling_from_mapping(scaling, "config.json")
    return (10000.0 if theta is None else theta), parsed


# -- published geometries --------------------------------------------------------------------------


def _llama_1(dim: int, n_layers: int, n_heads: int, norm_eps: float = 1e-6) -> ModelArgs:
    return ModelArgs(dim, n_layers, n_heads, vocab_size=32000, multiple_of=256, norm_eps=norm_eps)


def _llama_2(dim: int, n_layers: int, n_heads: int) -> ModelArgs:
    """Return a Llama 2 without groups of heads, which differs from Llama 1 in the epsilon alone."""
    return _llama_1(dim, n_layers, n_heads, norm_eps=1e-5)


def _llama_3(
    dim: int,
    n_layers: int,
    n_heads: int,
    multiple_of: int,
    ffn_dim_multiplier: float,
    factor: float | None = None,
    tied: bool = False,
) -> ModelArgs:
    """Return a Llama 3; from 3.1 on, with the factor by which RoPE is scaled."""
    return ModelArgs(
        dim,
        n_layers,
        n_heads,
        n_kv_heads=8,
        vocab_size=128256,
        multiple_of=multiple_of,
        ffn_dim_multiplier=ffn_dim_multiplier,
        norm_eps=1e-5,
        rope_theta=LLAMA_3_THETA,
        rope_scaling=None if factor is None else RopeScaling(factor),
        tied=tied,
    )


GEOMETRIES: dict[str, ModelArgs] = {
    "llama-1-7b": _llama_1(4096, 32, 32),
    "llama-1-13b": _llama_1(5120, 40, 40),
    "llama-1-30b": _llama_1(6656, 60, 52),
    "llama-1-65b": _llama_1(8192, 80, 64, norm_eps=1e-5),
    "llama-2-7b": _llama_2(4096, 32, 32),
    "llama-2-13b": _llama_2(5120, 40, 40),
    "llama-2-70b": ModelArgs(
        8192, 80, 64, n_kv_heads=8, vocab_size=32000, multiple_of=4096, ffn_dim_multiplier=1.3, norm_eps=1e-5
    ),
    "llama-3-8b": _llama_3(4096, 32, 32, 1024, 1.3),
    "llama-3-70b": _llama_3(8192, 80, 64, 4096, 1.3),
    "llama-3.1-8b": _llama_3(4096, 32, 32, 1024, 1.3, factor=LLAMA_3_1_FACTOR),
    "llama-3.1-70b": _llama_3(8192, 80, 64, 4096, 1.3, factor=LLAMA_3_1_FACTOR),
    "llama-3.1-405b": _llama_3(16384, 126, 128, 4096, 1.2, factor=LLAMA_3_1_FACTOR),
    "llama-3.2-1b": _llama_3(2048, 16, 32, 256, 1.5, factor=LLAMA_3_2_FACTOR, tied=True),
    "llama-3.2-3b": _llama_3(3072, 28, 24, 256, 1.0, factor=LLAMA_3_2_FACTOR, tied=True),
    "llama-3.3-70b": _llama_3(8192, 80, 64, 4096, 1.3, factor=LLAMA_3_1_FACTOR),
}
# The folder that Meta shipped is called 30B, the paper says 33B.
ALIASES = {"llama-1-33b": "llama-1-30b"}

# (dim, n_layers) of Llama 3.2 1B and 3B: Meta's params.json tells neither their RoPE factor nor that they are tied.
LLAMA_3_2_GEOMETRIES = frozenset(
    (args.dim, args.n_layers) for name, args in GEOMETRIES.items() if name.startswith("llama-3.2-")
)


def geometry(name: str, **changes: int) -> ModelArgs:
    """Return a published geometry.

    Args:
        name: a key of `GEOMETRIES` or `ALIASES`, in capitals or not.
        changes: sizes to change, such as `n_layers=2` for a piece of a model.

    Raises:
        LlamaError: for an unknown name; the message has the closest known ones.
    """
    key = name.lower()
    key = ALIASES.get(key, key)
    if key not in GEOMETRIES:
        close = difflib.get_close_matches(key, GEOMETRIES, n=3) or list(GEOMETRIES)
        raise LlamaError(f"no published geometry is called {name!r}: try {', '.join(close)}")
    return dataclasses.replace(GEOMETRIES[key], **changes)  # type: ignore[arg-type]


def implied_factor(dim: int, n_layers: int) -> float:
    """Return the factor of RoPE that `use_scaled_rope` means in a `params.json` of these sizes."""
    return LLAMA_3_2_FACTOR if (dim, n_layers) in LLAMA_3_2_GEOMETRIES else LLAMA_3_1_FACTOR


def trained_context(args: ModelArgs) -> int:
    """Return the tokens of context that a model of this geometry was made for, by the marks of its generation.

    Llama 1 has 2,048, Llama 2 4,096 and Llama 3 8,192, times the factor where positions are interpolated. Llama 3.1
    made 131,072 of 8,192, and Llama 3.2 did so with another factor: 16 times the original context.
    """
    scaling = args.rope_scaling
    if scaling is not None and scaling.kind == "llama3":
        return 16 * scaling.original_context
    factor = 1 if scaling is None else scaling.factor
    return int(factor * _unscaled_context(args))


def _unscaled_context(args: ModelArgs) -> int:
    if args.rope_theta >= LLAMA_3_THETA:
        return 8192
    return 2048 if _is_llama_1(args) else 4096


def _is_llama_1(args: ModelArgs) -> bool:
    """True for Llama 1's epsilon, or for the sizes of its 65B, which has Llama 2's epsilon."""
    largest = GEOMETRIES["llama-1-65b"]
    return args.norm_eps <= 1e-6 or (args.dim, args.n_kv_heads) == (largest.dim, largest.n_kv_heads)
