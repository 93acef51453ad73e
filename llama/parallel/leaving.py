"""How a process ends before its time: one speaks for all of them, and none is left waiting.

torchrun sends SIGTERM to every rank as soon as one is gone, and a rank that waits in a collective
cannot run Python's signal handlers. So a thread listens for signals, and whoever leaves first has the
last word, be it silence: what the others meet from then on (closed connections, SIGTERM) only follows.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from typing import NoReturn

import torch.distributed as dist

from llama import env
from llama.parallel import store

EXIT_CODE = 2
INTERRUPTED = 130
# How long other ranks let rank 0 speak before they do; torchrun kills whoever is left after 30 s.
SPEAKER_SECONDS = 5.0

_leaving = threading.Lock()


def leave(text: str = "", code: int = EXIT_CODE, *, at_once: bool = False) -> NoReturn:
    """End this process now; on stderr stands one line `text`, unless another process has left before.

    Args:
        text: why, for a person; empty to end quietly, and the others with it.
        code: of this process.
        at_once: speak although rank 0 may be about to, for what only this rank knows.
    """
    _leaving.acquire()  # and never released: of the main thread and the listening one, only the first leaves
    if threading.current_thread() is threading.main_thread():
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
    line = store.line()
    if _has_last_word(line, at_once) and text:
        _write_line(text)
    if line is not None:
        with contextlib.suppress(dist.DistError):
            line.set("spoken", "yes")
    # Groups whose ranks have failed may wait for each other for ever when torn down in order.
    os._exit(code)


def _has_last_word(line: dist.Store | None, at_once: bool) -> bool:
    """Whether this process is the first to leave; other ranks give rank 0 (or the lowest left) some time."""
    if line is None:
        return True
    try:
        if not at_once and env.rank() != min(set(range(env.world_size())) - set(store.lost_ranks())):
            _wait_for_speaker(line)
        return line.add("last word", 1) == 1
    except dist.DistError:  # the store went with the process that kept it
        return True


def _wait_for_speaker(line: dist.Store) -> None:
    end = time.monotonic() + SPEAKER_SECONDS
    while not line.check(["spoken"]) and time.monotonic() < end:
        time.sleep(0.02)


def _write_line(text: str) -> None:
    """One line in one piece, past Python's buffers, whose locks another thread may hold."""
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # a progress bar may stand there
    with contextlib.suppress(OSError):
        os.write(2, f"{clear}{' '.join(text.splitlines())}\n".encode(errors="backslashreplace"))


def listen() -> None:
    """Have SIGTERM and SIGINT end this rank even while it waits in a collective; for commands under torchrun."""
    if env.world_size() == 1 or os.name != "posix":
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    # Python's own part of a signal's arrival, a byte in this pipe, does not wait for the main thread.
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
        signal.siginterrupt(number, False)
    os.register_at_fork(after_in_child=_stop_listening)
    threading.Thread(target=_obey_signals, args=(read_end,), daemon=True).start()


def _stop_listening() -> None:
    """In a forked child, such as a data loader's worker: its signals are not this rank's."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _obey_signals(read_end: int) -> None:
    while True:
        number = os.read(read_end, 1)[0]
        if number == signal.SIGINT:
            leave("interrupted", INTERRUPTED)
        if number == signal.SIGTERM:
            leave(f"error: {store.lost_message()}" if store.lost_ranks() else "")
