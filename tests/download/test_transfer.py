import dataclasses
import hashlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import web as internet
from web import Web, break_off, ignore_range, lie, stall, status, unannounced

from llama.download import transfer
from llama.download.transfer import Address, Fetcher, Patience
from llama.errors import DownloadError

BODY = bytes(range(256)) * 1200
MD5 = hashlib.md5(BODY).hexdigest()
PATH = "/model/consolidated.00.pth"
SECRET = "Policy=abc&Signature=hush"
QUICK = Patience(tries=3, pause=0.01, longest_pause=0.02, timeout=60.0)


@pytest.fixture
def web() -> Iterator[Web]:
    with internet.serving(Web({PATH: BODY})) as web:
        yield web


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "consolidated.00.pth"


def partial(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def fetch(web: Web, target: Path, md5: str | None = MD5, size: int | None = len(BODY), **progress) -> None:
    Fetcher(QUICK).file(Address("consolidated.00.pth", f"{web.url}{PATH}?{SECRET}"), target, size, md5, **progress)


def fails(web: Web, target: Path, **expected) -> str:
    with pytest.raises(DownloadError) as caught:
        fetch(web, target, **expected)
    assert "hush" not in str(caught.value)
    assert not target.exists()
    return str(caught.value)


def test_a_file_arrives_whole_and_nothing_else_is_left(web: Web, target: Path) -> None:
    told: list[int] = []
    fetch(web, target, progress=told.append)
    assert target.read_bytes() == BODY
    assert [file.name for file in target.parent.iterdir()] == [target.name]
    assert sum(told) == len(BODY)
    assert web.asked[0].query == SECRET


def test_what_breaks_off_is_continued(web: Web, target: Path) -> None:
    web.faults[PATH] = [break_off(100_000), break_off(transfer.NET_BYTES)]
    told: list[int] = []
    fetch(web, target, progress=told.append)
    assert target.read_bytes() == BODY
    assert web.spans(PATH) == [None, "bytes=65536-", "bytes=131072-"]
    assert sum(told) == len(BODY)


@pytest.mark.parametrize("size", [len(BODY), None])
def test_an_earlier_run_is_continued(web: Web, target: Path, size: int | None) -> None:
    partial(target).write_bytes(BODY[:70_000])
    fetch(web, target, size=size)
    assert target.read_bytes() == BODY
    assert web.spans(PATH) == ["bytes=70000-"]


def test_a_file_that_an_earlier_run_left_whole_needs_no_request(web: Web, target: Path) -> None:
    partial(target).write_bytes(BODY)
    fetch(web, target)
    assert (target.read_bytes(), web.asked) == (BODY, [])


def test_a_server_without_ranges_is_asked_for_the_whole(web: Web, target: Path) -> None:
    partial(target).write_bytes(b"x" * 70_000)
    web.faults[PATH] = [ignore_range]
    told: list[int] = []
    fetch(web, target, progress=told.append)
    assert target.read_bytes() == BODY
    assert len(web.asked) == 1
    assert sum(told) == len(BODY)


@pytest.mark.parametrize(
    "fault",
    [
        lie(content_range=f"bytes 0-{len(BODY) - 1}/{len(BODY)}"),  # of another part than was asked for
        lie(content_range=f"bytes 2000-{len(BODY) - 1}/{len(BODY)}", body=BODY[2000:]),
        lie(content_range=f"bytes 1000-{len(BODY) - 1}/{len(BODY)}"),  # with more bytes than that has
        lie(content_range=f"bytes 1000-{len(BODY) - 1}/{len(BODY)}", body=BODY[1000:2000]),  # with fewer
        lie(content_range="bytes 1000-1000000/5"),
        lie(content_range="pages 1-2"),
        lie(content_range=f"bytes 1000-{len(BODY) + 9}/{len(BODY) + 10}", body=BODY[1000:] + b"x" * 10),
        status(416),
    ],
)
def test_a_lie_about_a_range_costs_only_a_fresh_start(web: Web, target: Path, fault: internet.Fault) -> None:
    partial(target).write_bytes(BODY[:1000])
    web.faults[PATH] = [fault]
    fetch(web, target)
    assert target.read_bytes() == BODY
    assert web.spans(PATH) == ["bytes=1000-", None]


def test_a_server_may_send_a_range_in_pieces(web: Web, target: Path) -> None:
    partial(target).write_bytes(BODY[:1000])
    web.faults[PATH] = [lie(content_range=f"bytes 1000-1999/{len(BODY)}", body=BODY[1000:2000])]
    fetch(web, target, md5=None)
    assert target.read_bytes() == BODY
    assert web.spans(PATH) == ["bytes=1000-", "bytes=2000-"]


def test_a_length_that_is_not_told_is_the_one_known(web: Web, target: Path) -> None:
    web.faults[PATH] = [unannounced(BODY + b"x" * transfer.NET_BYTES), unannounced(BODY[:70_000]), unannounced(BODY)]
    fetch(web, target, md5=None)
    assert target.read_bytes() == BODY
    assert web.spans(PATH) == [None, None, "bytes=70000-"]


def test_a_range_of_wrong_bytes_is_found_out_and_fetched_anew(web: Web, target: Path) -> None:
    partial(target).write_bytes(BODY[:1000])
    span = f"bytes 1000-{len(BODY) - 1}/{len(BODY)}"
    web.faults[PATH] = [lie(content_range=span, body=b"x" * (len(BODY) - 1000))]
    fetch(web, target)
    assert target.read_bytes() == BODY


@pytest.mark.parametrize("left", [b"x" * 1000, b"x" * len(BODY), BODY + b"x"])
def test_a_beginning_of_another_file_is_thrown_away(web: Web, target: Path, left: bytes) -> None:
    partial(target).write_bytes(left)
    fetch(web, target)
    assert target.read_bytes() == BODY


def test_wrong_bytes_are_never_given_the_name(web: Web, target: Path) -> None:
    web.files[PATH] = BODY[:-1] + b"x"
    assert "came damaged" in fails(web, target)
    assert not partial(target).exists()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lie(length=len(BODY) + 5), "two sizes"),
        (lie(length=100, body=BODY[:100]), "two sizes"),
        (status(500), "answered 500"),
        (status(429, Retry_After="600"), "answered 429"),
        (break_off(0), "broke off"),
    ],
)
def test_what_never_comes_right_is_given_up(web: Web, target: Path, fault: internet.Fault, message: str) -> None:
    web.faults[PATH] = [fault] * 9
    assert message in (said := fails(web, target))
    assert "3 tries" in said
    assert len(web.asked) == 3
    assert not partial(target).exists()


