"""Where a checkpoint is written: what may be replaced, whether it fits, and a name only once it is whole."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama import sizes
from llama.checkpoint import manifest
from llama.checkpoint.scratch import beside
from llama.checkpoint.source import PARTIAL
from llama.env import notice
from llama.errors import CheckpointError

# Room beside the tensors: archive directories, manifest, tokenizer (of which a GGUF vocabulary with merges has 10 MB).
OVERHEAD_BYTES = 32 << 20
# Where a folder keeps each file of its tokenizer; the last place is that of Llama 3's repositories on Hugging Face.
TOKENIZERS = {
    "tokenizer.model": ("tokenizer.model", "original/tokenizer.model"),
    "tokenizer.json": ("tokenizer.json",),
}
# What says which tokens open and close a text, where a tokenizer.json does not.
TOKENIZER_SETTINGS = (
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json"
)  # fmt: skip


def check_target(target: Path, source: Path, force: bool) -> None:
    """Whether a checkpoint may be written to `target`.

    Raises:
        CheckpointError: when that would touch the source, something that is not ours, or, without `force`, an
            earlier one of ours.
    """
    if source.resolve().is_relative_to(target.resolve()):
        raise CheckpointError(f"{target} is the checkpoint itself or holds it: choose another output")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not manifest.is_ours(target if target.is_dir() else beside(target)):
        raise CheckpointError(f"{target} exists and was not written by a split or a conversion: choose another output")
    if not force:
        raise CheckpointError(f"{target} exists: add --force to replace it, or choose another output")


def check_space(target: Path, n_bytes: int, remedy: str = "choose another output") -> None:
    """Whether so many bytes of tensors fit where `target` is to stand; `remedy` is the way out besides making room.

    Raises:
        CheckpointError: naming both sizes.
    """
    needed = n_bytes + OVERHEAD_BYTES
    need = f"{target} needs {sizes.show_gigabytes(needed)}"
    sizes.check_space(target.resolve().parent, needed, need, remedy, CheckpointError)


@contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its name once everything in it is written."""
    with _cleared(target) as partial:
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)


@contextmanager
def partial_file(target: Path) -> Iterator[Path]:
    """A path beside `target` for a file that takes its name once it is written."""
    with _cleared(target) as partial:
        partial.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(target)


def replace_text(path: Path, text: str) -> None:
    """Write a small file beside and rename it, so that no half of it is ever there.

    Raises:
        CheckpointError: when the system refuses; what stood there is as it was.
    """
    with partial_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def _cleared(target: Path) -> Iterator[Path]:
    """The unfinished name of `target`, with nothing under it before, and nothing after a failure."""
    partial = target.with_name(target.name + PARTIAL)
    try:
        _remove(partial)  # of a run that was killed
        yield partial
    except OSError as error:
        _remove(partial)
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}; nothing was left behind") from error
    except BaseException:
        _remove(partial)
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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
