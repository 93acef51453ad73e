"""Downloads from Hugging Face's hub: one layout of the two that Meta publishes, checked after the transfer.

The hub's own library does the work: tokens, mirrors (HF_ENDPOINT), retries, parallel transfers. When the
hub does not answer, the library takes a folder that holds anything for a finished download; so files are
listed first, and afterwards compared with that list.
"""

from __future__ import annotations

import errno
import glob
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from llama.download.checklist import BLOCK_BYTES, Progress
from llama.download.transfer import require_space
from llama.errors import DownloadError

# Licences are accepted there, also before downloading from a mirror.
HOME = "https://huggingface.co"
ORIGINAL = "original"
# Files under way at once: an interrupted one starts anew, so they are few.
WORKERS = 4
_META_NAMES = ("consolidated.*.pth", "params.json", "tokenizer.model", "*.chk", "LICENSE*", "USE_POLICY*")
_TEXT_NAMES = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*", "USE_POLICY*", "README.md")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, as the hub lists it; size and digest may be unknown."""

    name: str
    size: int | None = None
    sha256: str | None = None


def choose(files: Iterable[HubFile], original: bool) -> list[HubFile]:
    """Return the files of one layout.

    Args:
        files: of the repository.
        original: True for Meta's layout, which lies in `original/`, or at the top of repositories without another
            layout; False for Hugging Face's at the top: safetensors, or .bin files where there are none.

    Raises:
        DownloadError: when the repository does not have that layout.
    """
    files = list(files)
    if original:
        return _choose_original(files)
    top = [file for file in files if "/" not in file.name]
    weights = _matching(top, ("*.safetensors",)) or _matching(top, ("pytorch_model*.bin",))
    if not weights:
        raise DownloadError("the repository has no safetensors at its top: try --original for Meta's layout")
    # An index of the other kind of weights would name files that are not fetched.
    kind = PurePosixPath(weights[0].name).suffix
    texts = [file for file in _matching(top, _TEXT_NAMES) if not file.name.endswith(".index.json")]
    return weights + texts + _matching(top, (f"*{kind}.index.json",))


def _choose_original(files: list[HubFile]) -> list[HubFile]:
    shards = [file for file in files if PurePosixPath(file.name).match("consolidated.*.pth")]
    if not shards:
        raise DownloadError("the repository has no weights in Meta's layout: leave --original out")
    # The largest models lie there twice, for 8 and for 16 cards: the fewer files will do.
    folders = [str(PurePosixPath(file.name).parent) for file in shards]
    folder = min(set(folders), key=lambda name: (name != ORIGINAL, folders.count(name), name))
    beside = [file for file in files if str(PurePosixPath(file.name).parent) == folder]
    return beside if folder != "." else _matching(beside, _META_NAMES)


def _matching(files: list[HubFile], patterns: tuple[str, ...]) -> list[HubFile]:
    return [file for file in files if any(PurePosixPath(file.name).match(pattern) for pattern in patterns)]


def download(repo: str, folder: Path, original: bool = False, file: str | None = None) -> Path:
    """Fetch one layout of a repository, or one file; return the folder that holds the checkpoint.

    Args:
        repo: OWNER/NAME.
        folder: to write, with the paths of the repository in it.
        original: Meta's layout instead of Hugging Face's.
        file: the only file to fetch; None for all of the layout.

    Raises:
        DownloadError: for no access, no such repository or file, no room, or files that differ.
    """
    revision, listed = _list(repo)
    wanted = choose(listed, original) if file is None else [found for found in listed if found.name == file]
    if not wanted:
        raise DownloadError(f"{repo} has no file {file!r}: see {_page(repo)}/tree/main")
    _check_folder(folder, wanted)
    with _plain_words(repo):
        import huggingface_hub

        # Names are patterns to the library.
        names = [glob.escape(found.name) for found in wanted]
        huggingface_hub.snapshot_download(
            repo, revision=revision, local_dir=folder, allow_patterns=names, max_workers=WORKERS
        )
    _verify(folder, wanted)
    weights = [found.name for found in wanted if found.name.endswith((".pth", ".safetensors", ".bin"))]
    return folder / PurePosixPath((weights or [""])[0]).parent


