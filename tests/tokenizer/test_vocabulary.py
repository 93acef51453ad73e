"""What tokenizers say of themselves, against the libraries that run them."""

import io
import random

import pytest
import sentencepiece
import tiktoken
from tokenizers import Tokenizer as Core
from tokenizers import models, pre_tokenizers

from llama.errors import TokenizerError
from llama.tokenizer.vocabulary import Kind, all_merges, spell, vocabulary_of_proto

LINES = ["The quick brown fox jumps over the lazy dog", "Once upon a time there was a small bird"]


def proto(**options: object) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 3), model_writer=model, num_threads=1, minloglevel=2,
        **{"vocab_size": 320, "model_type": "bpe", "byte_fallback": True, **options},
    )  # fmt: skip
    return model.getvalue()


def spelt_merges(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    return [(spell(left), spell(right)) for left, right in all_merges(ranks, ranks)]


def test_merges_act_as_the_ranks_whatever_the_cut() -> None:
    ranks = {token: rank for rank, token in enumerate([b"a", b"b", b"c", b"ab", b"bc", b"abc"])}
    assert [" ".join(pair) for pair in spelt_merges(ranks)] == ["a b", "b c", "a bc", "ab c"]


@pytest.mark.parametrize("seed", range(5))
def test_merges_cut_text_as_tiktoken_does(seed: int) -> None:
    """Ranks that no training would give: tokens of any bytes, in any order."""
    draw = random.Random(seed)
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < 400:
        left, right = draw.choice([b"a", b"b", b"c", *tokens[256:]]), draw.choice([b"a", b"b", b"c", *tokens[256:]])
        if left + right not in tokens and len(left + right) < 9:
            tokens.append(left + right)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    theirs = tiktoken.Encoding("toy", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={})
    vocab = {spell(token): rank for token, rank in ranks.items()}
    # A word that is a token is taken whole, by tiktoken, in Llama 3's tokenizer.json and by llama.cpp.
    core = Core(models.BPE(vocab=vocab, merges=spelt_merges(ranks), ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for _ in range(300):
        text = "".join(draw.choices("abc", k=draw.randrange(1, 20)))
        assert core.encode(text).ids == theirs.encode(text)


def test_a_sentencepiece_model_is_read_as_the_library_reads_it() -> None:
    content = proto(user_defined_symbols=["<dog>"], pad_id=3)
    library = sentencepiece.SentencePieceProcessor(model_proto=content)
    vocabulary = vocabulary_of_proto(content, library.unk_id())
    for number in range(library.get_piece_size()):
        assert vocabulary.tokens[number] == library.id_to_piece(number)
        assert vocabulary.scores[number] == library.get_score(number)
        kind = vocabulary.kinds[number]
        assert (kind == Kind.CONTROL) == library.is_control(number)
        assert (kind == Kind.UNKNOWN) == library.is_unknown(number)
        assert (kind == Kind.BYTE) == library.is_byte(number)
    assert vocabulary.kinds[library.piece_to_id("<dog>")] == Kind.USER_DEFINED
    assert vocabulary.space_prefix


@pytest.mark.parametrize(
    ("options", "remark"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "rewrites characters"),
        ({"remove_extra_whitespaces": True}, "drops leading"),
        ({"user_defined_symbols": ["<dog>"]}, "user-defined"),
        ({"treat_whitespace_as_suffix": True}, "marks blanks"),
    ],
)
def test_what_others_would_cut_otherwise_is_remarked(options: dict[str, object], remark: str) -> None:
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    assert vocabulary_of_proto(proto(**plain), 0).remarks == []
    (found,) = vocabulary_of_proto(proto(**{**plain, **options}), 0).remarks
    assert remark in found
    assert not vocabulary_of_proto(proto(**plain, add_dummy_prefix=False), 0).space_prefix


def test_a_damaged_model_is_an_error() -> None:
    content = proto()
    for size in (3, 1000, len(content) - 1):
        with pytest.raises(TokenizerError):
            vocabulary_of_proto(content[:size], 0)
