"""Early exit of a process: one rank prints the message for all of them, and no rank is left waiting.

torchrun sends SIGTERM to every rank as soon as one is gone, and a rank that waits in a collective cannot run Python's
signal handlers. So a thread listens for signals. The first rank to leave is the only one that may print; errors that
the other ranks meet from then on (closed connections, SIGTERM) are mere consequences.
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
# Seconds that other ranks give rank 0 to print before they do; torchrun kills all that remain after 30 s.
SPEAKER_SECONDS = 5.0

_leaving = threading.Lock()


def leave(text: str = "", code: int = EXIT_CODE, *, at_once: bool = False) -> NoReturn:
    """End this process now, after printing one line `text` to stderr unless another process has left before.

    Args:
        text: the reason, for a person; empty to end quietly, on all ranks.
        code: exit code of this process.
        at_once: print without waiting for rank 0, for a reason that only this rank knows.
    """
    _leaving.acquire()  # never released: of the main and the listening thread, only the first may leave
    if threading.current_thread() is threading.main_thread():
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
    line = store.line()
    if _has_last_word(line, at_once) and text:
        _write_line(text)
    if line is not None:
        with contextlib.suppress(dist.DistError):
            line.set("spoken", "yes")
    # No orderly shutdown: groups whose ranks have failed may wait for each other for ever.
    os._exit(code)


def _has_last_word(line: dist.Store | None, at_once: bool) -> bool:
    """Return whether this process is the first to leave; ranks other than the lowest alive wait a little before."""
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
    """Write one line to stderr in one piece, past Python's buffers, whose locks another thread may hold."""
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # a progress bar may stand there
    with contextlib.suppress(OSError):
        os.write(2, f"{clear}{' '.join(text.splitlines())}\n".encode(errors="backslashreplace"))


def listen() -> None:
    """Let SIGTERM and SIGINT end this rank even while it waits in a collective; for commands under torchrun."""
    if env.world_size() == 1 or os.name != "posix":
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    # Python's C handler writes the signal's number into this pipe at once, whatever the main thread does.
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
        signal.siginterrupt(number, False)
    os.register_at_fork(after_in_child=_stop_listening)
    threading.Thread(target=_obey_signals, args=(read_end,), daemon=True).start()


def _stop_listening() -> None:
    """Restore the signal handlers in a forked child, such as a data loader's worker."""
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
