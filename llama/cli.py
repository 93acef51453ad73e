"""Start of every command: flags checked before anything runs, errors told in one line by one rank.

Fire runs `main` before it complains of an unknown flag, and guesses what a text means (`Hello, world`
becomes a tuple). So argv is checked against `main`'s flags first and handed on in one spelling,
and every value reaches `main` as its annotation says; `llama.flags` derives the flags of a `main`.
"""

from __future__ import annotations

import difflib
import io
import itertools
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import fire
import torch
from fire.decorators import SetParseFns

from llama import env
from llama.env import is_speaker
from llama.errors import LlamaError, UsageError
from llama.flags import BOOLEANS, REQUIRED, Flag, Parser, arguments_of, flags_of, parse_bool, signature_of, summary_of
from llama.parallel import groups, store
from llama.parallel.leaving import INTERRUPTED, leave, listen

HELP = ("--help", "-h")


def run(
    main: Callable[..., None], argv: Sequence[str] | None = None, n_words: int = 0, **commands: Callable[..., None]
) -> None:
    """Run `main` with the flags of the command line; leave with code 2 and one line on a user's mistake.

    Args:
        main: a typed function, each parameter a flag of its name; its docstring is the help. See `llama.flags`.
        argv: the flags; None for those of this process.
        n_words: leading words without a flag, at most, which are `main`'s first parameters.
        commands: other functions by the word that asks for them, as in `split_model.py verify DIR`; the words
            that follow it are their parameters in order.
    """
    try:
        words = sys.argv[1:] if argv is None else argv
        if words and words[0] in commands:
            main, words = commands[words[0]], words[1:]
            n_words = len(words)
        _run(main, name_words(main, words, n_words))
    except (Exception, KeyboardInterrupt) as error:
        _give_up(error)


def _run(main: Callable[..., None], argv: Sequence[str]) -> None:
    for out in (sys.stdout, sys.stderr):
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors="backslashreplace")  # a terminal may lack characters that a model writes
    listen()
    with groups.phase("flags"):
        flags = flags_of(main)
        command = normalise(argv, flags)
    if command is None:
        if is_speaker():
            print(help_text(main), flush=True)
        return

    def front(**typed: Any) -> None:
        with groups.phase("options"):
            arguments = arguments_of(main, typed)
        main(**arguments)

    front.__signature__ = signature_of(flags)  # type: ignore[attr-defined]  # Fire reads the flags there
    fire.Fire(SetParseFns(**{flag.name: flag.parser for flag in flags})(front), command=command)
    groups.stop()


def name_words(main: Callable[..., None], words: Sequence[str], most: int | None = None) -> list[str]:
    """Return `words` with up to `most` leading non-flags as flags: the first is `main`'s first parameter, and so on."""
    parameters = [flag.name for flag in flags_of(main)][:most]
    named = [
        f"--{name}={word}"
        for name, word in zip(parameters, itertools.takewhile(lambda w: not w.startswith("-"), words), strict=False)
    ]
    return [*named, *words[len(named) :]]


def _give_up(error: BaseException) -> NoReturn:
    """Leave, with one line for an error that a user can fix and a traceback for a bug of ours."""
    if isinstance(error, KeyboardInterrupt):
        leave("interrupted", INTERRUPTED)
    if isinstance(error, BrokenPipeError):  # such as `| head`: nobody reads any more
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
    """Return what `--help` prints: the summary of `main`, then its flags by group, one line a flag."""
    lines = [summary_of(main), "", "Flags, as --name value or --name=value:"]
    flags = flags_of(main)
    width = max((len(flag.name) for flag in flags), default=0)
    for group, members in itertools.groupby(flags, key=lambda flag: flag.group):
        lines += ["", f"{group}:"] if group else [""]
        for flag in members:
            is_hidden = any(flag.default is value for value in (None, False, REQUIRED)) or flag.default == ""
            lines.append(f"  --{flag.name:<{width}} {flag.told}{'' if is_hidden else f' [{flag.default}]'}")
    return "\n".join(lines)


# -- flags -----------------------------------------------------------------------------------------


def normalise(argv: Sequence[str], flags: Sequence[Flag]) -> list[str] | None:
    """Return the command line as `--name=value` words, every word checked; None where it asks for help.

    Args:
        argv: words as typed: `--name value`, `--name=value`, `--switch`, `--noswitch`; dashes and
            underscores are the same.
        flags: those that the command takes.

    Raises:
        UsageError: an unknown or repeated flag, a stray word, a missing or misshapen value.
    """
    parsers = {flag.name: flag.parser for flag in flags}
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
    missing = [f"--{flag.name}" for flag in flags if flag.is_required and flag.name not in values]
    if missing:
        raise UsageError(f"{', '.join(missing)} must be given")
    return [f"--{name}={value}" for name, value in values.items()]


def _take_flag(words: list[str], parsers: Mapping[str, Parser]) -> tuple[str, str]:
    """Take the first flag off `words`; return its name and the text of its value."""
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
    if parsers[name] is parse_bool and not (words and words[0].lower() in BOOLEANS):
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


def _check(name: str, value: str, parser: Parser) -> None:
    try:
        parser(value)
    except ValueError as error:
        raise UsageError(f"--{name} takes {error}, not {value!r}") from None
