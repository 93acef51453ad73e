"""The single `.pth` of rasbt/LLMs-from-scratch: whose geometry it is, since it carries no parameters.

Its model reads Llama's geometry from code, so a file tells only shapes: those of Llama 3 and 3.1 8B are the
same, and only the file's name can say which it is. What we write ourselves has its parameters beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama.checkpoint import manifest
from llama.checkpoint.files import StoredTensor
from llama.config import GEOMETRIES, ModelArgs, read_json
from llama.env import notice
from llama.errors import CheckpointError

EMBEDDING = "tok_emb.weight"
_LAYER = re.compile(r"trf_blocks\.(\d+)\.")
# "llama3.2-1B-instruct", "Llama-3_1-8b" and "llama-3-1-8b" name a generation, as does the 3 of "llama-3-8b".
_GENERATION = re.compile(r"llama[-_ ]?([123])(?:[._-](\d)(?![\db]))?(?!\d)", re.IGNORECASE)


def beside(path: Path) -> Path:
    """Where the parameters and digests of a single file stand: `NAME.pth.json`."""
    return path.with_name(path.name + ".json")


def geometry_of(path: Path, stored: Mapping[str, StoredTensor]) -> ModelArgs:
    """The geometry of a single file: that beside it, or the published one of its shapes.

    Args:
        path: the file; its name, or its folder's, decides where several models share the shapes.
        stored: its tensors.

    Raises:
        CheckpointError: for another layout, shapes of no published model, or of several that compute differently.
    """
    if EMBEDDING not in stored:
        raise CheckpointError(
            f"{path} is a file, but not a model of LLMs-from-scratch (it lacks {EMBEDDING}): --ckpt_dir names "
            "the folder that holds a checkpoint in Meta's or Hugging Face's layout"
        )
    if beside(path).exists():
        return _read_beside(beside(path))
    sizes = _sizes(path, stored)
    fitting = {name: args for name, args in GEOMETRIES.items() if _sizes_of(args) == sizes}
    if not fitting:
        raise CheckpointError(
            f"{path} has the shapes of no published Llama ({', '.join(f'{k} {v}' for k, v in sizes.items())}): "
            f"put its config.json or params.json beside it as {beside(path).name}"
        )
    name = _choose(path, fitting)
    notice(f"{path.name}: {name}, by the shapes of its tensors")
    return fitting[name]


def _read_beside(path: Path) -> ModelArgs:
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != manifest.FORMAT:
        return ModelArgs.from_file(path)
    if not isinstance(content.get("config"), dict):
        raise CheckpointError(f"{path} is a manifest of ours, but has no config: convert the model again")
    return ModelArgs.from_hf(content["config"])


def _sizes(path: Path, stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """The sizes that shapes tell; the number of heads is not among them."""
    layers = {int(match[1]) for name in stored if (match := _LAYER.match(name))}
    try:
        return {
            "dim": stored[EMBEDDING].shape[1],
            "n_layers": max(layers, default=0) + 1,
            "vocab_size": stored[EMBEDDING].shape[0],
            "q_rows": stored["trf_blocks.0.att.W_query.weight"].shape[0],
            "kv_rows": stored["trf_blocks.0.att.W_key.weight"].shape[0],
            "ffn_dim": stored["trf_blocks.0.ff.fc1.weight"].shape[0],
        }
    except (KeyError, IndexError) as error:
        lacks = f"it lacks {error}" if isinstance(error, KeyError) else f"{EMBEDDING} is no matrix"
        raise CheckpointError(f"{path} is a file, but not a Llama of LLMs-from-scratch: {lacks}") from None


def _sizes_of(args: ModelArgs) -> dict[str, Any]:
    return {
        "dim": args.dim,
        "n_layers": args.n_layers,
        "vocab_size": args.vocab_size,
        "q_rows": args.n_heads * args.head_dim,
        "kv_rows": args.n_kv_heads * args.head_dim,
        "ffn_dim": args.ffn_dim,
    }


def _choose(path: Path, fitting: Mapping[str, ModelArgs]) -> str:
    """The model of those whose shapes fit: the only one, or the one that the file or its folder names.

    LLMs-from-scratch has Llama 2 and later, so that Llama 1, which differs in an epsilon, needs to be named.
    """
    for text in (path.name, path.resolve().parent.name):
        for match in _GENERATION.finditer(text):
            named = f"llama-{'.'.join(filter(None, match.groups()))}-"
            found = [name for name in fitting if name.startswith(named)]
            if found:
                return found[0]
    usual = [name for name in fitting if not name.startswith("llama-1-")] or list(fitting)
    if any(fitting[name] != fitting[usual[0]] for name in usual):
        raise CheckpointError(
            f"{path} has the shapes of {' and '.join(usual)}, which compute differently: give it a name that says "
            f"which, such as {usual[-1].replace('llama-', 'llama')}.pth, or put its config.json beside it as "
            f"{beside(path).name}"
        )
    return usual[0]
