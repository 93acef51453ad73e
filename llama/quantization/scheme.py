"""Schemes of quantization: the form of each tensor, as the flags ask for it and as checkpoints store it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.config import ModelArgs
from llama.errors import QuantizationError
from llama.kernels.formats import INT8, KINDS, Form

NONE = "none"
DEFAULT_GROUP_SIZE = 32
EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"


@dataclass(frozen=True)
class Scheme:
    """The form of each tensor of a quantized model.

    Args:
        linears: form of the attention's and the FFN's matrices.
        output: of the output layer, and of the embedding where the two are one; None keeps it.
        embedding: of an embedding of its own; None keeps it.
        calibrated: true where roundings were chosen on a text (GPTQ) rather than to the nearest.
    """

    linears: Form
    output: Form | None
    embedding: Form | None = None
    calibrated: bool = False

    @classmethod
    def create(
        cls,
        kind: str,
        group_size: int = DEFAULT_GROUP_SIZE,
        output: str | None = None,
        embedding: str = NONE,
        calibrated: bool = False,
    ) -> Scheme:
        """Return the scheme that a person asks for.

        Args:
            kind: "int8" or "int4".
            group_size: of int4's scales.
            output: "int8", "int4" or "none" for the output layer; None for int8, which costs next to no accuracy.
            embedding: "int8", "int4" or "none" for an embedding that is not the output layer.
            calibrated: see the class.

        Raises:
            QuantizationError: for another word, named.
        """

        def form(word: str, flag: str) -> Form | None:
            if word not in (*KINDS, NONE):
                raise QuantizationError(f"{flag} {word!r} is not one of {', '.join((*KINDS, NONE))}")
            return None if word == NONE else INT8 if word == "int8" else Form("int4", group_size)

        if kind not in KINDS:
            raise QuantizationError(f"--quantize {kind!r} is not one of {', '.join(KINDS)}")
        linears = form(kind, "--quantize")
        assert linears is not None
        return cls(
            linears, form(output or "int8", "--quantize_output"), form(embedding, "--quantize_embedding"), calibrated
        )

    def form(self, name: str, args: ModelArgs) -> Form | None:
        """Return the form of a matrix by Meta's name; None for a matrix of numbers."""
        if name == OUTPUT or (name == EMBEDDING and args.tied):
            return self.output
        if name == EMBEDDING:
            return self.embedding
        return self.linears

    @property
    def block(self) -> int | None:
        """Columns of the FFN that must stay on one rank; None where the FFN may be cut anywhere."""
        return self.linears.group_size or None

    @property
    def group_size(self) -> int:
        """Numbers of an int4 form that share a scale; 0 where nothing is int4."""
        return max((form.group_size for form in (self.linears, self.output, self.embedding) if form), default=0)

    def check(self, args: ModelArgs) -> None:
        """Refuse a model whose rows do not fall into whole groups, wherever attention may be cut.

        Raises:
            QuantizationError: naming both numbers and a group size that would fit.
        """
        self.linears.check_columns(args.ffn_dim, "the FFN (w2)")
        self.linears.check_columns(args.n_heads * args.head_dim, "attention's output (wo)")
        for form in (self.linears, self.output, self.embedding):
            if form is not None:
                form.check_columns(args.dim, "the model")

    def words(self) -> str:
        """Return such as "int4 in groups of 32, output int8"."""
        parts = [_words(self.linears), f"output {_words(self.output)}"]
        if self.embedding is not None:
            parts.append(f"embedding {_words(self.embedding)}")
        if self.calibrated:
            parts.append("calibrated")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return the value of "quantization" in `params.json`."""
        return {
            "type": self.linears.kind,
            "group_size": self.group_size,
            "output": NONE if self.output is None else self.output.kind,
            "embedding": NONE if self.embedding is None else self.embedding.kind,
            "calibrated": self.calibrated,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Scheme:
        """Return the scheme that `to_json` wrote.

        Raises:
            QuantizationError: for anything else.
        """
        keys = {"type", "group_size", "output", "embedding", "calibrated"}
        if not isinstance(content, Mapping) or set(content) != keys:
            raise QuantizationError(f"params.json: quantization must be an object of {', '.join(sorted(keys))}")
        return cls.create(
            content["type"],
            content["group_size"] or DEFAULT_GROUP_SIZE,
            content["output"],
            content["embedding"],
            content["calibrated"],
        )


def _words(form: Form | None) -> str:
    if form is None:
        return "kept"
    return form.kind if not form.group_size else f"{form.kind} in groups of {form.group_size}"


# -- flags -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """Integers in place of weights.

    An embedding that is the output layer is held as the output layer is. The lines below are shown by `--help`.

    Args:
        quantize: hold the weights as int8 or int4; by default as the checkpoint holds them.
        group_size: weights that share a scale in int4: 32, 64 or 128; by default 32.
        quantize_output: int8, int4 or none, for the output layer; by default int8.
        quantize_embedding: int8, int4 or none, for an embedding that is not the output layer; by default none.
    """

    quantize: str | None = None
    group_size: int | None = None
    quantize_output: str | None = None
    quantize_embedding: str | None = None

    @property
    def words(self) -> list[str]:
        """The flags that were given, as words of a command line."""
        return [word for name, value in vars(self).items() if value is not None for word in (f"--{name}", str(value))]

    @classmethod
    def of(cls, scheme: Scheme) -> Asked:
        """Return the fewest flags that ask for a scheme."""
        held = scheme.to_json()
        size = held["group_size"] or DEFAULT_GROUP_SIZE
        return cls(
            held["type"],
            None if size == DEFAULT_GROUP_SIZE else size,
            None if held["output"] == "int8" else held["output"],
            None if held["embedding"] == NONE else held["embedding"],
        )

    def scheme(self) -> Scheme | None:
        """Return the scheme for a checkpoint that is not quantized; None to leave its weights as they are.

        Raises:
            QuantizationError: for a form that does not exist, or a flag that applies to nothing.
        """
        if self.quantize is None:
            if self.words:
                raise QuantizationError(f"{self.words[0]} needs --quantize int8 or int4 beside it")
            return None
        size = DEFAULT_GROUP_SIZE if self.group_size is None else self.group_size
        scheme = Scheme.create(self.quantize, size, self.quantize_output, self.quantize_embedding or NONE)
        if self.group_size is not None and not scheme.group_size:
            raise QuantizationError(f"--group_size {self.group_size} is for int4, and nothing is int4: leave it out")
        return scheme

    def contradicts(self, stored: Scheme) -> list[str]:
        """Return the flags that ask for another scheme than `stored`."""
        held = stored.to_json()
        named = {
            "quantize": held["type"],
            "group_size": held["group_size"],
            "quantize_output": held["output"],
            "quantize_embedding": held["embedding"],
        }
        return [f"--{name} {value}" for name, value in vars(self).items() if value not in (None, named[name])]


def choose_scheme(asked: Scheme | Asked | str | None, stored: Scheme | None, path: Path) -> Scheme | None:
    """Return the scheme to run a checkpoint with; None for weights that are all numbers.

    Args:
        asked: a scheme, the flags, or the value of `--quantize` alone.
        stored: the checkpoint's own scheme; None where it is not quantized.
        path: of the checkpoint, for messages.

    Raises:
        QuantizationError: for a scheme that does not exist, or another than the stored one.
    """
    if isinstance(asked, Scheme):
        if stored is None or dataclasses.replace(asked, calibrated=stored.calibrated) == stored:
            return stored or asked
        others = [asked.words()]
    else:
        flags = asked if isinstance(asked, Asked) else Asked(asked)
        if stored is None:
            return flags.scheme()
        others = flags.contradicts(stored)
    if others:
        raise QuantizationError(
            f"{path} is quantized already ({stored.words()}): {', '.join(others)} needs the original checkpoint; "
            "to run this one as it is, leave that out"
        )
    return stored
