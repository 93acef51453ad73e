"""What a person asks for, beside what a checkpoint holds."""

from pathlib import Path

import pytest

from llama.errors import QuantizationError
from llama.quantization.scheme import Asked, Scheme, choose_scheme

HERE = Path("ckpts/7B-int4")
STORED = Scheme.create("int4", 64, calibrated=True)


@pytest.mark.parametrize(
    ("asked", "scheme"),
    [
        (Asked(), None),
        (None, None),
        ("int8", Scheme.create("int8")),
        (Asked("int4"), Scheme.create("int4", 32, "int8", "none")),
        (Asked("int4", 128, "none", "int8"), Scheme.create("int4", 128, "none", "int8")),
        (Asked("int8", 64, "int4"), Scheme.create("int8", 64, "int4")),
        (Scheme.create("int4", 64), Scheme.create("int4", 64)),
    ],
)
def test_without_anything_stored(asked: Asked | str | Scheme | None, scheme: Scheme | None) -> None:
    assert choose_scheme(asked, None, HERE) == scheme


@pytest.mark.parametrize(
    "asked",
    [
        None, "int4", Asked(), Asked("int4", 64), Asked(None, 64), Asked(quantize_output="int8"),
        Asked("int4", 64, "int8", "none"), Scheme.create("int4", 64),
    ],
)  # fmt: skip
def test_what_is_stored_may_be_asked_for(asked: Asked | str | Scheme | None) -> None:
    assert choose_scheme(asked, STORED, HERE) == STORED


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("int8", "--quantize int8"),
        (Asked("int4", 32), "--group_size 32"),
        (Asked(None, 128), "--group_size 128"),
        (Asked(quantize_output="none"), "--quantize_output none"),
        (Asked(quantize_embedding="int4"), "--quantize_embedding int4"),
        (Asked("int8", 64, "none"), "--quantize int8, --quantize_output none"),
        (Scheme.create("int4", 32), "int4 in groups of 32, output int8"),
    ],
)
def test_anything_else_needs_the_original(asked: Asked | str | Scheme, words: str) -> None:
    held = r"\(int4 in groups of 64, output int8, calibrated\)"
    expected = rf"ckpts/7B-int4 is quantized already {held}: {words} needs the original"
    with pytest.raises(QuantizationError, match=expected):
        choose_scheme(asked, STORED, HERE)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("int3", "--quantize 'int3' is not one of int8, int4"),
        (Asked("int4", 48), "group_size 48 is not one of 32, 64, 128"),
        (Asked("int8", 64), "--group_size 64 is for int4, and nothing is int4"),
        (Asked("int8", quantize_output="fp8"), "--quantize_output 'fp8' is not one of int8, int4, none"),
        (Asked("int8", quantize_embedding="fp8"), "--quantize_embedding 'fp8'"),
        (Asked(None, 64), "--group_size needs --quantize"),
        (Asked(quantize_output="none"), "--quantize_output needs --quantize"),
    ],
)
def test_what_does_not_exist_is_named(asked: Asked | str, words: str) -> None:
    with pytest.raises(QuantizationError, match=words):
        choose_scheme(asked, None, HERE)


def test_words_are_those_of_a_command_line() -> None:
    assert Asked("int4", 64, None, "int8").words == [
        "--quantize",
        "int4",
        "--group_size",
        "64",
        "--quantize_embedding",
        "int8",
    ]
