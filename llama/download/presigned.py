"""Downloads by the link in Meta's e-mail: one address with a `*` in place of a file's path.

Meta's `download.sh` does the same, without resuming, checking and plain words. The part after the `?` is a
signature: whoever has it may download, so it is never shown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import requests
from tqdm import tqdm

from llama.config import read_json
from llama.download import checklist
from llama.download.checklist import Progress
from llama.download.models import Published
from llama.download.transfer import PARTIAL, PATIENT, Address, Fetcher, Patience, require_space
from llama.errors import CheckpointError, DownloadError

LIST, TOKENIZER_LIST = checklist.NAMES
TOKENIZER, PARAMS = "tokenizer.model", "params.json"


@dataclass(frozen=True)
class Link:
    """Meta's link, taken apart at its `*`.

    Args:
        before, after: the text on both sides of the `*`; the latter is secret.
    """

    before: str
    after: str

    @classmethod
    def parse(cls, text: str) -> Link:
        """Read a link as it was pasted.

        Raises:
            DownloadError: for another text, which the message does not repeat.
        """
        # Shells and mail programs escape the asterisk.
        text = re.sub(r"\\\*|%2[aA]", "*", text.strip().strip("'\"<>"), count=1)
        path, question, query = text.partition("?")
        before, star, rest = path.partition("*")
        if not re.match(r"https?://[^/]", text):
            raise DownloadError("this is no link: it must begin with https://; copy it from Meta's e-mail, in quotes")
        if not star:
            raise DownloadError("the link has no '*' for the files' names: copy its text instead of opening it")
        try:
            requests.Request("GET", before).prepare()
        except (requests.RequestException, ValueError):
            raise DownloadError("this is no link: its beginning is not that of an address") from None
        return cls(before, rest + question + query)

    def file(self, path: str) -> Address:
        """Return the address of the file at `path` of the server."""
        return Address(path, f"{self.before}{path}{self.after}")

    @property
    def host(self) -> str:
        """The server's name."""
        return urlsplit(self.before).hostname or "the server"

    def __repr__(self) -> str:
        return f"Link({self.before}*...)"


@dataclass(frozen=True)
class _Item:
    """One file to fetch: its name here, its address there, and the size and md5 that it must have."""

    name: str
    address: Address
    size: int | None
    md5: str | None


def download(link: Link, model: Published, folder: Path, patience: Patience = PATIENT) -> None:
    """Fetch a model in Meta's layout, checked against Meta's checklists; continue an earlier run.

    Args:
        link: of Meta's e-mail.
        model: to fetch.
        folder: to write; files in it that are already right are left alone.
        patience: with the server.

    Raises:
        DownloadError: when the server refuses or breaks off too often, a file comes damaged, the disk is too
            small, or the folder holds another file of the same name.
        CheckpointError: for a damaged checklist, or one that does not name the model's files.
    """
    fetcher = Fetcher(patience)
    lists = _fetch_lists(fetcher, link, model)
    _check_lists(folder, lists)
    items = _plan(fetcher, link, model, lists)
    with _bar(sum(item.size or 0 for item in items)) as bar:
        missing = [item for item in items if not _is_here(folder, item, bar.update)]
        _check_space(folder, missing)
        _write_lists(folder, lists)
        for item in missing:
            bar.set_description(item.name)
            fetcher.file(item.address, folder / item.name, item.size, item.md5, bar.update)
    read_json(folder / PARAMS)


def _bar(total: int) -> tqdm[None]:
    return tqdm(total=total or None, unit="B", unit_scale=True, desc="downloading")


# -- files to fetch --------------------------------------------------------------------------------


def _fetch_lists(fetcher: Fetcher, link: Link, model: Published) -> dict[str, str]:
    """Return the text of each checklist, by its name."""
    places = {LIST: f"{model.folder}/{LIST}"}
    if model.shares_tokenizer:
        places[TOKENIZER_LIST] = TOKENIZER_LIST
    return {name: fetcher.text(link.file(place)) for name, place in places.items()}


def _plan(fetcher: Fetcher, link: Link, model: Published, lists: dict[str, str]) -> list[_Item]:
    """Return every file with its size and md5; params.json last, since a folder without it is no checkpoint."""
    sums = {name: md5 for where, text in lists.items() for name, md5 in checklist.parse(text, where).items()}
    shards = [f"consolidated.{shard:02d}.pth" for shard in range(model.n_shards)]
    unknown = [name for name in shards if name not in sums]
    if unknown:
        raise CheckpointError(f"{LIST} of {link.host} does not name {unknown[0]}: it is not that of {model.name}")
    items = []
    for name in (TOKENIZER, *shards, PARAMS):
        is_shared = name == TOKENIZER and model.shares_tokenizer
        address = link.file(name if is_shared else f"{model.folder}/{name}")
        items.append(_Item(name, address, fetcher.size(address), sums.get(name)))
    return items


# -- files on disk ---------------------------------------------------------------------------------


def _check_lists(folder: Path, lists: dict[str, str]) -> None:
    for name, text in lists.items():
        checklist.parse(text, name)
        if (folder / name).exists() and (folder / name).read_bytes() != text.encode():
            raise _stranger(folder / name)


def _is_here(folder: Path, item: _Item, progress: Progress) -> bool:
    """Return True for a file that an earlier run has fetched; refuse to replace a file of another content."""
    path = folder / item.name
    if not path.exists():
        return False
    if item.size not in (None, path.stat().st_size):
        raise _stranger(path)
    if item.md5 is None:
        progress(path.stat().st_size)
    elif checklist.md5(path, progress) != item.md5:
        raise _stranger(path)
    return True


def _stranger(path: Path) -> DownloadError:
    return DownloadError(f"{path} exists and is not the server's file: move it away, or choose another --output_dir")


def _check_space(folder: Path, missing: list[_Item]) -> None:
    partials = [folder / (item.name + PARTIAL) for item in missing]
    kept = sum(path.stat().st_size for path in partials if path.exists())
    require_space(folder, sum(item.size or 0 for item in missing) - kept)


def _write_lists(folder: Path, lists: dict[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in lists.items():
            partial = folder / (name + PARTIAL)
            partial.write_bytes(text.encode())
            partial.replace(folder / name)
    except OSError as error:
        raise DownloadError(f"cannot write {folder}: {error.strerror}") from None
