"""One file over HTTP, whatever the server and the line do on the way.

A file is written to `NAME.partial` and takes its name when its size and digest are those announced.
What breaks off is continued by range; a server that ignores ranges, or lies about them, is asked
for the whole file. Addresses carry their own permission, so no address is ever shown: errors name files.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import requests

from llama.download.checklist import BLOCK_BYTES, Progress
from llama.errors import DownloadError
from llama.sizes import check_space, show_gigabytes

PARTIAL = ".partial"
# Bytes of a block, which is written when it is complete, and lost when the connection breaks off before.
NET_BYTES = 1 << 16
# Lists and the like, which are kept in memory.
MAX_TEXT_BYTES = 1 << 20
# A try that brought this much does not count as a failure: a long file may well break off often.
PROGRESS_BYTES = 1 << 20
# Statuses that may pass: too slow, too early, too often; and all that say the server itself has failed.
_PASSING = {408, 425, 429}
_REASONS = {
    403: "403: the link has expired (24 hours, or its number of downloads) or is not for this model: ask for a new one",
    404: "404: the server has no such file: is the link for this model?",
    410: "410: the file is gone: ask for a new link",
}

Result = TypeVar("Result")


@dataclass(frozen=True)
class Patience:
    """Limits of waiting for a server.

    Args:
        tries: in a row that bring nothing.
        pause: seconds after the first failure; doubled after each.
        longest_pause: seconds, also where a server asks for more.
        timeout: seconds without a byte after which a connection counts as broken.
    """

    tries: int = 6
    pause: float = 1.0
    longest_pause: float = 30.0
    timeout: float = 30.0


PATIENT = Patience()


@dataclass(frozen=True)
class Address:
    """A file on a server: its name, for people, and its URL, which is secret."""

    name: str
    url: str

    def __repr__(self) -> str:
        return f"Address({self.name!r})"


class _BrokenError(Exception):
    """A try that failed and may succeed when repeated."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


class _LieError(_BrokenError):
    """An answer that contradicts the request, itself or an earlier one."""


