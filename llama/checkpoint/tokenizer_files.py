"""The tokenizer that goes along with a checkpoint: found beside its weights, checked, copied or written anew."""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path

from llama.checkpoint.source import Checkpoint
from llama.env import notice
from llama.errors import TokenizerError
from llama.tokenizer import Tokenizer, find_tokenizer, load_tokenizer, locate_tokenizer

# Where a folder keeps each file of its tokenizer; the last place is that of Llama 3's repositories on Hugging Face.
TOKENIZERS = {
    "tokenizer.model": ("tokenizer.model", "original/tokenizer.model"),
    "tokenizer.json": ("tokenizer.json",),
}
# What says which tokens open and close a text, where a tokenizer.json does not.
TOKENIZER_SETTINGS = (
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json"
)  # fmt: skip


def read_tokenizer(checkpoint: Checkpoint, tokenizer_path: Path | None) -> tuple[Path, Tokenizer] | None:
    """The tokenizer's file and the tokenizer; None, with a notice, where there is none.

    Raises:
        TokenizerError: when it was named and is none, or belongs to a larger model.
    """
    try:
        file = locate_tokenizer(find_tokenizer(checkpoint.path, tokenizer_path))
    except TokenizerError:
        if tokenizer_path is not None:
            raise
        notice("no tokenizer beside the weights or one folder up: only the weights are converted")
        return None
    tokenizer = load_tokenizer(file)
    if tokenizer.n_words > checkpoint.args.vocab_size:
        raise TokenizerError(
            f"{file} has {tokenizer.n_words} tokens but the model only {checkpoint.args.vocab_size}: it belongs to "
            "another model; name the right one with --tokenizer_path"
        )
    return file, tokenizer


def write_hf_tokenizers(
    source: Path, tokenizer_path: Path | None, found: tuple[Path, Tokenizer] | None, folder: Path
) -> None:
    """Write the files that `AutoTokenizer` opens: the source's own, or new ones made of its tokenizer.model."""
    if found is None:
        return
    copy_tokenizer(source, folder, tokenizer_path)
    # Needed for this alone.
    from llama.tokenizer.export import write_hf_tokenizer, write_tokenizer_config

    if (folder / "tokenizer.json").exists():
        if not (folder / "tokenizer_config.json").exists():
            write_tokenizer_config(found[1], folder)
        return
    try:
        write_hf_tokenizer(found[0], folder)
    except TokenizerError as error:
        notice(f"{error}; it is copied as it is")


def copy_tokenizer(source: Path, folder: Path, tokenizer_path: Path | None = None) -> None:
    """Copy the tokenizer into `folder`, where it is not there yet.

    Args:
        source: the checkpoint: its tokenizer lies beside the weights or one folder up.
        folder: where to.
        tokenizer_path: the tokenizer's file or folder, if it was named.
    """
    if tokenizer_path is not None and tokenizer_path.is_file():
        is_json = tokenizer_path.read_bytes()[:64].lstrip().startswith((b"{", b"\xef\xbb\xbf{"))
        _copy_new(tokenizer_path, folder / ("tokenizer.json" if is_json else "tokenizer.model"))
        if is_json:
            _copy_settings(tokenizer_path.parent, folder)
        return
    start = source.resolve()
    start = start.parent if start.is_file() else start
    for place in [start, start.parent] if tokenizer_path is None else [tokenizer_path]:
        if _copy_from(place, folder):
            return  # a tokenizer one folder up may be another model's


def _copy_from(place: Path, folder: Path) -> bool:
    """Copy all files of the tokenizer in `place`; False where there is none."""
    found = {
        name: next((place / path for path in paths if (place / path).is_file()), None)
        for name, paths in TOKENIZERS.items()
    }
    for name, file in found.items():
        if file is not None:
            _copy_new(file, folder / name)
    if found["tokenizer.json"] is not None:
        _copy_settings(place, folder)
    return any(found.values())


def _copy_settings(place: Path, folder: Path) -> None:
    for name in TOKENIZER_SETTINGS:
        if (place / name).is_file():
            _copy_new(place / name, folder / name)


def _copy_new(file: Path, target: Path) -> None:
    if not target.exists():
        shutil.copyfile(file, target)
    elif not filecmp.cmp(file, target, shallow=False):
        notice(f"{target} is there already and is not that of the model: it is left as it is")
