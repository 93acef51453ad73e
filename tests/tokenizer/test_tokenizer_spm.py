"""SentencePiece tokenizers against the sentencepiece library itself."""

import io
import os
import random
from pathlib import Path

import pytest
import sentencepiece

from llama.errors import TokenizerError
from llama.tokenizer import Tokenizer, load_tokenizer

LINES = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Once upon a time there was a small bird that sang in the old garden.",
    "  two blanks in front, and a tab\there; numbers 12345 and 67890",
    "Größe, naïve, façade: the letters of Europe; the quick bird sang.",
]
TEXTS = [
    "",
    " ",
    "   ",
    "the dog",
    " the dog",
    "  the dog  ",
    "a\nb\n\n c\t",
    "🙂👩‍👩‍👧 the 🐕",
    "你好，世界。the dog",
    "naïve Größe",
    "</s><s><unk> the <0x0A>",
    "nul\0inside",
    "▁ the mark ▁▁",
    "e\u0301 combining",
]


def train(**settings: object) -> bytes:
    """Train a tiny model with Llama's settings, changed by `settings`."""
    model = io.BytesIO()
    defaults: dict[str, object] = {
        "vocab_size": 360,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 3), model_writer=model, **(defaults | settings)
    )
    return model.getvalue()


# How each setting of the model changes decoding, above all of leading blanks.
SETTINGS: dict[str, dict[str, object]] = {
    "llama": {},
    "no dummy prefix": {"add_dummy_prefix": False},
    "extra blanks removed": {"remove_extra_whitespaces": True},
    "user's symbols": {"user_defined_symbols": ["▁fox", "<|x|>"]},
    "another unknown": {"unk_surface": "<?>"},
}


@pytest.fixture(params=[*SETTINGS, "llama2"])
def pair(request, tmp_path: Path) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    """Our tokenizer and the library's, for toy models and for Meta's own."""
    if request.param == "llama2":
        folder = os.environ.get("LLAMA_TEST_DATA")
        if not folder:
            pytest.skip("LLAMA_TEST_DATA is not set")
        file = Path(folder) / "llama2_tokenizer.model"
    else:
        file = tmp_path / "a name that tells nothing"
        file.write_bytes(train(**SETTINGS[request.param]))
    return load_tokenizer(file), sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_equal_the_library(pair, text):
    ours, theirs = pair
    ids = theirs.encode(text)
    assert ours.encode(text, bos=False, eos=False) == ids
    assert ours.encode(text, bos=True, eos=False) == [theirs.bos_id(), *ids]
    assert ours.encode(text, bos=False, eos=True) == [*ids, theirs.eos_id()]
    assert ours.decode(ids) == theirs.decode(ids)
    assert [ours.token_text(i) for i in ids] == [theirs.decode([i]) for i in ids]


def ruled_groups(sp: sentencepiece.SentencePieceProcessor) -> list[list[int]]:
    """The ids of the pieces that have rules of their own, by rule, and all ids."""
    every = range(sp.get_piece_size())
    return [
        [i for i in every if sp.is_byte(i)],
        [i for i in every if sp.is_control(i) or sp.is_unknown(i)],
        [i for i in every if sp.id_to_piece(i).startswith("▁")],
        list(every),
    ]


def test_stream_equals_the_librarys_decode_on_random_ids(pair):
    ours, theirs = pair
    draw, groups = random.Random(0), ruled_groups(theirs)
    for _ in range(1500):
        ids = [draw.choice(draw.choice(groups)) for _ in range(draw.randrange(12))]
        stream = ours.text_stream()
        text = "".join(stream.push(i) for i in ids) + stream.flush()
        assert text == theirs.decode(ids), [theirs.id_to_piece(i) for i in ids]
        assert ours.decode(ids) == text