class Fetcher:
    """Gets files from servers, patiently.

    Args:
        patience: with each file.
    """

    def __init__(self, patience: Patience = PATIENT) -> None:
        self.patience = patience
        self._session = requests.Session()
        # Sizes are only comparable when nothing is compressed on the way.
        self._session.headers["Accept-Encoding"] = "identity"

    def text(self, address: Address) -> str:
        """Return a small file's content.

        Raises:
            DownloadError: when the server refuses it, fails for good, or sends no text or too long a one.
        """

        def read() -> bytes:
            with self._get(address) as response:
                content = b""
                for block in response.iter_content(NET_BYTES):
                    content += block
                    if len(content) > MAX_TEXT_BYTES:
                        raise DownloadError(f"{address.name} is larger than such a list can be")
                return content

        try:
            return self._persist(address, read).decode("utf-8")
        except UnicodeDecodeError:
            raise DownloadError(f"{address.name} is not text") from None

    def size(self, address: Address) -> int | None:
        """Return a file's length in bytes; None where the server does not tell.

        Meta's servers refuse HEAD, so the first byte is asked for.

        Raises:
            DownloadError: when the server refuses the file or fails for good.
        """

        def ask() -> int | None:
            with self._get(address, "bytes=0-0") as response:
                if response.status_code == 206:
                    return _content_range(response)[2]
                return 0 if response.status_code == 416 else _content_length(response)

        return self._persist(address, ask)

    def file(
        self, address: Address, target: Path, size: int | None, md5: str | None, progress: Progress = lambda _: None
    ) -> None:
        """Download a file to `target`, continuing an earlier try.

        Args:
            address: of the file.
            target: its path; until the file is whole, its name ends in `.partial`.
            size: in bytes, or None where it is not known.
            md5: the digest that it must have, or None.
            progress: called with the bytes that came, and with a negative number when bytes are thrown away.

        Raises:
            DownloadError: when the file is refused, breaks off too often or has the wrong content, or the disk
                is full. The right part stays as the partial file.
        """
        with _Partial.open(target.with_name(target.name + PARTIAL), progress) as part:
            was_continued = self._complete(address, part, size)
            if md5 not in (None, part.md5()) and was_continued:
                # The beginning may be of another file, or the server wrong about ranges: once from the start.
                part.restart()
                self._complete(address, part, size)
            if md5 not in (None, part.md5()):
                found = part.md5()
                part.restart()
                raise DownloadError(
                    f"{address.name} came damaged: its md5 is {found} where the checklist has {md5}; "
                    "nothing of it was kept: run it again, or ask for a new link"
                )
            part.rename(target)

    def _complete(self, address: Address, part: _Partial, size: int | None) -> bool:
        """Fill the partial file up; return True where a part of it was there before a request."""
        if size is not None and part.length > size:
            part.restart()
        was_continued = part.length > 0

        def step() -> None:
            nonlocal was_continued
            if size is not None and part.length == size:
                return
            was_continued |= part.length > 0
            try:
                self._append(address, part, size)
            except _LieError:
                part.restart()
                raise

        self._persist(address, step, lambda: part.length)
        return was_continued

    def _append(self, address: Address, part: _Partial, size: int | None) -> None:
        """Request all missing bytes once."""
        with self._get(address, f"bytes={part.length}-" if part.length else None) as response:
            end, total = _announced(response, part, size)
            for block in response.iter_content(NET_BYTES):
                if end is not None and part.length + len(block) > end:
                    raise _LieError("the server sent more than it announced")
                part.write(block)
        goal = end if total is None else total
        if goal is not None and part.length < goal:
            raise _BrokenError(f"the connection broke off at {part.length} of {goal} bytes")

    @contextmanager
    def _get(self, address: Address, span: str | None = None) -> Iterator[requests.Response]:
        headers = {"Range": span} if span else {}
        timeout = self.patience.timeout
        try:
            with self._session.get(address.url, headers=headers, stream=True, timeout=timeout) as response:
                _check_status(response, address.name, bool(span))
                yield response
        except requests.RequestException as error:
            # The error's own text holds the address, and so the signature.
            raise _BrokenError(_reason(error)) from None

    def _persist(self, address: Address, action: Callable[[], Result], length: Callable[[], int] = lambda: 0) -> Result:
        """Repeat an action until it succeeds, or has failed too often without bringing bytes."""
        failures, reached = 0, length()
        while True:
            try:
                return action()
            except _BrokenError as broken:
                failures = 1 if length() >= reached + PROGRESS_BYTES else failures + 1
                reached = max(reached, length())
                if failures >= self.patience.tries:
                    kept = "; what came is kept, run it again to continue" if length() else ""
                    raise DownloadError(f"{address.name}: {broken}; gave up after {failures} tries{kept}") from None
                pause = max(broken.wait, self.patience.pause * 2 ** (failures - 1))
            time.sleep(min(pause, self.patience.longest_pause))


# -- answers of a server ---------------------------------------------------------------------------


def _reason(error: requests.RequestException) -> str:
    if isinstance(error, requests.exceptions.SSLError):
        return "the server's certificate is not trusted"
    if isinstance(error, requests.Timeout):
        return "the server does not answer"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke off"
    if isinstance(error, requests.ConnectionError):
        return "the server cannot be reached, or the connection broke off"
    return f"the request failed ({type(error).__name__})"


def _check_status(response: requests.Response, name: str, has_range: bool) -> None:
    status = response.status_code
    if status in (200, 206) or (status == 416 and has_range):
        return
    if status in _PASSING or status >= 500:
        raise _BrokenError(f"the server answered {status}", _retry_after(response))
    raise DownloadError(f"{name}: {_REASONS.get(status, f'the server answered {status} {response.reason}')}")


