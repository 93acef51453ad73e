"""One way to start every command: flags checked before anything runs, errors told by one voice.

Fire runs `main` before it complains of an unknown flag, and guesses what a text means (`Hello, world`
becomes a tuple). So argv is checked against `main`'s signature first and handed on in one spelling,
and every value reaches `main` as its annotation says.
"""

from __future__ import annotations

import difflib
import inspect
import io
import itertools
import sys
import traceback
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import fire
import torch
from fire import docstrings
from fire.decorators import SetParseFns

from llama import env
from llama.env import is_speaker
from llama.errors import LlamaError, UsageError
from llama.parallel import groups, store
from llama.parallel.leaving import INTERRUPTED, leave, listen

HELP = ("--help", "-h")

Parser = Callable[[str], Any]


def run(main: Callable[..., None], argv: Sequence[str] | None = None, **commands: Callable[..., None]) -> None:
    """Run `main` with the flags of the command line; leave with code 2 and one line on a user's mistake.

    Args:
        main: a typed function, each parameter a flag of its name; its docstring is the help.
        argv: the flags; None for those of this process.
        commands: other functions by the word that asks for them, as in `split_model.py verify DIR`; the words
            that follow it are their parameters in order.
    """
    try:
        words = sys.argv[1:] if argv is None else argv
        if words and words[0] in commands:
            main, words = commands[words[0]], words[1:]
            words = name_words(main, words)
        _run(main, words)
    except (Exception, KeyboardInterrupt) as error:
        _give_up(error)


def _run(main: Callable[..., None], argv: Sequence[str]) -> None:
    for out in (sys.stdout, sys.stderr):
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors="backslashreplace")  # a model may say what a terminal cannot show
    listen()
    with groups.phase("flags"):
        parsers = _parsers(main)
        command = normalise(argv, parsers, _required(main))
    if command is None:
        if is_speaker():
            print(help_text(main), flush=True)
        return
    fire.Fire(SetParseFns(**parsers)(main), command=command)
    groups.stop()


def name_words(main: Callable[..., None], words: Sequence[str], most: int | None = None) -> list[str]:
    """Leading words that are no flags, `most` at most, as flags: the first is `main`'s first parameter, and so on."""
    parameters = list(inspect.signature(main).parameters)[:most]
    named = [
        f"--{name}={word}"
        for name, word in zip(parameters, itertools.takewhile(lambda w: not w.startswith("-"), words), strict=False)
    ]
    return [*named, *words[len(named) :]]


def _give_up(error: BaseException) -> NoReturn:
    """Leave, with one line for what a person can mend and a traceback for a mistake of ours."""
    if isinstance(error, KeyboardInterrupt):
        leave("interrupted", INTERRUPTED)
    if isinstance(error, BrokenPipeError):  # such as `| head`: nobody listens any more
        leave(code=1)
    if store.is_lost_peer(error):
        leave(f"error: {store.lost_message(patience=1.0)}")
    if isinstance(error, LlamaError):
        leave(f"error: {error}")
    if _is_out_of_memory(error):
        what = ". ".join(str(error).split(". ")[:2])
        leave(
            f"error: rank {env.rank()} is out of memory ({what}): use more ranks, a smaller --max_batch_size "
            "or --max_seq_len, or a smaller --dtype",
            at_once=True,
        )
    traceback.print_exception(error)
    leave(code=1, at_once=True)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def help_text(main: Callable[..., None]) -> str:
    """What `--help` prints: the docstring of `main`, one line a flag."""
    doc = docstrings.parse(inspect.getdoc(main))
    told = {entry.name: entry.description for entry in doc.args or ()}
    lines = [doc.summary, "", "Flags, as --name value or --name=value:", ""]
    for name, parameter in inspect.signature(main).parameters.items():
        hidden = any(parameter.default is value for value in (None, False, inspect.Parameter.empty))
        default = "" if hidden else f" [{parameter.default}]"
        lines.append(f"  --{name:<16} {told.get(name, '')}{default}")
    return "\n".join(lines)


# -- flags -----------------------------------------------------------------------------------------


def normalise(argv: Sequence[str], parsers: Mapping[str, Parser], required: Sequence[str] = ()) -> list[str] | None:
    """The command line as `--name=value` words, every one of them checked; None where it asks for help.

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
        if words[0] in HELP:
            return None
        name, value = _take_flag(words, parsers)
        if name in values:
            raise UsageError(f"--{name} is given twice")
        _check(name, value, parsers[name])
        values[name] = value
    missing = [f"--{name}" for name in required if name not in values]
    if missing:
        raise UsageError(f"{', '.join(missing)} must be given")
    return [f"--{name}={value}" for name, value in values.items()]


def _take_flag(words: list[str], parsers: Mapping[str, Parser]) -> tuple[str, str]:
    """The first flag of `words`, which loses it, and its value's text."""
    word = words.pop(0)
    if not word.startswith("--") or word == "--":
        raise UsageError(f"stray word {word!r}: every setting is a flag, such as --name value")
    name, has_value, value = word[2:].partition("=")
    name = name.replace("-", "_")
    if not has_value and name not in parsers and parsers.get(name.removeprefix("no")) is parse_bool:
        return name.removeprefix("no"), "False"
    if name not in parsers:
        raise UsageError(_unknown(name, parsers))
    if has_value:
        return name, value
    if parsers[name] is parse_bool and not (words and words[0].lower() in _BOOLEANS):
        return name, "True"
    if not words:
        raise UsageError(f"--{name} needs a value, such as --{name} value")
    if words[0].startswith("--"):
        raise UsageError(f"--{name} needs a value; if {words[0]!r} is it, write --{name}={words[0]}")
    return name, words.pop(0)


def _unknown(name: str, parsers: Mapping[str, Parser]) -> str:
    close = difflib.get_close_matches(name, parsers, n=1)
    hint = f"did you mean --{close[0]}?" if close else f"known are {', '.join(f'--{flag}' for flag in parsers)}"
    return f"unknown flag --{name}: {hint}"


def _required(main: Callable[..., None]) -> list[str]:
    parameters = inspect.signature(main).parameters.values()
    return [parameter.name for parameter in parameters if parameter.default is inspect.Parameter.empty]


def _parsers(main: Callable[..., None]) -> dict[str, Parser]:
    hints = typing.get_type_hints(main)
    return {name: _parser(hints[name]) for name in inspect.signature(main).parameters}


def _check(name: str, value: str, parser: Parser) -> None:
    try:
        parser(value)
    except ValueError as error:
        raise UsageError(f"--{name} takes {error}, not {value!r}") from None


_BOOLEANS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}


def parse_bool(text: str) -> bool:
    """`true`, `false`, `yes`, `no`, `1` or `0`, in any case."""
    if text.lower() not in _BOOLEANS:
        raise ValueError("true, false, yes or no")
    return _BOOLEANS[text.lower()]


def _parser(hint: Any) -> Parser:
    """How a flag's text becomes the value that its annotation asks for; a misfit's error says what is asked for."""
    kinds = typing.get_args(hint) or (hint,)
    kind = next(kind for kind in kinds if kind is not type(None))
    if kind in (bool, str):
        return parse_bool if kind is bool else str
    what = {int: "a whole number", float: "a number"}[kind]

    def parse(text: str) -> Any:
        if type(None) in kinds and text.lower() == "none":
            return None
        try:
            return kind(text)
        except ValueError:
            raise ValueError(what) from None

    return parse
