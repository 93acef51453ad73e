"""torchrun whose ranks are forks of itself: what a command imports is imported once a launch, not once a rank.

    python tests/forked_torchrun.py --standalone --nproc_per_node=3 example.py --prompts ...

Agent, signals, process groups and reports are torchrun's own. A rank differs from one that torchrun starts in two
ways: its interpreter has imported torch and the commands already, and its name is `rank N`, since /proc shows the
environment of the process that it was forked from.
"""

import atexit
import importlib
import io
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import torch
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

IMPORTED = (
    "llama.commands.complete", "llama.commands.tune", "llama.generation.command", "llama.finetuning.trainer",
    "torch.fx.experimental.symbolic_shapes",
)  # fmt: skip


class Fork(subprocess.Popen):
    """`python -u SCRIPT WORD ...` in a fork of this process and a session of its own."""

    def _execute_child(self, args: Any, *_: Any, **__: Any) -> None:
        interpreter, unbuffered, *words = args
        assert (interpreter, unbuffered) == (sys.executable, "-u")
        self.pid = os.fork()
        if not self.pid:
            become(words, self.environment)
        self._child_created = True

    def __init__(self, args: Any, env: dict[str, str], **_: Any) -> None:
        self.environment = env
        super().__init__(args)


def become(words: list[str], environment: dict[str, str]) -> None:
    """Run the script in this forked process as a fresh interpreter would, and leave with its exit code."""
    os.setsid()
    atexit._clear()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    Path("/proc/self/comm").write_text(f"rank {environment['RANK']}")
    if "OMP_NUM_THREADS" in environment:  # torchrun sets it for several ranks
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8")
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, "w", closefd=False), "utf-8", errors, write_through=True)
        for number, errors in ((1, "strict"), (2, "backslashreplace"))
    )
    sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
    code = 1
    try:
        runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    subprocess_handler.Popen = Fork
    run.main()
