"""Ranks that are killed, signals from a person, and a prompt loop that waits."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launch import Command, Outcome
from support import hf_model, sentencepiece_model, write_meta

from llama.kernels import shared

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")]

LONG = ("--prompts", "the quick", "--stream", "--max_seq_len", 100_000, "--temperature", 2.0, "--top_p", 1)
LOADED = "parameters, "


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ckpts")
    sentencepiece_model(folder)
    return write_meta(folder / "model", hf_model("2"))


# Waits in a phase, as ranks do that have read their shard while others still read theirs.
LOADING = """
import time
import torch
from llama import env
from llama.cli import run
from llama.env import notice
from llama.parallel import groups

def main(slow: int) -> None:
    with groups.phase("load"):
        notice("parameters, ")
        if env.rank() == slow:
            time.sleep(100)

run(main)
"""


def kill(command: Command, victim: int | None, number: int, after: str, before: Callable[[], None]) -> Outcome:
    """Send a signal to a rank, or to torchrun (None), once the line `after` has come."""
    command.wait_for_line(after)
    before()
    workers = command.workers()
    assert len(workers) == command.ranks
    if victim is None:
        command.process.send_signal(number)
    else:
        workers[victim].send_signal(number)
    assert command.gone_within(25), "survivors must be gone within 30 s"
    return command.finish()


def assert_names(outcome: Outcome, lost: int, ranks: int) -> None:
    assert outcome.code == 1
    assert sorted(outcome.rank_codes) == [-9] + [2] * (ranks - 1)
    (line,) = outcome.errors
    assert line.startswith(f"error: rank {lost} was lost; if it was killed (SIGKILL")
    assert "memory" in line
    assert not outcome.has_our_traceback


@pytest.mark.parametrize(("slow", "victim"), [(1, 0), (0, 2)])
def test_a_rank_killed_while_others_wait_for_the_end_of_loading(tmp_path: Path, slow: int, victim: int) -> None:
    script = tmp_path / "loading.py"
    script.write_text(LOADING)
    with Command(["--slow", slow], 3, script, forked=True) as command:
        assert_names(kill(command, victim, signal.SIGKILL, LOADED, lambda: time.sleep(0.5)), victim, 3)


@pytest.mark.parametrize(("victim", "forked"), [(0, False), (1, True)])
def test_a_rank_killed_while_generating(ckpt: Path, victim: int, forked: bool) -> None:
    with Command(["--ckpt_dir", ckpt, *LONG], 3, forked=forked) as command:
        assert_names(kill(command, victim, signal.SIGKILL, LOADED, lambda: time.sleep(1)), victim, 3)


# Has the ranks share memory, as large models do.
SHARING = """
from llama.commands.complete import main
from llama import runtime
from llama.cli import run
from llama.env import notice
from llama.parallel import groups

def share(self):
    ranks = groups.share_memory()
    notice("memory is shared" if ranks.segment is not None else "memory is not shared")
    return ranks

