"""Stop strings, however they fall on tokens."""

import pytest

from llama.generation.stops import TextWatch


class Letters:
    """A tokenizer of one text a token."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def text_stream(self) -> "Letters":
        return self

    def push(self, token: int) -> str:
        return self.texts[token]

    def flush(self) -> str:
        return ""


def shown(texts: list[str], stops: list[str], prompt: int = 0) -> tuple[str, int, bool]:
    """What a watch shows piece by piece, how many tokens it drops, whether it stopped."""
    watch = TextWatch(Letters(*texts), stops, range(prompt))
    text = ""
    for token in range(prompt, len(texts)):
        done = watch.push(token)
        text += watch.new_text(final=done)
        if done:
            return text, watch.n_dropped, True
    return text + watch.new_text(final=True), watch.n_dropped, False


@pytest.mark.parametrize(
    ("texts", "stops", "expected"),
    [
        (["ab", "cd"], [], ("abcd", 0, False)),
        (["ab", "X", "cd"], ["X"], ("ab", 1, True)),
        (["ab", "c#", "##", "de"], ["###"], ("abc", 2, True)),
        (["a", "#", "#", "b", "#"], ["###"], ("a##b#", 0, False)),
        (["one two STOP three"], ["STOP"], ("one two ", 1, True)),
        (["a", "bab", "ac"], ["abac", "c"], ("ab", 2, True)),
        (["x", "\n", "\n", "y"], ["\n\n"], ("x", 2, True)),
    ],
)
def test_text_ends_where_the_stop_string_begins(texts: list[str], stops: list[str], expected: tuple) -> None:
    assert shown(texts, stops) == expected


def test_the_prompt_is_shown_but_not_searched() -> None:
    assert shown(["Q##", "#", "a", "###"], ["###"], prompt=2) == ("Q###a", 1, True)


def test_nothing_that_may_become_a_stop_string_is_shown_early() -> None:
    watch = TextWatch(Letters("ab", "#", "#", "c"), ["###"])
    pieces = []
    for token in range(4):
        watch.push(token)
        pieces.append(watch.new_text())
    assert pieces == ["ab", "", "", "##c"]
