"""A web server on the loopback that misbehaves on demand, and a hub on top of it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

PROBE = "bytes=0-0"
COMMIT = "c" * 40


@dataclass(frozen=True)
class Asked:
    """One request as it came."""

    method: str
    path: str
    query: str
    span: str | None


@dataclass
class Web:
    """What the server holds, how it misbehaves, and what it was asked.

    Args:
        files: content by path.
        faults: by path, what to do with the coming requests, one each; requests for a first byte alone
            (for a size) are spared.
        statuses: by path, an answer without content to every request; with headers.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    statuses: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    url: str = ""

    def spans(self, path: str) -> list[str | None]:
        """The ranges that were asked of a file, but for its size."""
        return [asked.span for asked in self.asked if asked.path == path and asked.span != PROBE]


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD, with ranges."""

    protocol_version = "HTTP/1.1"
    web: Web

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path, span = unquote(parts.path), self.headers.get("Range")
        self.web.asked.append(Asked(self.command, path, parts.query, span))
        if path in self.web.statuses:
            return self.answer(*self.web.statuses[path])
        if path not in self.web.files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        faults = self.web.faults.get(path)
        if faults and span != PROBE and self.command == "GET":
            return faults.pop(0)(self, self.web.files[path], span)
        return self.content(self.web.files[path], span)

    do_HEAD = do_GET  # noqa: N815

    def content(self, body: bytes, span: str | None) -> None:
        """The right answer."""
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", span or "")
        if found is None:
            return self.answer(200, headers, body)
        first, last = int(found[1]), min(int(found[2] or len(body) - 1), len(body) - 1)
        if first >= len(body):
            return self.answer(416, {"Content-Range": f"bytes */{len(body)}"})
        self.answer(206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(body)}"}, body[first : last + 1])

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


Fault = Callable[[Handler, bytes, str | None], None]


class Server(ThreadingHTTPServer):
    """Clients that hang up are part of the play."""

    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        pass


@contextmanager
def serving(web: Web) -> Iterator[Web]:
    """A server for as long as the block lasts."""
    server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"web": web}))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    web.url = f"http://127.0.0.1:{server.server_port}"
    yield web
    server.shutdown()
    server.server_close()


# -- misbehaviour ----------------------------------------------------------------------------------


def break_off(n_bytes: int) -> Fault:
    """Announce all that was asked for, send some of it, hang up."""

    def fault(handler: Handler, body: bytes, span: str | None) -> None:
        first = int(re.findall(r"\d+", span)[0]) if span else 0
        headers = {"Content-Length": str(len(body) - first)}
        if span:
            headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
        handler.answer(206 if span else 200, headers, body[first : first + n_bytes])
        handler.hang_up()

    return fault


def ignore_range(handler: Handler, body: bytes, _: str | None) -> None:
    """The whole file, whatever was asked."""
    handler.content(body, None)


def lie(content_range: str | None = None, length: int | None = None, body: bytes | None = None) -> Fault:
    """Say something about the answer that is not so."""

    def fault(handler: Handler, right: bytes, _: str | None) -> None:
        content = right if body is None else body
        headers = {"Content-Length": str(len(content) if length is None else length)}
        if content_range:
            headers["Content-Range"] = content_range
        handler.answer(206 if content_range else 200, headers, content)
        handler.hang_up()

    return fault


def status(code: int, **headers: str) -> Fault:
    """Answer with a status alone."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, _body, _span: handler.answer(code, named)


def stall(seconds: float) -> Fault:
    """Send half, then nothing for a while."""

    def fault(handler: Handler, body: bytes, _: str | None) -> None:
        handler.answer(200, {"Content-Length": str(len(body))}, body[: len(body) // 2])
        time.sleep(seconds)
        handler.hang_up()

    return fault


def unannounced(content: bytes) -> Fault:
    """Something of a length that is not told: it ends when the connection does."""

    def fault(handler: Handler, _body: bytes, _span: str | None) -> None:
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(content)
        handler.hang_up()

    return fault


def trickle(handler: Handler, body: bytes, _: str | None) -> None:
    """Half of the file at once, and the rest never."""
    handler.answer(200, {"Content-Length": str(len(body))}, body[: len(body) // 2])
    time.sleep(300)


# -- a hub -----------------------------------------------------------------------------------------


def publish(web: Web, repo: str, files: dict[str, bytes]) -> None:
    """Put a repository on the server, as the hub's interface shows it."""
    siblings, tree = [], []
    for name, body in files.items():
        web.files[f"/{repo}/resolve/{COMMIT}/{name}"] = body
        sha256, oid = hashlib.sha256(body).hexdigest(), hashlib.sha1(body).hexdigest()
        lfs: dict[str, Any] = {"sha256": sha256, "size": len(body), "pointerSize": 100}
        siblings.append({"rfilename": name, "size": len(body), "blobId": oid, "lfs": lfs})
        tree.append({"type": "file", "path": name, "size": len(body), "oid": oid, "lfs": {**lfs, "oid": sha256}})
    info = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
    headers_free = {f"/api/models/{repo}": info, f"/api/models/{repo}/revision/{COMMIT}": info}
    for path, content in {**headers_free, f"/api/models/{repo}/tree/{COMMIT}": tree}.items():
        web.files[path] = json.dumps(content).encode()
