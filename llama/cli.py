"""One way to start every command: flags checked before anything runs, errors told by one voice.

Fire runs `main` before it complains of an unknown flag, and guesses what a text means (`Hello, world`
becomes a tuple). So argv is checked against `main`'s signature first and handed on in one spelling,
and every value reaches `main` as its annotation says.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import os
import signal
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import fire
import torch
from fire.decorators import SetParseFns

from llama import env
from llama.console import is_speaker
from llama.errors import LlamaError, RankLostError, UsageError
from llama.parallel import groups

EXIT_CODE = 2

Parser = Callable[[str], Any]


def run(main: Callable[..., None], argv: Sequence[str] | None = None) -> None:
    """Run `main` with the flags of the command line; leave with code 2 and one line on a user's mistake.

    Args:
        main: a typed function, each parameter a flag of its name; its docstring is the help.
        argv: the flags; None for those of this process.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with groups.phase("flags"):
            wants_help = any(word in ("--help", "-h") for word in argv)
            parsers = _parsers(main)
            command = ["--help"] if wants_help else normalise(argv, parsers, _required(main))
        if wants_help and not is_speaker():
            return
        with _fire_errors():
            fire.Fire(SetParseFns(**parsers)(main), command=command, name=os.path.basename(sys.argv[0]))
        groups.stop()
    except LlamaError as error:
        _fail(error)
    except KeyboardInterrupt:
        _leave("interrupted", 130)
    except BrokenPipeError:
        _leave("", 1)
    except torch.OutOfMemoryError as error:
        reason = str(error).split(".")[0]
        _fail(LlamaError(f"rank {env.rank()} is out of memory ({reason}): use more ranks, a smaller "
                         "--max_batch_size or --max_seq_len, or a smaller --dtype"), alone=True)  # fmt: skip
    except Exception as error:
        if not groups.is_lost_peer(error):
            raise
        _fail(RankLostError(groups.lost_message()), alone=not is_speaker())


@contextlib.contextmanager
def _fire_errors() -> Any:
    """Fire leaves with a report of its own after showing help; keep its code."""
    try:
        yield
    except fire.core.FireExit as leaving:
        sys.exit(leaving.code)


def _fail(error: LlamaError, alone: bool = False) -> NoReturn:
    """Print one line and leave with code 2: rank 0 for all of them, or this rank for itself alone."""
    if is_speaker() or alone or not groups.wait_for_speaker():
        print(f"error: {error}", file=sys.stderr)
    _leave("", EXIT_CODE)


def _leave(text: str, code: int) -> NoReturn:
    if text and is_speaker():
        print(text, file=sys.stderr)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    sys.stderr.flush()
    groups.announce_spoken()
    # Groups whose ranks have failed may wait for each other for ever when torn down in order.
    os._exit(code)


# -- flags -----------------------------------------------------------------------------------------


def normalise(argv: Sequence[str], parsers: dict[str, Parser], required: Sequence[str] = ()) -> list[str]:
    """The command line as `--name=value` words, every one of them checked.

    Args:
        argv: words as typed: `--name value`, `--name=value`, `--switch`, `--noswitch`; dashes and
            underscores are the same.
        parsers: of each flag; switches are those with `parse_bool`.
        required: flags that must be there.

    Raises:
        UsageError: an unknown or repeated flag, a stray word, a missing or misshapen value.
    """
    values: dict[str, str] = {}
    words = list(argv)
    while words:
        name, value = _take_flag(words, parsers)
        if name in values:
            raise UsageError(f"--{name} is given twice")
        parsers[name](value)
        values[name] = value
    missing = [f"--{name}" for name in required if name not in values]
    if missing:
        raise UsageError(f"{', '.join(missing)} must be given")
    return [f"--{name}={value}" for name, value in values.items()]


def _take_flag(words: list[str], parsers: dict[str, Parser]) -> tuple[str, str]:
    word = words.pop(0)
    if not word.startswith("--") or word == "--":
        raise UsageError(f"stray word {word!r}: every setting is a flag, such as --name value")
    name, has_value, value = word[2:].partition("=")
    name = name.replace("-", "_")
    is_switch = parsers.get(name) is parse_bool
    if name not in parsers and name.startswith("no") and parsers.get(name[2:]) is parse_bool and not has_value:
        return name[2:], "False"
    if name not in parsers:
        raise UsageError(_unknown(name, parsers))
    if has_value:
        return name, value
    if is_switch and not (words and words[0].lower() in _BOOLEANS):
        return name, "True"
    if not words or words[0].startswith("--"):
        raise UsageError(f"--{name} needs a value; write --{name}=--text for one that begins with dashes")
    return name, words.pop(0)


def _unknown(name: str, parsers: dict[str, Parser]) -> str:
    close = difflib.get_close_matches(name, parsers, n=1)
    hint = f"did you mean --{close[0]}?" if close else f"known are {', '.join(f'--{flag}' for flag in parsers)}"
    return f"unknown flag --{name}: {hint}"


def _required(main: Callable[..., None]) -> list[str]:
    parameters = inspect.signature(main).parameters.values()
    return [parameter.name for parameter in parameters if parameter.default is inspect.Parameter.empty]


def _parsers(main: Callable[..., None]) -> dict[str, Parser]:
    hints = typing.get_type_hints(main)
    return {name: _parser(name, hints[name]) for name in inspect.signature(main).parameters}


_BOOLEANS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}


def parse_bool(text: str) -> bool:
    """`true`, `false`, `yes`, `no`, `1` or `0`, in any case."""
    if text.lower() not in _BOOLEANS:
        raise UsageError(f"{text!r} is not one of true, false, yes, no")
    return _BOOLEANS[text.lower()]


def _parser(name: str, hint: Any) -> Parser:
    """How a flag's text becomes the value that its annotation asks for."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = next(kind for kind in kinds if kind is not type(None))
    if kind is bool:
        return parse_bool
    if kind is str:
        return str
    what = {int: "a whole number", float: "a number"}[kind]

    def parse(text: str) -> Any:
        if type(None) in kinds and text.lower() == "none":
            return None
        try:
            return kind(text)
        except ValueError:
            raise UsageError(f"--{name} takes {what}, not {text!r}") from None

    return parse
