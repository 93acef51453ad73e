"""Where a checkpoint is written: what may be replaced, whether it fits, and a name only once it is whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama import sizes
from llama.checkpoint import manifest
from llama.checkpoint.scratch import beside
from llama.checkpoint.source import PARTIAL
from llama.errors import CheckpointError

# Room beside the tensors: archive directories, manifest, tokenizer (of which a GGUF vocabulary with merges has 10 MB).
OVERHEAD_BYTES = 32 << 20


def check_target(target: Path, source: Path, force: bool) -> None:
    """Refuse a target that must not be written to.

    Raises:
        CheckpointError: when it is or holds the source, is not of ours, or, without `force`, is an earlier checkpoint
            of ours.
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
    """Refuse a target on a disk without room for so many bytes of tensors.

    Args:
        target: the file or folder to write.
        n_bytes: of its tensors.
        remedy: the way out besides making room, for the message.

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
