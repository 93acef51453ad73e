"""The geometries that Meta published, by name: what can be planned or tried without a checkpoint.

Sizes are those of each model's `params.json`; context lengths are not part of them. Nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
import difflib

from llama.config import ModelArgs, RopeScaling
from llama.errors import LlamaError


def _llama_1(dim: int, n_layers: int, n_heads: int, norm_eps: float = 1e-6) -> ModelArgs:
    return ModelArgs(dim, n_layers, n_heads, vocab_size=32000, multiple_of=256, norm_eps=norm_eps)


def _llama_3(
    dim: int,
    n_layers: int,
    n_heads: int,
    multiple_of: int,
    ffn_dim_multiplier: float,
    factor: float | None = None,
    tied: bool = False,
) -> ModelArgs:
    return ModelArgs(
        dim,
        n_layers,
        n_heads,
        n_kv_heads=8,
        vocab_size=128256,
        multiple_of=multiple_of,
        ffn_dim_multiplier=ffn_dim_multiplier,
        norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=None if factor is None else RopeScaling(factor),
        tied=tied,
    )


_LLAMA_2_70B = ModelArgs(
    8192, 80, 64, n_kv_heads=8, vocab_size=32000, multiple_of=4096, ffn_dim_multiplier=1.3, norm_eps=1e-5
)

GEOMETRIES: dict[str, ModelArgs] = {
    "llama-1-7b": _llama_1(4096, 32, 32),
    "llama-1-13b": _llama_1(5120, 40, 40),
    "llama-1-30b": _llama_1(6656, 60, 52),
    "llama-1-65b": _llama_1(8192, 80, 64, norm_eps=1e-5),
    "llama-2-7b": _llama_1(4096, 32, 32, norm_eps=1e-5),
    "llama-2-13b": _llama_1(5120, 40, 40, norm_eps=1e-5),
    "llama-2-70b": _LLAMA_2_70B,
    "llama-3-8b": _llama_3(4096, 32, 32, 1024, 1.3),
    "llama-3-70b": _llama_3(8192, 80, 64, 4096, 1.3),
    "llama-3.1-8b": _llama_3(4096, 32, 32, 1024, 1.3, factor=8),
    "llama-3.1-70b": _llama_3(8192, 80, 64, 4096, 1.3, factor=8),
    "llama-3.1-405b": _llama_3(16384, 126, 128, 4096, 1.2, factor=8),
    "llama-3.2-1b": _llama_3(2048, 16, 32, 256, 1.5, factor=32, tied=True),
    "llama-3.2-3b": _llama_3(3072, 28, 24, 256, 1.0, factor=32, tied=True),
    "llama-3.3-70b": _llama_3(8192, 80, 64, 4096, 1.3, factor=8),
}
# The folder that Meta shipped is called 30B, the paper says 33B.
ALIASES = {"llama-1-33b": "llama-1-30b"}


def geometry(name: str, **changes: int) -> ModelArgs:
    """The published geometry called `name`, in any case.

    Args:
        name: a key of `GEOMETRIES` or `ALIASES`.
        changes: sizes to change, such as `n_layers=2` for a piece of a model.

    Raises:
        LlamaError: for a name that is none of them; the closest ones are told.
    """
    key = name.lower()
    key = ALIASES.get(key, key)
    if key not in GEOMETRIES:
        close = difflib.get_close_matches(key, GEOMETRIES, n=3) or list(GEOMETRIES)
        raise LlamaError(f"no published geometry is called {name!r}: try {', '.join(close)}")
    return dataclasses.replace(GEOMETRIES[key], **changes)  # type: ignore[arg-type]