def _retry_after(response: requests.Response) -> float:
    text = response.headers.get("Retry-After", "")
    return float(text) if re.fullmatch(r"\d{1,6}", text) else 0.0


def _content_length(response: requests.Response) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if re.fullmatch(r"\d{1,18}", text) else None


def _content_range(response: requests.Response) -> tuple[int, int, int | None]:
    """Return the first byte, the byte after the last, and the file's length where the server tells it."""
    text = response.headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", text)
    if found is None:
        raise _LieError("the server sent a part of the file without saying which")
    first, end = int(found[1]), int(found[2]) + 1
    total = None if found[3] == "*" else int(found[3])
    length = _content_length(response)
    if end <= first or (total is not None and end > total) or length not in (None, end - first):
        raise _LieError("the server contradicts itself about which part of the file it sent")
    return first, end, total


def _announced(response: requests.Response, part: _Partial, size: int | None) -> tuple[int | None, int | None]:
    """Return the byte of the file at which an answer ends, and the file's length, as far as they are known.

    A partial file whose range was ignored is emptied: the answer is the whole file.
    """
    end: int | None
    total: int | None
    if response.status_code == 416:
        raise _LieError("the file is shorter on the server than what is here")
    if response.status_code == 206:
        first, end, total = _content_range(response)
        if first != part.length:
            raise _LieError(f"the server was asked for bytes from {part.length} and sent those from {first}")
    else:
        part.restart()
        total = _content_length(response)
        end = total if total is not None else size
    if None not in (size, total) and size != total:
        raise _LieError(f"the server told two sizes: {size} bytes at first, then {total}")
    return end, size if total is None else total


# -- files on disk ---------------------------------------------------------------------------------


def require_space(folder: Path, needed: int) -> None:
    """Refuse to download more bytes than the disk has room for.

    Raises:
        DownloadError: naming both sizes.
    """
    check_space(folder, needed, f"{show_gigabytes(needed)} are missing", "choose another --output_dir", DownloadError)


class _Partial:
    """A file under way: the part on disk and the part's digest."""

    def __init__(self, path: Path, file: Any, progress: Progress) -> None:
        self.path = path
        self.length = 0
        self._file = file
        self._progress = progress
        self._digest = hashlib.md5(usedforsecurity=False)

    @classmethod
    @contextmanager
    def open(cls, path: Path, progress: Progress) -> Iterator[_Partial]:
        """Open the partial file of an earlier try, or an empty one."""
        try:
            with path.open("a+b") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise DownloadError(f"another download is writing {path}") from None
                part = cls(path, file, progress)
                part._read()
                try:
                    yield part
                except BaseException:
                    part._forget_if_empty()
                    raise
        except requests.RequestException:  # one is an OSError too, but none of the disk's
            raise
        except OSError as error:
            raise DownloadError(f"cannot write {path}: {error.strerror}; what came is kept") from None

    def _read(self) -> None:
        self._file.seek(0)
        while block := self._file.read(BLOCK_BYTES):
            self._count(block)

    def _count(self, block: bytes) -> None:
        self._digest.update(block)
        self.length += len(block)
        self._progress(len(block))

    def md5(self) -> str:
        """Return the digest of the bytes on disk."""
        return self._digest.hexdigest()

    def write(self, block: bytes) -> None:
        """Append a block; the file is open for appending, so its position does not matter."""
        self._file.write(block)
        self._count(block)

    def restart(self) -> None:
        """Throw away all bytes."""
        self._file.flush()
        self._file.truncate(0)
        self._progress(-self.length)
        self.length, self._digest = 0, hashlib.md5(usedforsecurity=False)

    def _forget_if_empty(self) -> None:
        if not self.length:
            self.path.unlink(missing_ok=True)

    def rename(self, target: Path) -> None:
        """Give the file its name, now that it is whole."""
        self._file.flush()
        self.path.replace(target)