runtime.Opened.prepare_kernels = share
run(main)
"""


@pytest.mark.parametrize(("victim", "number"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (None, signal.SIGINT)])
def test_ranks_that_share_memory_end_together(ckpt: Path, tmp_path: Path, victim: int | None, number: int) -> None:
    if not shared.available():
        pytest.skip("needs Linux and a C++ compiler")
    script = tmp_path / "sharing.py"
    script.write_text(SHARING)
    with Command(["--ckpt_dir", ckpt, *LONG], 3, script, forked=True) as command:
        command.wait_for_line("memory is shared")
        outcome = kill(command, victim, number, LOADED, lambda: time.sleep(1))
    if victim is not None:
        assert_names(outcome, victim, 3)
    else:
        assert (outcome.errors, outcome.err.count("interrupted\n")) == ([], 1)
        assert not outcome.has_our_traceback


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_while_waiting_for_a_prompt(ckpt: Path, victim: int) -> None:
    with Command(["--ckpt_dir", ckpt, "--interactive"], 2, forked=True, stdin=subprocess.PIPE) as command:
        assert_names(kill(command, victim, signal.SIGKILL, "type a prompt", lambda: time.sleep(0.5)), victim, 2)


@pytest.mark.parametrize(("number", "idle"), [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)])
def test_a_person_ends_it_and_nobody_is_said_to_be_lost(ckpt: Path, number: int, idle: bool) -> None:
    words = ("--interactive",) if idle else LONG
    with Command(["--ckpt_dir", ckpt, *words], 2, forked=True, stdin=subprocess.PIPE) as command:
        outcome = kill(command, None, number, LOADED, lambda: time.sleep(1))
    assert outcome.code != 0
    assert outcome.errors == []
    assert outcome.err.count("interrupted\n") == (number == signal.SIGINT)
    # torchrun reports the signal with a traceback of its own.
    assert not outcome.has_our_traceback


def test_ctrl_c_without_torchrun(ckpt: Path) -> None:
    with Command(["--ckpt_dir", ckpt, "--interactive"], stdin=subprocess.PIPE) as command:
        command.wait_for_line("type a prompt")
        time.sleep(0.3)
        command.process.send_signal(signal.SIGINT)
        outcome = command.finish()
    assert (outcome.code, outcome.err) == (130, "interrupted\n")


# -- the prompt loop -------------------------------------------------------------------------------

# Groups that ask for no timeout of their own get 2 s instead of half an hour; set before anything is imported, so
# that the ranks of this command are no forks.
IMPATIENT = """
from datetime import timedelta
from torch.distributed import distributed_c10d
distributed_c10d.default_pg_timeout = timedelta(seconds=2)
from llama.commands.complete import main
from llama.cli import run
run(main)
"""


def test_the_prompt_loop_waits_goes_on_after_an_error_and_ends(ckpt: Path, tmp_path: Path) -> None:
    script, answers = tmp_path / "impatient.py", tmp_path / "answers.json"
    script.write_text(IMPATIENT)
    words = ["--ckpt_dir", ckpt, "--interactive", "--max_seq_len", 40, "--temperature", 0, "--output_json", answers]
    with Command(words, 2, script, stdin=subprocess.PIPE, bufsize=1) as command:
        command.wait_for_line("type a prompt")
        time.sleep(5)
        stdin = command.process.stdin
        assert stdin is not None
        stdin.write("the quick\n\n")
        stdin.write("fox " * 60 + "\n")
        stdin.write("Hello, world # 1e3\n")
        outcome = command.finish("exit\nnot read\n")
    assert outcome.code == 0, outcome.err
    (told,) = outcome.errors
    assert told.startswith("error: prompt 0 has ")
    assert "max_seq_len is 40" in told
    assert outcome.err.count("tokens/s") == 2
    assert "Traceback" not in outcome.err
    assert answers.read_text(encoding="utf-8").count('"prompt"') == 2


@pytest.mark.parametrize("ranks", [None, 2])
def test_the_prompt_loop_at_a_terminal(ckpt: Path, ranks: int | None) -> None:
    """A terminal as stdin, stdout and stderr, ended by its end-of-file key."""
    import pty

    ours, theirs = pty.openpty()
    options: dict[str, Any] = {"forked": True, "stdin": theirs, "stdout": theirs, "stderr": theirs}
    with Command(["--ckpt_dir", ckpt, "--interactive", "--max_gen_len", 3], ranks, **options) as command:
        os.close(theirs)
        said = read_on(ours, "", "Ctrl-D ends")
        said = read_on(ours, said, "> ")
        os.write(ours, b"the quick\n")
        said = read_on(ours, said, "> ", times=2)
        os.write(ours, b"\x04")
        said = read_on(ours, said, "peak memory")
        assert command.process.wait(120) == 0, said
    os.close(ours)
    assert "error" not in said


def read_on(terminal: int, said: str, text: str, times: int = 1) -> str:
    """What the terminal has shown once `text` stands there so often after the invitation."""
    end = time.monotonic() + 120
    while said.partition("type a prompt")[2].count(text) < times:
        ready, _, _ = select.select([terminal], [], [], max(0.0, end - time.monotonic()))
        assert ready, said
        said += os.read(terminal, 4096).decode(errors="replace")
    return said


# -- listening -------------------------------------------------------------------------------------

# A forked child, such as a data loader's worker, is told to end; the rank itself goes on.
FORKING = """
import os, signal, time
from llama import env
from llama.cli import run
from llama.parallel import groups

def main() -> None:
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    time.sleep(0.3)
    with groups.phase("after"):
        print(f"child {code}", flush=True)

run(main)
"""


def test_ending_a_forked_child_does_not_end_the_rank(tmp_path: Path) -> None:
    script = tmp_path / "forking.py"
    script.write_text(FORKING)
    with Command([], 2, script, forked=True) as command:
        outcome = command.finish()
    assert outcome.code == 0, outcome.err
    assert outcome.out.count(f"child {-signal.SIGTERM}") == 2
