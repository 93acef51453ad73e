"""Flags of a command, from the signature of its `main`: a parameter is a flag, a dataclass is a flag a field.

Options that several commands take are declared and documented once, as the fields of a dataclass:

    def main(ckpt_dir: str, sampling: Sampling = Sampling(temperature=0.8), options: RunOptions = RunOptions()) -> None:

takes `--ckpt_dir`, the fields of `Sampling` with the defaults of that instance, and the fields of `RunOptions`;
`main` receives the two dataclasses filled in. `Annotated[RunOptions, Without("threads")]` leaves fields out, `Only`
names those that are taken, and `Given[TrainSettings]` hands over the values that were typed, for defaults that depend
on other flags. Where the docstring of `main` describes such a flag, its text replaces that of the dataclass.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

from fire import docstrings

Parser = Callable[[str], Any]
Options = TypeVar("Options")
REQUIRED = inspect.Parameter.empty


class Without:
    """Fields of a dataclass that a command has no flags for."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def keeps(self, name: str) -> bool:
        """Return whether a field is a flag."""
        return name not in self.names


class Only(Without):
    """Fields of a dataclass that a command has flags for; the others keep their defaults."""

    def keeps(self, name: str) -> bool:
        """Return whether a field is a flag."""
        return name in self.names


@dataclass(frozen=True)
class Given(Generic[Options]):
    """The flags of a dataclass that were typed, for a command whose defaults depend on other flags.

    Args:
        kind: the dataclass.
        values: by the fields' names.
    """

    kind: type[Options]
    values: Mapping[str, Any]

    def make(self, **defaults: Any) -> Options:
        """Return the dataclass, filled from what was typed, then `defaults`, then its own defaults."""
        return self.kind(**{**defaults, **self.values})


@dataclass(frozen=True)
class Flag:
    """One flag.

    Args:
        name: without dashes.
        parser: turns its text into its value, or raises a ValueError that says what it takes.
        default: its value where it is not typed; `REQUIRED` where it must be.
        told: its help text, one line.
        group: title of its group in the help; empty for the command's own flags.
    """

    name: str
    parser: Parser
    default: Any
    told: str
    group: str = ""

    @property
    def is_required(self) -> bool:
        """True for a flag that must be typed."""
        return self.default is REQUIRED


def flags_of(main: Callable[..., None]) -> list[Flag]:
    """Return the flags of a typed function, its own first, then those of each dataclass in turn."""
    told = _told(main)
    own, spread = list[Flag](), list[Flag]()
    for parameter, place in _places(main):
        if place is None:
            hint = typing.get_type_hints(main)[parameter.name]
            own.append(Flag(parameter.name, _parser(hint), parameter.default, told.get(parameter.name, "")))
        else:
            spread += (dataclasses.replace(flag, told=told.get(flag.name, flag.told)) for flag in place.flags())
    return own + spread


def arguments_of(main: Callable[..., None], typed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments to call `main` with.

    Args:
        main: a typed function.
        typed: the values of the flags that were typed, by name; `main` and its dataclasses have the others' defaults.

    Raises:
        LlamaError: when a dataclass refuses a value.
    """
    arguments = {}
    for parameter, place in _places(main):
        if place is not None:
            arguments[parameter.name] = place.fill(typed)
        elif parameter.name in typed:
            arguments[parameter.name] = typed[parameter.name]
    return arguments


def signature_of(flags: Sequence[Flag]) -> inspect.Signature:
    """Return the signature of a function that takes every flag by its name."""
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature([inspect.Parameter(flag.name, kind, default=flag.default) for flag in flags])


def summary_of(described: Callable[..., Any]) -> str:
    """Return the first line of a docstring."""
    return docstrings.parse(inspect.getdoc(described)).summary or ""


def _told(described: Callable[..., Any]) -> dict[str, str]:
    """Return the texts of a docstring's `Args` by name; an entry may list several names."""
    arguments = docstrings.parse(inspect.getdoc(described)).args or ()
    return {name.strip(): entry.description for entry in arguments for name in entry.name.split(",")}


# -- dataclasses -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """A dataclass to be spread into flags, as a parameter of `main` or a field of another dataclass.

    Args:
        kind: the dataclass.
        default: an instance that brings the flags' defaults; None for the dataclass's own.
        choice: which of its fields are flags.
        as_given: whether `main` receives a `Given` rather than the dataclass.
    """

    kind: Any
    default: Any
    choice: Without = Without()
    as_given: bool = False

    def flags(self) -> list[Flag]:
        """Return one flag for each field, those of inner dataclasses last."""
        told, title = _told(self.kind), summary_of(self.kind).rstrip(".")
        hints = typing.get_type_hints(self.kind)
        own = [
            Flag(field.name, _parser(hints[field.name]), self._default(field), told.get(field.name, ""), title)
            for field, inner in self._fields()
            if inner is None
        ]
        return own + [flag for _, inner in self._fields() if inner is not None for flag in inner.flags()]

    def fill(self, typed: Mapping[str, Any]) -> Any:
        """Return the dataclass of the flags that were typed."""
        filled = {}
        for field, inner in self._fields():
            if inner is not None:
                filled[field.name] = inner.fill(typed)
            elif field.name in typed:
                filled[field.name] = typed[field.name]
        if self.as_given:
            return Given(self.kind, filled)
        return self.kind(**filled) if self.default is None else dataclasses.replace(self.default, **filled)

    def _fields(self) -> Iterator[tuple[dataclasses.Field[Any], _Place | None]]:
        """Yield the fields that are flags, each with its own place if the field is a dataclass, else None."""
        hints = typing.get_type_hints(self.kind, include_extras=True)
        for field in dataclasses.fields(self.kind):
            if field.init and self.choice.keeps(field.name):
                yield field, _place(hints[field.name], self._default(field))

    def _default(self, field: dataclasses.Field[Any]) -> Any:
        if self.default is not None:
            return getattr(self.default, field.name)
        if field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
        return REQUIRED if field.default is dataclasses.MISSING else field.default


def _places(main: Callable[..., None]) -> Iterator[tuple[inspect.Parameter, _Place | None]]:
    """Yield the parameters of `main`, each with its place if the parameter is a dataclass, else None."""
    hints = typing.get_type_hints(main, include_extras=True)
    for parameter in inspect.signature(main).parameters.values():
        default = None if parameter.default is REQUIRED else parameter.default
        yield parameter, _place(hints[parameter.name], default)


def _place(hint: Any, default: Any) -> _Place | None:
    """Return how an annotation is spread into flags; None for a flag by itself."""
    choice = Without()
    if typing.get_origin(hint) is Annotated:
        hint, *notes = typing.get_args(hint)
        choice = next((note for note in notes if isinstance(note, Without)), choice)
    if typing.get_origin(hint) is Given:
        return _Place(typing.get_args(hint)[0], None, choice, as_given=True)
    for kind in typing.get_args(hint) or (hint,):
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return _Place(kind, default if isinstance(default, kind) else None, choice)
    return None


# -- values ----------------------------------------------------------------------------------------


BOOLEANS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}


def parse_bool(text: str) -> bool:
    """Return the value of `true`, `false`, `yes`, `no`, `1` or `0`, in any case."""
    if text.lower() not in BOOLEANS:
        raise ValueError("true, false, yes or no")
    return BOOLEANS[text.lower()]


def _parser(hint: Any) -> Parser:
    """Return the parser of a flag's text for an annotation; of several types, a person types the first."""
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
