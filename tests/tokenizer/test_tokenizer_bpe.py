"""Llama 3's tokenizer against tiktoken itself."""

import base64
import os
import random
from pathlib import Path

import pytest
import tiktoken

from llama.errors import TokenizerError
from llama.tokenizer import load_tokenizer
from llama.tokenizer.bpe import split_long

MERGES = [b"th", b"the", b" the", b"\xe4\xbd", b"\xe4\xbd\xa0", b"\n\n", b"  ", b"12", b"123", b"eot", b"<|"]
# The published pattern in one piece, against ours in parts.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "",
    " ",
    "the  the\n\nthe",
    "  leading and trailing  ",
    "I'M sure; it's 1234567",
    "🙂👩‍👩‍👧 the 🐕",
    "你好，世界。",
    "e\u0301 \u200b \u3000 \xa0",
    "nul\0inside",
    "<|begin_of_text|><|eot_id|>the",
    "\r\n\r\n\t x",
]


def rank_lines(tokens: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def toy_ranks() -> list[bytes]:
    return [bytes([byte]) for byte in range(256)] + MERGES


@pytest.fixture(params=["toy", "llama3"])
def pair(request, tmp_path: Path):
    """Our tokenizer and a bare tiktoken encoding without special tokens, with its number of ranks."""
    if request.param == "toy":
        file = tmp_path / "ranks.txt"
        file.write_bytes(rank_lines(toy_ranks()))
    else:
        folder = os.environ.get("LLAMA_TEST_DATA")
        if not folder:
            pytest.skip("LLAMA_TEST_DATA is not set")
        file = Path(folder) / "llama3_tokenizer.model"
    pairs = (line.split() for line in file.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    bare = tiktoken.Encoding("bare", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    return load_tokenizer(file), bare, len(ranks)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_equal_tiktoken(pair, text):
    ours, bare, n = pair
    ids = bare.encode(text)
    assert ours.encode(text, bos=False, eos=False) == ids
    assert ours.encode(text, bos=True, eos=True) == [n, *ids, n + 1]
    assert ours.decode(ids) == text
    assert [ours.token_text(i) for i in ids] == [bare.decode([i]) for i in ids]


def test_special_ids_are_metas(pair):
    ours, _, n = pair
    assert ours.kind == "tiktoken"
    assert ours.n_words == n + 256
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (n, n + 1, n + 4)
    offsets = {
        "<|begin_of_text|>": 0,
        "<|end_of_text|>": 1,
        "<|reserved_special_token_0|>": 2,
        "<|reserved_special_token_1|>": 3,
        "<|finetune_right_pad_id|>": 4,
        "<|step_id|>": 5,
        "<|start_header_id|>": 6,
        "<|end_header_id|>": 7,
        "<|eom_id|>": 8,
        "<|eot_id|>": 9,
        "<|python_tag|>": 10,
        "<|image|>": 11,
        "<|reserved_special_token_2|>": 12,
        "<|reserved_special_token_245|>": 255,
    }
    assert {name: ours.special_tokens[name] - n for name in offsets} == offsets
    assert sorted(ours.special_tokens.values()) == list(range(n, n + 256))
    assert ours.stop_tokens == {n + 1, n + 8, n + 9}


def test_text_cannot_forge_special_tokens(pair):
    ours, _, n = pair
    text = "".join(ours.special_tokens)
    ids = ours.encode(text, bos=False, eos=False)
    assert max(ids) < n
    assert ours.decode(ids) == text


def test_special_tokens_decode_to_their_names(pair):
    ours, _, n = pair
    assert ours.decode([n, *ours.encode("the", bos=False, eos=False), n + 9]) == "<|begin_of_text|>the<|eot_id|>"


def test_stream_equals_decode_on_random_ids(pair):
    ours, bare, n = pair
    draw = random.Random(0)
    for _ in range(1500):
        ids = [draw.choice([draw.randrange(256), draw.randrange(n)]) for _ in range(draw.randrange(12))]
        stream = ours.text_stream()
        text = "".join(stream.push(i) for i in ids) + stream.flush()
        assert text == bare.decode(ids)
        assert ours.decode(ids) == text


def test_stream_holds_a_character_until_it_is_whole(pair):
    ours, bare, _ = pair
    stream = ours.text_stream()
    heard = [stream.push(bare.encode_single_token(bytes([byte]))) for byte in "🦙!".encode()]
    assert heard == ["", "", "", "🦙", "!"]
    assert stream.flush() == ""
    stream.push(bare.encode_single_token(b"\xf0"))
    assert stream.flush() == "\ufffd"


def test_ids_outside_the_vocabulary_are_named(pair):
    ours, _, n = pair
    with pytest.raises(TokenizerError, match=f"token id {n + 256} .* {n + 256:,} tokens"):
        ours.decode([n + 256])
    with pytest.raises(TokenizerError, match="token id -1 "):
        ours.text_stream().push(-1)


def reference_split(text: str) -> list[str]:
    """The rule character by character: a piece ends when its run of one class would exceed the limit."""
    pieces: list[str] = []
    for start in range(0, len(text), 400_000):
        piece, run, blank = "", 0, None
        for char in text[start : start + 400_000]:
            run = run + 1 if char.isspace() == blank else 1
            blank = char.isspace()
            if run > 25_000:
                pieces.append(piece)
                piece, run = "", 1
            piece += char
        pieces.append(piece)
    return pieces


@pytest.mark.parametrize(
    "text",
    [
        "a" * 25_000,
        "a" * 25_001,
        " " * 60_000 + "b" * 50_000 + " c",
        "word " * 90_000,
        "x" * 390_000 + " " * 30_000 + "\x1c\x85\u3000" * 9_000,
    ],
    ids=["at the limit", "one beyond", "two runs", "two blocks", "a run across blocks"],
)
def test_long_texts_are_cut_where_meta_cuts(text):
    assert list(split_long(text)) == reference_split(text)


def test_a_text_that_tiktoken_alone_cannot_take(pair):
    ours, _, _ = pair
    text = "the " * 100_001 + " " * 60_000
    assert ours.decode(ours.encode(text, bos=False, eos=False)) == text


def test_crlf_and_blank_lines_are_read(tmp_path):
    file = tmp_path / "ranks"
    file.write_bytes(rank_lines(toy_ranks()).replace(b"\n", b"\r\n") + b"\r\n")
    assert load_tokenizer(file).n_words == len(toy_ranks()) + 256


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-4], r"line 267: not a tiktoken rank"),
        (lambda content: content + b"dGhl! 900\n", r"line 268: not a tiktoken rank"),
        (lambda content: content + b"eHl6 900\n", r"268 tiktoken ranks that are not 0 to 267"),
        (lambda _: rank_lines(toy_ranks()[1:]), r"1 of the 256 single bytes .*0x00"),
    ],
    ids=["cut short", "no base64", "a gap", "a missing byte"],
)
def test_damaged_ranks_are_refused(tmp_path, damage, message):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(damage(rank_lines(toy_ranks())))
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(file)
    assert "\n" not in str(caught.value)


def test_meta_ids_of_llama3():
    """Ids published with the model, not from a library call."""
    folder = os.environ.get("LLAMA_TEST_DATA")
    if not folder:
        pytest.skip("LLAMA_TEST_DATA is not set")
    ours = load_tokenizer(Path(folder) / "llama3_tokenizer.model")
    assert (ours.n_words, ours.bos_id, ours.eos_id, ours.pad_id) == (128_256, 128_000, 128_001, 128_004)
    assert ours.encode("This is a test sentence.", bos=True, eos=True) == [
        *(128_000, 2028, 374, 264, 1296, 11914, 13, 128_001)
    ]
    assert ours.encode("\n\n", bos=False, eos=False) == [271]