def test_a_server_that_sends_too_much_is_stopped(web: Web, target: Path) -> None:
    web.files[PATH] = BODY * 2
    assert "two sizes" in fails(web, target)


def test_what_came_is_kept_for_the_next_run(web: Web, target: Path) -> None:
    web.faults[PATH] = [break_off(100_000)] + [status(503)] * 9
    assert "run it again" in fails(web, target)
    assert partial(target).read_bytes() == BODY[: transfer.NET_BYTES]
    web.faults.clear()
    fetch(web, target)
    assert target.read_bytes() == BODY


def test_a_long_file_may_break_off_often(web: Web, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PROGRESS_BYTES", 10_000)
    web.faults[PATH] = [break_off(70_000)] * 4
    fetch(web, target)
    assert target.read_bytes() == BODY


def test_a_server_that_fails_for_a_moment_is_asked_again(web: Web, target: Path) -> None:
    web.faults[PATH] = [status(500), status(503)]
    fetch(web, target)
    assert target.read_bytes() == BODY


def test_a_connection_that_stalls_is_dropped(web: Web, target: Path) -> None:
    # Dropped by the client's clock alone: the server would hold the line for longer than a test may take.
    web.faults[PATH] = [stall(1000.0)]
    patience = dataclasses.replace(QUICK, timeout=1.0)
    Fetcher(patience).file(Address("consolidated.00.pth", f"{web.url}{PATH}"), target, len(BODY), MD5)
    assert target.read_bytes() == BODY


@pytest.mark.parametrize(
    ("code", "message"),
    [(403, "403: the link has expired"), (404, "no such file"), (410, "ask for a new link"), (400, "answered 400")],
)
def test_a_refusal_is_final_and_explained(web: Web, target: Path, code: int, message: str) -> None:
    web.statuses[PATH] = (code, {})
    assert message in fails(web, target)
    assert len(web.asked) == 1
    assert list(target.parent.iterdir()) == []


def test_an_unreachable_server_is_named_without_its_address(tmp_path: Path) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # taken, and nobody listens
        nowhere = Address("params.json", f"http://127.0.0.1:{deaf.getsockname()[1]}/params.json?{SECRET}")
        with pytest.raises(DownloadError, match=r"params\.json: the server cannot be reached.*3 tries") as caught:
            Fetcher(QUICK).file(nowhere, tmp_path / "params.json", None, None)
    assert "hush" not in str(caught.value)
    assert "hush" not in repr(nowhere)


def test_two_downloads_do_not_write_one_file(web: Web, target: Path) -> None:
    with transfer._Partial.open(partial(target), lambda _: None):
        assert "another download" in fails(web, target)


def test_a_full_disk_is_told_and_what_came_is_kept(web: Web, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = transfer._Partial.write

    def full(part: transfer._Partial, block: bytes) -> None:
        write(part, block[:500])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transfer._Partial, "write", full)
    assert "No space left on device" in fails(web, target)
    assert partial(target).read_bytes() == BODY[:500]


def test_sizes_are_asked_by_the_first_byte(web: Web) -> None:
    web.files["/empty"] = b""
    assert Fetcher(QUICK).size(Address("file", f"{web.url}{PATH}")) == len(BODY)
    assert Fetcher(QUICK).size(Address("empty", f"{web.url}/empty")) == 0


def test_lists_are_small_texts(web: Web) -> None:
    web.files |= {"/huge": b"x" * (transfer.MAX_TEXT_BYTES + 1), "/bytes": b"\xff\xfe", "/text": b"words"}
    web.faults["/text"] = [break_off(2)]
    assert Fetcher(QUICK).text(Address("text", f"{web.url}/text")) == "words"
    for name, message in (("huge", "larger"), ("bytes", "not text")):
        with pytest.raises(DownloadError, match=message):
            Fetcher(QUICK).text(Address(name, f"{web.url}/{name}"))
