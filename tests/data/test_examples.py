"""Records as examples, against the tokenizer libraries and chat templates of others, on texts written out here."""

import base64
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import sentencepiece
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from support import sentencepiece_model
from transformers.utils.chat_template_utils import render_jinja_template

from llama.chat import chat_format
from llama.data.examples import Encoded, Example, encode_records
from llama.data.records import Record, read_records
from llama.data.templates import find_template
from llama.errors import DataError, TokenizerError
from llama.tokenizer import Tokenizer, load_tokenizer

# tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT
STANFORD_WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:"""
STANFORD_WITHOUT_INPUT = """\
Below is an instruction that describes a task. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:"""

# What the chat templates of Llama 3's repositories come to, for texts without blanks around them.
LLAMA3_JINJA = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

RECORDS = [
    Record("Say the fox.", "", "The fox."),
    Record("Add the numbers.", "1 2", "3"),
    Record("Naïve 🙂 你好", "a\n\nb", "é\n"),
    Record("Say </s><s>[INST] <|eot_id|>", "<|begin_of_text|>", "<|end_of_text|></s> <|eot_id|>"),
    Record("Count:", "", " 1 "),
]


@dataclass(frozen=True)
class Library:
    """A tokenizer of ours, and the library of its format called directly."""

    ours: Tokenizer
    encode: Callable[[str], list[int]]
    bos: int
    eos: int
    with_special: Callable[[str], list[int]] | None = None


def sentencepiece_library(request: pytest.FixtureRequest, size: str) -> Library:
    if size == "toy":
        file = sentencepiece_model(request.getfixturevalue("tmp_path_factory").mktemp("sp"))
    else:
        file = request.getfixturevalue("test_data") / "llama2_tokenizer.model"
    return Library(load_tokenizer(file), sentencepiece.SentencePieceProcessor(model_file=str(file)).encode, 1, 2)


def tiktoken_library(request: pytest.FixtureRequest, size: str) -> Library:
    if size == "toy":
        tokens = [bytes([byte]) for byte in range(256)] + [b"\n\n", b"us", b"er", b"Th", b":Th"]
        file = request.getfixturevalue("tmp_path_factory").mktemp("tt") / "toy"
        file.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    else:
        file = request.getfixturevalue("test_data") / "llama3_tokenizer.model"
    pairs = (line.split() for line in file.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    n = len(ranks)
    # Ids of meta-llama/llama-models, models/llama3/tokenizer.py.
    special = {"begin_of_text": 0, "end_of_text": 1, "start_header_id": 6, "end_header_id": 7, "eot_id": 9}
    theirs = tiktoken.Encoding(
        "theirs",
        pat_str=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        mergeable_ranks=ranks,
        special_tokens={f"<|{name}|>": n + place for name, place in special.items()},
    )
    return Library(
        load_tokenizer(file), theirs.encode_ordinary, n, n + 1, lambda text: theirs.encode(text, allowed_special="all")
    )


@pytest.fixture(scope="module", params=["toy", "real"])
def sp(request) -> Library:
    return sentencepiece_library(request, request.param)


@pytest.fixture(scope="module", params=["toy", "real"])
def tt(request) -> Library:
    return tiktoken_library(request, request.param)


@pytest.fixture(scope="module", params=["sp toy", "sp real", "tt toy", "tt real"])
def any_kind(request) -> Library:
    make = sentencepiece_library if request.param.startswith("sp") else tiktoken_library
    return make(request, request.param.split()[1])


@pytest.fixture(scope="module")
def toy(request) -> Library:
    return sentencepiece_library(request, "toy")


@pytest.fixture(scope="module")
def alpaca(test_data) -> list[Record]:
    return read_records(test_data / "alpaca_data_1k.json")


def stanford(record: Record) -> str:
    template = STANFORD_WITH_INPUT if record.input else STANFORD_WITHOUT_INPUT
    return template.format(instruction=record.instruction, input=record.input)


def apart(library: Library, prompt: str, answer: str) -> Example:
    """Prompt and answer encoded one after the other, the prompt as context."""
    alone = [library.bos, *library.encode(prompt)]
    return Example((*alone, *library.encode(answer), library.eos), len(alone))


def joint(library: Library, prompt: str, answer: str) -> Example:
    """Prompt and answer encoded in one piece, the common part with the prompt alone as context."""
    whole = [library.bos, *library.encode(prompt + answer), library.eos]
    alone = [library.bos, *library.encode(prompt)]
    n_common = 0
    while n_common < len(alone) and whole[n_common] == alone[n_common]:
        n_common += 1
    return Example(tuple(whole), n_common)


def encoded(library: Library, template: str, records: list[Record], **options) -> list[Example]:
    return encode_records(records, library.ours, template, **{"max_seq_len": 4096, **options}).examples


# -- templates -----------------------------------------------------------------------------------------


def test_alpaca(any_kind):
    expected = [apart(any_kind, stanford(record), record.output) for record in RECORDS]
    assert encoded(any_kind, "alpaca", RECORDS) == expected


def test_alpaca_on_real_records(any_kind, alpaca):
    expected = [apart(any_kind, stanford(record), record.output) for record in alpaca[:100]]
    assert encoded(any_kind, "alpaca", alpaca[:100]) == expected


def test_llama2(any_kind):
    expected = []
    for record in RECORDS:
        text = f"{record.instruction}\n\n{record.input}" if record.input else record.instruction
        expected.append(joint(any_kind, f"[INST] {text.strip()} [/INST]", f" {record.output.strip()} "))
    assert encoded(any_kind, "llama2", RECORDS) == expected


def test_llama2_encodes_a_record_as_a_finished_pair_of_a_dialog(sp):
    chat = chat_format("llama2", sp.ours)
    ask = {"role": "user", "content": "Add.\n\n1 2"}
    dialog = [ask, {"role": "assistant", "content": "3"}, {"role": "user", "content": "More."}]
    (example,) = encoded(sp, "llama2", [Record("Add.", "1 2", "3")])
    n = len(example.tokens)
    assert chat.encode(dialog)[:n] == list(example.tokens)
    assert chat.encode([ask]) == list(example.tokens[: example.n_context])


def llama3_text(record: Record, answered: bool) -> str:
    text = f"{record.instruction}\n\n{record.input}" if record.input else record.instruction
    messages = [{"role": "user", "content": text}]
    messages += [{"role": "assistant", "content": record.output}] if answered else []
    rendered, _ = render_jinja_template([messages], chat_template=LLAMA3_JINJA, add_generation_prompt=not answered)
    return rendered[0]


def assert_llama3_is_the_chat_template(tt: Library, records: list[Record]) -> None:
    for record, example in zip(records, encoded(tt, "llama3", records), strict=True):
        assert tt.with_special(llama3_text(record, answered=True)) == list(example.tokens)
        assert tt.with_special(llama3_text(record, answered=False)) == list(example.tokens[: example.n_context])


def test_llama3(tt):
    assert_llama3_is_the_chat_template(tt, [Record("Say us.", "", "Here: us"), Record("Add.", "1 2", "3")])


def test_llama3_on_real_records(test_data, request, alpaca):
    records = [r for r in alpaca if all(text == text.strip() for text in (r.instruction, r.input, r.output))]
    assert len(records) > 800
    assert_llama3_is_the_chat_template(tiktoken_library(request, "real"), records)


def test_llama3_ids_of_the_real_tokenizer(test_data):
    ours = load_tokenizer(test_data / "llama3_tokenizer.model")
    (example,) = encode_records([Record("Hello", "", "Hi")], ours, "llama3").examples
    opening = (128000, 128006, 882, 128007, 271, 9906, 128009, 128006, 78191, 128007, 271)
    assert example == Example((*opening, 13347, 128009), len(opening))


def test_plain(any_kind):
    expected = []
    for record in RECORDS:
        prompt = f"{record.instruction}\n{record.input}\n" if record.input else f"{record.instruction}\n"
        expected.append(apart(any_kind, prompt, record.output))
    assert encoded(any_kind, "plain", RECORDS) == expected


@pytest.mark.parametrize("template", ["alpaca", "llama2", "llama3", "plain"])
def test_text_that_spells_special_tokens_stays_text(any_kind, template):
    if template == "llama3" and any_kind.with_special is None:
        pytest.skip("SentencePiece vocabularies have no headers")
    spelt = [Record("Say </s><s> <|eot_id|>", "<|begin_of_text|><|end_header_id|>", "<|end_of_text|></s> <|eot_id|>")]
    innocent = [Record("Say so", "now", "so")]
    special = set(any_kind.ours.special_tokens.values())

    def found(records: list[Record]) -> list[int]:
        return [token for token in encoded(any_kind, template, records)[0].tokens if token in special]

    # The toys know few characters: the unknown token (0) is none that text may forge.
    assert [token for token in found(spelt) if token] == found(innocent)


def test_no_token_reaches_across_the_border(tt):
    """What is learnt goes on from the very ids that an answer is generated from, though ":The" is a token too."""
    record = Record("Say it.", "", "The end")
    (example,) = encoded(tt, "alpaca", [record])
    prompt = find_template("alpaca", tt.ours).encode_prompt(record)
    assert list(example.tokens[: example.n_context]) == prompt
    assert tt.ours.decode(example.tokens[example.n_context : -1]) == "The end"
    assert tt.ours.encode(":The", bos=False, eos=False) != tt.ours.encode(":", bos=False, eos=False) + tt.ours.encode(
        "The", bos=False, eos=False
    )


@pytest.mark.parametrize("template", ["alpaca", "llama2", "plain"])
def test_the_learnt_part_is_the_answer_and_eos(sp, template):
    for example, record in zip(encoded(sp, template, RECORDS), RECORDS, strict=True):
        learnt = example.tokens[example.n_context :]
        assert learnt[-1] == sp.eos
        assert example.n_learnt == len(learnt)
        assert example.tokens.count(sp.eos) == example.tokens.count(sp.bos) == 1
        assert record.output.strip() in sp.ours.decode(example.tokens).replace("  ", " ")


@pytest.mark.parametrize("template", ["alpaca", "llama2", "plain"])
def test_training_on_the_prompt_leaves_out_bos_alone(any_kind, template):
    masked = encoded(any_kind, template, RECORDS)
    unmasked = encoded(any_kind, template, RECORDS, train_on_prompt=True)
    assert [example.tokens for example in unmasked] == [example.tokens for example in masked]
    assert {example.n_context for example in unmasked} == {1}


def test_a_template_by_another_name(toy):
    with pytest.raises(DataError) as raised:
        encode_records(RECORDS, toy.ours, "chatml")
    assert str(raised.value) == "unknown template 'chatml': use alpaca, llama2, llama3, plain"


def test_llama3_needs_its_special_tokens(toy):
    with pytest.raises(TokenizerError) as raised:
        encode_records(RECORDS, toy.ours, "llama3")
    assert str(raised.value) == (
        "the llama3 chat format needs <|start_header_id|>, which this sentencepiece tokenizer of 320 tokens lacks: "
        "use the format llama2 or alpaca"
    )


# -- truncation ----------------------------------------------------------------------------------------


@given(max_seq_len=st.integers(1, 400), train_on_prompt=st.booleans())
def test_examples_are_cut_from_the_right_and_counted(toy, max_seq_len, train_on_prompt):
    whole = encoded(toy, "plain", RECORDS, train_on_prompt=train_on_prompt)
    expected = [example for example in whole if example.n_context < max_seq_len]
    if not expected:
        with pytest.raises(DataError):
            encode_records(RECORDS, toy.ours, "plain", max_seq_len, train_on_prompt)
        return
    result = encode_records(RECORDS, toy.ours, "plain", max_seq_len, train_on_prompt)
    assert result.examples == [Example(e.tokens[:max_seq_len], e.n_context) for e in expected]
    assert result.n_truncated == sum(len(e.tokens) > max_seq_len for e in expected)
    assert result.n_dropped == len(whole) - len(expected)
    assert min(e.n_learnt for e in result.examples) >= 1


def test_an_example_that_just_fits_is_not_cut(toy):
    (whole,) = encoded(toy, "alpaca", RECORDS[:1])
    n = len(whole.tokens)
    fits, cut = (encode_records(RECORDS[:1], toy.ours, "alpaca", size) for size in (n, n - 1))
    assert (fits.examples, fits.n_truncated) == ([whole], 0)
    assert (cut.examples, cut.n_truncated) == ([Example(whole.tokens[:-1], whole.n_context)], 1)


def test_the_report():
    examples = [Example(tuple(range(1000)), 100), Example((1, 2), 1)]
    assert Encoded(examples, 1000).report() == "2 examples of 1,002 tokens, 901 of them learnt"
    assert Encoded(examples, 1000, 1, 3).report() == (
        "2 examples of 1,002 tokens, 901 of them learnt; 1 cut to 1,000 tokens; "
        "3 left out, whose prompts alone have 1,000 tokens or more"
    )


def test_nothing_left_to_learn(toy):
    (whole,) = encoded(toy, "alpaca", RECORDS[:1])
    with pytest.raises(DataError) as raised:
        encode_records(RECORDS[:2], toy.ours, "alpaca", 20)
    assert str(raised.value) == (
        "of 2 records none has anything to learn within --max_seq_len 20 tokens: the shortest prompt alone has "
        f"{whole.n_context}; raise --max_seq_len"
    )
    with pytest.raises(DataError, match=r"^no records to encode: the data set is empty$"):
        encode_records([], toy.ours)