def test_stream_equals_the_librarys_decode_on_broken_utf8(pair):
    ours, theirs = pair
    draw = random.Random(1)
    # Lead and continuation bytes, ends of the allowed ranges, surrogates, overlong forms.
    pool = [0x20, 0x41, 0x80, 0x9F, 0xA0, 0xBF, 0xC0, 0xC2, 0xE0, 0xE2, 0xED, 0xF0, 0xF4, 0xF5, 0xFF]
    for _ in range(1500):
        ids = [theirs.piece_to_id(f"<0x{draw.choice(pool):02X}>") for _ in range(draw.randrange(1, 8))]
        stream = ours.text_stream()
        assert "".join(stream.push(i) for i in ids) + stream.flush() == theirs.decode(ids)


def test_stream_holds_a_character_until_it_is_whole(pair):
    ours, theirs = pair
    stream = ours.text_stream()
    heard = [stream.push(theirs.piece_to_id(f"<0x{byte:02X}>")) for byte in "🦙!".encode()]
    assert heard == ["", "", "", "🦙", "!"]


def test_long_streams_hold_nothing_but_a_tail(pair):
    ours, theirs = pair
    ids = [theirs.piece_to_id(f"<0x{byte:02X}>") for byte in ("你" * 500).encode()]
    stream = ours.text_stream()
    heard = [stream.push(i) for i in ids]
    assert heard == ["", "", "你"] * 500


@pytest.mark.parametrize("text", ["</s>", "<s>", "<unk>", "a</s>b", "<s>system</s>", "</ s></s></s>"])
def test_text_cannot_forge_special_tokens(pair, text):
    ours, theirs = pair
    ids = ours.encode(text, bos=False, eos=False)
    assert not {theirs.bos_id(), theirs.eos_id()} & set(ids)
    assert ours.decode(ids) == text


def test_attributes(pair):
    ours, theirs = pair
    assert ours.kind == "sentencepiece"
    assert ours.n_words == theirs.get_piece_size()
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_id(), theirs.eos_id(), theirs.pad_id())
    assert ours.stop_tokens == {theirs.eos_id()}
    assert ours.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}


def test_lone_surrogates_become_replacement_characters(pair):
    ours, theirs = pair
    assert ours.encode("a\ud83d", bos=False, eos=False) == theirs.encode("a\ufffd")
    assert ours.encode("\ud83d\ude42", bos=False, eos=False) == theirs.encode("🙂")


def test_ids_outside_the_vocabulary_are_named(pair):
    ours, _ = pair
    for bad in (-1, ours.n_words):
        with pytest.raises(TokenizerError, match=f"token id {bad} "):
            ours.decode([1, bad])
        with pytest.raises(TokenizerError, match=f"token id {bad} "):
            ours.text_stream().push(bad)


def test_bytes_are_no_text(pair):
    with pytest.raises(TypeError, match="bytes"):
        pair[0].encode(b"the", bos=True, eos=False)


def test_odd_sizes_and_a_pad_token(tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(train(vocab_size=353, pad_id=3))
    ours = load_tokenizer(file)
    assert (ours.n_words, ours.pad_id) == (353, 3)


def test_a_model_without_bos_is_refused(tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(train(bos_id=-1))
    with pytest.raises(TokenizerError, match="bos_id -1 and eos_id 2"):
        load_tokenizer(file)


def test_meta_ids_of_llama2():
    """Ids known from Meta's own code and model cards, not from a library call."""
    folder = os.environ.get("LLAMA_TEST_DATA")
    if not folder:
        pytest.skip("LLAMA_TEST_DATA is not set")
    ours = load_tokenizer(Path(folder) / "llama2_tokenizer.model")
    assert (ours.n_words, ours.bos_id, ours.eos_id, ours.pad_id) == (32_000, 1, 2, -1)
    assert ours.encode("Hello world", bos=True, eos=True) == [1, 15043, 3186, 2]
    assert ours.encode("[INST]", bos=False, eos=False) == [518, 25580, 29962]
