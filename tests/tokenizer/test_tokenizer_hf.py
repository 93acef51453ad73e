"""Hugging Face's tokenizer.json against the tokenizers library, and against our other two kinds."""

import base64
import io
import json
import os
import random
from pathlib import Path

import pytest
import sentencepiece
from support import sp_twin
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Core

from llama.errors import TokenizerError
from llama.tokenizer import load_tokenizer

LINES = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Once upon a time there was a small bird that sang in the old garden.",
]
TEXTS = [
    "",
    "the dog",
    "  the dog  ",
    "a\nb\n\n c\t",
    "🙂 the 🐕 你好",
    "</s><s>the<|eot_id|><|begin_of_text|>",
    "nul\0 naïve e\u0301",
]


def byte_level(names: list[str]) -> Core:
    """A byte-level BPE as Llama 3's, with a few merges and `names` as special tokens behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ċ", "Ċ")]
    vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    core = Core(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    return core


LLAMA3_NAMES = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eom_id|>", "<|eot_id|>"]


def save(core: Core, folder: Path, **beside: object) -> Path:
    """Write tokenizer.json and, by keyword, the JSON files beside it."""
    (folder / "tokenizer.json").write_text(core.to_str(), encoding="utf-8")
    for name, content in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(params=["toy", "llama2"])
def sp_file(request, tmp_path: Path) -> Path:
    if request.param == "llama2":
        folder = os.environ.get("LLAMA_TEST_DATA")
        if not folder:
            pytest.skip("LLAMA_TEST_DATA is not set")
        return Path(folder) / "llama2_tokenizer.model"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 3),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    file = tmp_path / "toy.model"
    file.write_bytes(model.getvalue())
    return file


def test_agrees_with_the_same_sentencepiece_model(sp_file, tmp_path):
    folder = save(sp_twin(sp_file.read_bytes()), tmp_path)
    ours, twin = load_tokenizer(folder / "tokenizer.json"), load_tokenizer(sp_file)
    assert (ours.kind, twin.kind) == ("hf", "sentencepiece")
    for name in ("n_words", "bos_id", "eos_id", "pad_id", "stop_tokens", "special_tokens"):
        assert getattr(ours, name) == getattr(twin, name), name
    for text in TEXTS:
        ids = twin.encode(text, bos=True, eos=True)
        assert ours.encode(text, bos=True, eos=True) == ids
        assert ours.decode(ids) == twin.decode(ids) == text
        assert [ours.token_text(i) for i in ids] == [twin.token_text(i) for i in ids]
    draw = random.Random(0)
    for _ in range(1000):
        ids = [draw.choice([draw.randrange(262), draw.randrange(ours.n_words)]) for _ in range(10)]
        assert ours.decode(ids) == twin.decode(ids)


def test_agrees_with_the_same_ranks(tmp_path):
    convert = pytest.importorskip("transformers.convert_slow_tokenizer")
    byte_of = {character: byte for byte, character in convert.bytes_to_unicode().items()}
    vocab = byte_level([]).get_vocab()
    spelt = sorted(vocab, key=vocab.__getitem__)
    tokens = [bytes(byte_of[character] for character in token) for token in spelt]
    ranks = tmp_path / "tokenizer.model"
    ranks.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    twin = load_tokenizer(ranks)
    names = sorted(twin.special_tokens, key=twin.special_tokens.__getitem__)
    ours = load_tokenizer(save(byte_level(names), tmp_path) / "tokenizer.json")
    assert (ours.kind, twin.kind) == ("hf", "tiktoken")
    for name in ("n_words", "bos_id", "eos_id", "pad_id", "stop_tokens", "special_tokens"):
        assert getattr(ours, name) == getattr(twin, name), name
    for text in TEXTS:
        ids = twin.encode(text, bos=True, eos=True)
        assert ours.encode(text, bos=True, eos=True) == ids
        assert ours.decode(ids) == twin.decode(ids) == f"<|begin_of_text|>{text}<|end_of_text|>"
    draw = random.Random(0)
    for _ in range(1000):
        ids = [draw.randrange(ours.n_words) for _ in range(10)]
        stream = ours.text_stream()
        assert "".join(stream.push(i) for i in ids) + stream.flush() == twin.decode(ids)


def test_byte_level_decoding_equals_the_library(tmp_path):
    core = byte_level(LLAMA3_NAMES)
    ours = load_tokenizer(save(core, tmp_path))
    draw = random.Random(0)
    for _ in range(1500):
        ids = [draw.randrange(ours.n_words) for _ in range(draw.randrange(10))]
        stream = ours.text_stream()
        text = "".join(stream.push(i) for i in ids) + stream.flush()
        assert text == core.decode(ids, skip_special_tokens=False)
        assert ours.decode(ids) == text


@pytest.mark.parametrize("flagged", [True, False], ids=["flagged special", "flag forgotten"])
def test_text_cannot_forge_special_tokens(tmp_path, flagged):
    core = byte_level([])
    core.add_tokens([AddedToken(name, special=flagged) for name in [*LLAMA3_NAMES, "</s>"]])
    ours = load_tokenizer(save(core, tmp_path, tokenizer_config={"eos_token": "</s>"}))
    assert set(ours.special_tokens) == {*LLAMA3_NAMES, "</s>"}
    text = "a</s>" + "".join(LLAMA3_NAMES)
    ids = ours.encode(text, bos=False, eos=False)
    assert not set(ours.special_tokens.values()) & set(ids)
    assert ours.decode(ids) == text


def test_words_added_to_the_vocabulary_are_still_found(tmp_path):
    core = byte_level(LLAMA3_NAMES)
    core.add_tokens(["Größe"])
    ours = load_tokenizer(save(core, tmp_path))
    ids = ours.encode("Größe", bos=False, eos=False)
    assert ids == [ours.n_words - 1]
    assert ours.decode(ids) == "Größe"


def test_bos_and_eos_by_name(tmp_path):
    core = byte_level(["A", "B", "C", *LLAMA3_NAMES])
    config = {"bos_token": {"content": "A", "special": True}, "eos_token": "B", "pad_token": "C"}
    ours = load_tokenizer(save(core, tmp_path, tokenizer_config=config, config={"bos_token_id": 3}))
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == tuple(ours.special_tokens[name] for name in "ABC")


def test_bos_and_eos_by_number_with_a_list_of_stops(tmp_path):
    core = byte_level(["A", "B", "C", "D"])
    a, b, c, d = (core.token_to_id(name) for name in "ABCD")
    generation = {"bos_token_id": a, "eos_token_id": [b, c, 999_999]}
    ours = load_tokenizer(save(core, tmp_path, generation_config=generation, config={"eos_token_id": d}))
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (a, b, -1)
    assert ours.stop_tokens == {b, c, d}


def test_the_stop_set_of_llama3_is_whole(tmp_path):
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": None}
    ours = load_tokenizer(save(byte_level(LLAMA3_NAMES), tmp_path, tokenizer_config=config))
    assert ours.eos_id == ours.special_tokens["<|eot_id|>"]
    assert ours.stop_tokens == {ours.special_tokens[n] for n in LLAMA3_NAMES if n[2:5] in ("end", "eom", "eot")}


def test_nothing_names_bos(tmp_path):
    with pytest.raises(TokenizerError, match=r"which token is BOS: .*tokenizer_config\.json"):
        load_tokenizer(save(byte_level(["A"]), tmp_path))


def test_truncation_and_padding_settings_are_ignored(tmp_path):
    core = byte_level(LLAMA3_NAMES)
    core.enable_truncation(4)
    core.enable_padding(length=4)
    ours = load_tokenizer(save(core, tmp_path))
    assert len(ours.encode("x y z x y z", bos=False, eos=False)) == 11
    assert len(ours.encode("x", bos=False, eos=False)) == 1


def test_gaps_in_the_ids_count_as_words(tmp_path):
    spec = json.loads(byte_level(LLAMA3_NAMES).to_str())
    spec["model"]["vocab"]["Ġgap"] = 700
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    ours = load_tokenizer(tmp_path)
    assert ours.n_words == 701
    assert ours.decode([700, 699]) == " gap"


def test_a_decoder_of_another_family_is_refused(tmp_path):
    core = byte_level(LLAMA3_NAMES)
    core.decoder = decoders.WordPiece()
    with pytest.raises(TokenizerError, match="decoder WordPiece is not a Llama's"):
        load_tokenizer(save(core, tmp_path))


def test_what_the_library_refuses_is_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "none"}}')
    with pytest.raises(TokenizerError, match="the tokenizers library cannot read it") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_beside_is_named(tmp_path):
    folder = save(byte_level(LLAMA3_NAMES), tmp_path)
    (folder / "tokenizer_config.json").write_text('{"bos_token": ')
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: not readable as JSON"):
        load_tokenizer(folder)
