"""The real command, started as a person starts it: by torchrun or by plain python."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "example.py"
TIMEOUT_S = 300


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines that our one voice said."""
        return [line for line in self.err.splitlines() if "error: " in line]

    @property
    def rank_codes(self) -> list[int]:
        """Exit codes in torchrun's report: of every rank that failed."""
        lines = [line.split() for line in self.err.splitlines() if line.strip().startswith("exitcode  :")]
        return [int(words[2]) for words in lines]

    @property
    def has_our_traceback(self) -> bool:
        """Whether a file of ours stands in a traceback; torchrun prints one of its own."""
        frames = [line for line in self.err.splitlines() if line.strip().startswith('File "')]
        return any(str(ROOT / "llama") in line or "example.py" in line for line in frames)


def environment(**changes: str) -> dict[str, str]:
    """That of this process, without what torchrun or a pool of ranks may have left there."""
    strangers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in strangers}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return kept | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"} | changes


def _heed_ctrl_c() -> None:
    """In the child: a shell that runs tests in the background has its children ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Command:
    """A running command; as a context it leaves no process behind.

    Args:
        words: the script's flags.
        ranks: of torchrun; None for plain python.
        script: what to run.
        options: of `subprocess.Popen`.
    """

    def __init__(
        self, words: Sequence[object], ranks: int | None = None, script: Path = EXAMPLE, **options: object
    ) -> None:
        launcher = [sys.executable]
        if ranks is not None:
            # --standalone takes a free port: several commands may run at a time.
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        self.ranks, self.seen = ranks, set[psutil.Process]()
        self.process = subprocess.Popen(
            [*launcher, str(script), *map(str, words)],
            **{
                "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True,
                "encoding": "utf-8", "env": environment(), "start_new_session": True, "preexec_fn": _heed_ctrl_c,
                **options,
            },
        )  # fmt: skip

    def __enter__(self) -> Command:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.workers()
        for process in [*self.seen, psutil.Process(self.process.pid)] if self.process.poll() is None else self.seen:
            if process.is_running():
                process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def workers(self) -> dict[int, psutil.Process]:
        """The processes of the ranks that run now, by rank."""
        found = {}
        try:
            for child in psutil.Process(self.process.pid).children():
                rank = child.environ().get("RANK")
                if rank is not None:
                    found[int(rank)] = child
                    self.seen.add(child)
        except psutil.Error:
            pass
        return found

    def wait_for_line(self, text: str, stream: str = "stderr") -> None:
        """Read a stream up to the line that holds `text`."""
        lines = []
        for line in getattr(self.process, stream):
            lines.append(line)
            if text in line:
                return
        raise AssertionError(f"{stream} ended without {text!r}: {''.join(lines)}")

    def finish(self, stdin: str | None = None, timeout: float = TIMEOUT_S) -> Outcome:
        """Wait for its end; what was read before is not in the outcome."""
        self.workers()
        out, err = self.process.communicate(stdin, timeout=timeout)
        return Outcome(self.process.returncode, out or "", err or "")

    def gone_within(self, seconds: float) -> bool:
        """Whether every rank that was seen is gone by then."""
        end = time.monotonic() + seconds
        while any(_runs(process) for process in self.seen):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def run_command(
    words: Sequence[object], ranks: int | None = None, stdin: str | None = None, **options: object
) -> Outcome:
    """Run the command to its end."""
    if stdin is not None:
        options["stdin"] = subprocess.PIPE
    with Command(words, ranks, **options) as command:
        return command.finish(stdin)


# Runs every command in a fork of a process that has imported what the scripts import; stdin is empty.
FORKING = """
import json, os, runpy, sys, tempfile
commands = json.load(sys.stdin)
for script in dict.fromkeys(script for script, *_ in commands.values()):
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name="imported")
outcomes = {}
for name, words in commands.items():
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    child = os.fork()
    if not child:
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
        sys.exit()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = []
    for file in (out, err):
        file.seek(0)
        texts.append(file.read().decode())
    outcomes[name] = [code, *texts]
print(json.dumps(outcomes))
"""


def run_forked(commands: Mapping[str, Sequence[object]], cwd: Path | None = None, **changes: str) -> dict[str, Outcome]:
    """Run commands of one process, [script, flag, ...], one after another; torch is imported once for all of them.

    For what a command says and how it leaves; that it starts at all is for `run_command` to show.
    """
    told = json.dumps({name: list(map(str, words)) for name, words in commands.items()})
    driver = subprocess.run(
        [sys.executable, "-c", FORKING], input=told, capture_output=True, text=True, cwd=cwd,
        env=environment(**changes), timeout=TIMEOUT_S,
    )  # fmt: skip
    if driver.returncode:
        raise AssertionError(driver.stderr)
    return {name: Outcome(*outcome) for name, outcome in json.loads(driver.stdout).items()}