def _list(repo: str) -> tuple[str, list[HubFile]]:
    """Return the repository's commit and its files."""
    with _plain_words(repo):
        import huggingface_hub

        info = huggingface_hub.HfApi().model_info(repo, files_metadata=True)
    if info.sha is None:
        raise DownloadError(f"{repo}: the hub does not tell the repository's commit")
    siblings = info.siblings or []
    return info.sha, [HubFile(s.rfilename, s.size, s.lfs.sha256 if s.lfs else None) for s in siblings]


# -- files on disk ---------------------------------------------------------------------------------


def _check_folder(folder: Path, wanted: list[HubFile]) -> None:
    """Refuse to replace files of another content, and to write more than the disk has room for."""
    needed = 0
    for file in wanted:
        path = folder / file.name
        if ".." in PurePosixPath(file.name).parts or PurePosixPath(file.name).is_absolute():
            raise DownloadError(f"the repository names a file outside its folder: {file.name}")
        if not path.exists():
            needed += file.size or 0
        elif file.size not in (None, path.stat().st_size):
            raise DownloadError(
                f"{path} exists and is not the repository's file: move it away, or choose another --output_dir"
            )
    require_space(folder, needed)


def _verify(folder: Path, wanted: list[HubFile]) -> None:
    """Compare the files with the hub's list; remove a file that differs."""
    with tqdm(total=sum(file.size or 0 for file in wanted), unit="B", unit_scale=True, desc="checking") as bar:
        for file in wanted:
            path = folder / file.name
            if not path.is_file():
                raise DownloadError(f"{file.name} did not arrive: run it again to continue")
            if not _is_right(path, file, bar.update):
                path.unlink()
                raise DownloadError(f"{file.name} came damaged and was removed: run it again to fetch it anew")


def _is_right(path: Path, file: HubFile, progress: Progress) -> bool:
    if file.size not in (None, path.stat().st_size):
        return False
    if file.sha256 is None:
        return True
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest() == file.sha256


# -- errors of the library -------------------------------------------------------------------------


@contextmanager
def _plain_words(repo: str) -> Iterator[None]:
    """Turn errors of the library into a `DownloadError` with the way out.

    The library changed its HTTP client, and so the classes of its errors, more than once: anything raised in this
    context counts as its failure. So the context holds nothing but calls of the library.
    """
    try:
        yield
    except Exception as error:
        raise DownloadError(_explain(repo, error)) from error


def _explain(repo: str, error: BaseException) -> str:
    from huggingface_hub import errors

    causes = list(_causes(error))
    by_kind = {kind: found for found in causes for kind in type(found).__mro__}
    if errors.OfflineModeIsEnabled in by_kind:
        return "HF_HUB_OFFLINE is set: unset it to download"
    if errors.HFValidationError in by_kind:
        return f"{repo!r} is no name of a repository: write OWNER/NAME"
    status = next((found.response.status_code for found in causes if isinstance(found, errors.HfHubHTTPError)), None)
    login = "log in with 'hf auth login', or set HF_TOKEN"
    if status == 403:
        return f"403: the licence of {repo} is not accepted: open {HOME}/{repo}, accept it, then {login}"
    if errors.GatedRepoError in by_kind:
        return f"401: {repo} is gated and there is no valid token: open {HOME}/{repo}, accept its licence, then {login}"
    if status == 401:
        return f"401: no such repository as {repo}, or no valid token for it: check the name, then {login}"
    if status == 404 or errors.RepositoryNotFoundError in by_kind:
        return f"404: the hub has no such repository or file: {_page(repo)}"
    if status is not None:
        return f"the hub answered {status} for {repo}: try again later; what came whole is kept"
    disk = next((found for found in causes if isinstance(found, OSError) and _is_of_disk(found)), None)
    if disk is not None:
        return f"cannot write {disk.filename or 'the files'}: {disk.strerror}; what came whole is kept"
    lines = str(error).strip().splitlines() or [""]
    return f"the hub cannot be reached, or broke off ({type(causes[-1]).__name__}: {lines[0][:200]}): run it again"


def _is_of_disk(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or bool(error.strerror and error.filename)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _page(repo: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"
