"""Published models by name, with their repositories on the hub and their folders on Meta's own server."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from llama.errors import DownloadError


@dataclass(frozen=True)
class Published:
    """One published model.

    Args:
        name: as in `llama.config`, with the tuning at the end.
        repo: the hub's repository in Hugging Face's layout.
        original_repo: the hub's repository in Meta's layout; for all but Llama 2 the same.
        folder: of Meta's server.
        n_shards: files named consolidated.NN.pth in Meta's layout.
        shares_tokenizer: Llama 2's tokenizer lies beside the models' folders, later ones in each.
    """

    name: str
    repo: str
    original_repo: str
    folder: str
    n_shards: int
    shares_tokenizer: bool = False


# Meta cut its models for this many cards of its own.
_SHARDS = {"1b": 1, "3b": 1, "7b": 1, "8b": 1, "13b": 2, "70b": 8, "405b": 8}


def _llama_2(size: str, chat: str) -> Published:
    name = f"llama-2-{size}{chat}"
    repo = f"meta-llama/Llama-2-{size}{chat}"
    return Published(name, f"{repo}-hf", repo, name, _SHARDS[size], shares_tokenizer=True)


def _llama_3(version: str, size: str, tuning: str) -> Published:
    """Return a model of Llama 3 or later; the hub calls the first version Meta-Llama, in folders of other names."""
    stem = f"Llama-{version}-{size.upper()}{tuning}"
    folder = stem + ("-MP8" if size == "405b" else "")  # there are also 16 shards, and 8-bit ones
    if version == "3":
        stem = f"Meta-{stem}"
        folder = f"{size}_{'instruction_tuned' if tuning else 'pre_trained'}"
    repo = f"meta-llama/{stem}"
    return Published(f"llama-{version}-{size}{tuning.lower()}", repo, repo, folder, _SHARDS[size])


_LLAMA_3_SIZES = {"3": ("8b", "70b"), "3.1": ("8b", "70b", "405b"), "3.2": ("1b", "3b")}

MODELS: dict[str, Published] = {
    model.name: model
    for model in (
        *(_llama_2(size, chat) for size in ("7b", "13b", "70b") for chat in ("", "-chat")),
        *(
            _llama_3(version, size, tuning)
            for version, sizes in _LLAMA_3_SIZES.items()
            for size in sizes
            for tuning in ("", "-Instruct")
        ),
        _llama_3("3.3", "70b", "-Instruct"),
    )
}


def find(name: str) -> Published:
    """Return the model called `name`, in capitals or not, with Meta's own prefix or without.

    Raises:
        DownloadError: for an unknown name; the message has the closest known ones.
    """
    key = name.lower().removeprefix("meta-llama/").removeprefix("meta-")
    if key not in MODELS:
        close = difflib.get_close_matches(key, MODELS, n=3) or list(MODELS)
        raise DownloadError(f"no published model is called {name!r}: try {', '.join(close)}; or --repo OWNER/NAME")
    return MODELS[key]


def find_size(size: str) -> Published:
    """Return the model of Llama 2 that has a size such as 7B or 13B-chat; or the model of a full name.

    Raises:
        DownloadError: for another text.
    """
    bare = f"llama-2-{size.lower()}"
    if bare in MODELS:
        return MODELS[bare]
    same = [name for name in MODELS if f"-{size.lower()}" in name]
    if same and size.lower() not in MODELS:
        raise DownloadError(f"{size} is no size of Llama 2 (7B, 13B, 70B, each also -chat): say {' or '.join(same)}")
    return find(size)
