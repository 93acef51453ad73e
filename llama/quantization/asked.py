"""What a person asks of a model's precision, and what becomes of it for a checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from llama.errors import QuantizationError
from llama.quantization.scheme import NONE, Scheme

DEFAULT_GROUP_SIZE = 32


@dataclass(frozen=True)
class Asked:
    """The flags `--quantize` and its kin; None where nothing was said.

    Args:
        quantize: "int8" or "int4", of the linears.
        group_size: of int4's scales: 32, 64 or 128; None for 32.
        quantize_output: "int8", "int4" or "none", of the output layer; None for "int8".
        quantize_embedding: the same of the embedding; None for "none". One that is the output layer follows that.
    """

    quantize: str | None = None
    group_size: int | None = None
    quantize_output: str | None = None
    quantize_embedding: str | None = None

    @property
    def words(self) -> list[str]:
        """The flags as a command line has them."""
        return [word for name, value in vars(self).items() if value is not None for word in (f"--{name}", str(value))]

    @classmethod
    def of(cls, scheme: Scheme) -> Asked:
        """The fewest flags that ask for a scheme."""
        held = scheme.to_json()
        size = held["group_size"] or DEFAULT_GROUP_SIZE
        return cls(
            held["type"],
            None if size == DEFAULT_GROUP_SIZE else size,
            None if held["output"] == "int8" else held["output"],
            None if held["embedding"] == NONE else held["embedding"],
        )

    def scheme(self) -> Scheme | None:
        """For a checkpoint that is not quantized.

        Raises:
            QuantizationError: for what does not exist, or has nothing to apply to.
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
        """The flags that ask for something else than `stored`."""
        held = stored.to_json()
        named = {
            "quantize": held["type"],
            "group_size": held["group_size"],
            "quantize_output": held["output"],
            "quantize_embedding": held["embedding"],
        }
        return [f"--{name} {value}" for name, value in vars(self).items() if value not in (None, named[name])]


def settle(asked: Scheme | Asked | str | None, stored: Scheme | None, path: Path) -> Scheme | None:
    """How a checkpoint's weights are going to be held.

    Args:
        asked: a word such as "int8" means the linears' kind and nothing else.
        stored: how the checkpoint holds them; None where it is not quantized.
        path: of the checkpoint, for messages.

    Raises:
        QuantizationError: for what does not exist, or is not what is stored.
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
