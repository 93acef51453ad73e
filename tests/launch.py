"""The real command, started as a person starts it: by torchrun or by plain python."""

from __future__ import annotations

import functools
import json
import os
import select
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
FORKED_TORCHRUN = Path(__file__).parent / "forked_torchrun.py"
FORKED_TORCHRUN_WORKS = sys.platform == "linux"  # it names its ranks in /proc


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
        forked: whether the ranks are forks of torchrun, which start in a third of the time: for what a command does
            once it runs. That it starts at all is for a plain one to show.
        options: of `subprocess.Popen`.
    """

    def __init__(
        self,
        words: Sequence[object],
        ranks: int | None = None,
        script: Path = EXAMPLE,
        forked: bool = False,
        **options: object,
    ) -> None:
        launcher = [sys.executable]
        self.forked = forked and ranks is not None and FORKED_TORCHRUN_WORKS
        if ranks is not None:
            # --standalone takes a free port: several commands may run at a time.
            torchrun = [str(FORKED_TORCHRUN)] if self.forked else ["-m", "torch.distributed.run"]
            launcher += [*torchrun, "--standalone", f"--nproc_per_node={ranks}"]
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
                rank = child.name().removeprefix("rank ") if self.forked else child.environ().get("RANK", "")
                if rank.isdecimal():
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


# Runs commands in forks of a process that has imported what their scripts import; stdin is empty. A line asks, and a
# line answers.
FORKING = """
import json, os, runpy, sys, tempfile, traceback
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
imported = set()

def run(words, cwd, environment):
    script, (out, err) = words[0], (tempfile.TemporaryFile(), tempfile.TemporaryFile())
    sys.path[0] = os.path.dirname(script)
    if script not in imported:
        runpy.run_path(script, run_name="imported")
        imported.add(script)
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        sys.stdin = open(0)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        sys.argv = words
        runpy.run_path(script, run_name="__main__")
        sys.exit()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = []
    for file in (out, err):
        file.seek(0)
        texts.append(file.read().decode())
    return [code, *texts]

while line := sys.stdin.readline():
    asked = json.loads(line)
    try:
        told = {name: run(words, *asked["place"]) for name, words in asked["commands"].items()}
    except Exception:
        told = traceback.format_exc()
    print(json.dumps(told), file=answers)
"""


@functools.cache
def _forker() -> subprocess.Popen[str]:
    """Start the process that commands are forked from, once for all tests; it ends with this one."""
    return subprocess.Popen(
        [sys.executable, "-c", FORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        encoding="utf-8", env=environment(), start_new_session=True,
    )  # fmt: skip


def run_forked(commands: Mapping[str, Sequence[object]], cwd: Path | None = None, **changes: str) -> dict[str, Outcome]:
    """Run commands, [script, flag, ...], one after another in forks of one process, which imports torch once.

    For what a command says and how it leaves; that it starts at all is for `run_command` to show.
    """
    forker = _forker()
    assert forker.stdin is not None
    assert forker.stdout is not None
    told = {name: list(map(str, words)) for name, words in commands.items()}
    place = str(cwd or Path.cwd()), environment(**changes)
    forker.stdin.write(json.dumps({"commands": told, "place": place}) + "\n")
    ready, _, _ = select.select([forker.stdout], [], [], TIMEOUT_S)
    outcomes = json.loads(forker.stdout.readline()) if ready else f"no answer within {TIMEOUT_S} s"
    if isinstance(outcomes, str):
        raise AssertionError(outcomes)
    return {name: Outcome(*outcome) for name, outcome in outcomes.items()}
