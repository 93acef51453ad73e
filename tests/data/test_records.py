"""Records from files and from the Hub: what is read, and what every bad input is answered with."""

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama.data.records import Record, digest, read_records
from llama.errors import DataError

GOOD = {"instruction": "Add.", "input": "1 2", "output": "3"}
THREE = [
    {"instruction": "Say naïve 🙂.", "output": "naïve\n\u2028🙂", "input": "", "source": 7},
    GOOD,
    {"instruction": "Greet.", "input": None, "output": " Hi "},
]
READ = [Record("Say naïve 🙂.", "", "naïve\n\u2028🙂"), Record("Add.", "1 2", "3"), Record("Greet.", "", " Hi ")]


def write(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content, ensure_ascii=False).encode())
    return path


def write_lines(folder: Path, *lines: Any) -> Path:
    texts = [line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines]
    return write(folder, "data.jsonl", b"\n".join(texts))


def complaint(path: Path | str) -> str:
    """What a data set is answered with, its folder left out."""
    with pytest.raises(DataError) as raised:
        read_records(path)
    assert raised.value.__suppress_context__ or raised.value.__context__ is None
    text = str(raised.value)
    assert "\n" not in text
    return text.replace(f"{Path(path).parent}/", "")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["data.json", "data.JSON"])
def test_json(tmp_path, name, mark):
    content = json.dumps(THREE, ensure_ascii=False, indent=1).encode()
    assert read_records(write(tmp_path, name, mark + content)) == READ


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_json_lines_with_blank_ones(tmp_path, mark, end):
    lines = [json.dumps(value, ensure_ascii=False).encode() for value in THREE]
    content = mark + end.join([lines[0], b"", lines[1], b"  \t", lines[2], b""])
    assert read_records(write(tmp_path, "data.jsonl", content)) == READ


def test_blank_outputs_are_left_out_and_counted(tmp_path, capsys):
    path = write(tmp_path, "data.json", [GOOD, {**GOOD, "output": ""}, {**GOOD, "output": " \n"}])
    assert read_records(path) == [Record("Add.", "1 2", "3")]
    assert capsys.readouterr().err == f"{path}: left out 2 of 3 records, whose 'output' is blank\n"


def test_nothing_is_said_of_good_records(tmp_path, capsys):
    read_records(write(tmp_path, "data.json", THREE))
    assert capsys.readouterr() == ("", "")


BAD_RECORDS = [
    (5, "a record is an object, found a number"),
    (["a"], "a record is an object, found a list"),
    (None, "a record is an object, found null"),
    ({"output": "3"}, "'instruction' is missing"),
    ({"instruction": "Add."}, "'output' is missing"),
    ({**GOOD, "instruction": " \n"}, "'instruction' is blank"),
    ({**GOOD, "instruction": None}, "'instruction' must be text, found null"),
    ({**GOOD, "output": 3}, "'output' must be text, found a number"),
    ({**GOOD, "output": 3.5}, "'output' must be text, found a number"),
    ({**GOOD, "output": True}, "'output' must be text, found true or false"),
    ({**GOOD, "output": None}, "'output' must be text, found null"),
    ({**GOOD, "output": ["3"]}, "'output' must be text, found a list"),
    ({**GOOD, "input": 1}, "'input' must be text, found a number"),
    ({**GOOD, "input": {"a": "b"}}, "'input' must be text, found an object"),
]


@pytest.mark.parametrize(("value", "fault"), BAD_RECORDS)
def test_a_malformed_record_is_named(tmp_path, value, fault):
    ending = f"{fault}; of 3 records 1 is bad: correct or remove it"
    assert complaint(write(tmp_path, "data.json", [GOOD, value, GOOD])) == f"data.json, record 1 (from 0): {ending}"
    assert complaint(write_lines(tmp_path, GOOD, b"", value, GOOD)) == (
        f"data.jsonl, line 3, record 1 (from 0): {ending}"
    )


def test_the_first_bad_record_is_named_and_all_are_counted(tmp_path):
    path = write(tmp_path, "data.json", [GOOD, {**GOOD, "input": 1}, GOOD, 7])
    assert complaint(path) == (
        "data.json, record 1 (from 0): 'input' must be text, found a number; "
        "of 4 records 2 are bad: correct or remove them"
    )


@pytest.mark.parametrize("field", ["instruction", "input", "output"])
def test_half_a_surrogate_pair(tmp_path, field):
    content = json.dumps([GOOD, {**GOOD, field: "ab\ud83dc"}]).encode()
    assert b"\\ud83d" in content
    assert complaint(write(tmp_path, "data.json", content)) == (
        f"data.json, record 1 (from 0): '{field}' holds half a character (\\ud83d at 2), which is no text; "
        "of 2 records 1 is bad: correct or remove it"
    )
    whole = json.dumps([{**GOOD, field: "🙂"}]).encode()
    assert b"\\ud83d\\ude42" in whole
    assert getattr(read_records(write(tmp_path, "data.json", whole))[0], field) == "🙂"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_broken_utf8_in_json(tmp_path, mark):
    content = mark + json.dumps([GOOD, {**GOOD, "output": "é"}], ensure_ascii=False).encode().replace(
        b"\xc3\xa9", b"\xe9"
    )
    at = content.index(b"\xe9")
    assert complaint(write(tmp_path, "data.json", content)) == (
        f"data.json, record 1 (from 0): byte {at} (0xe9) is not UTF-8: save the file as UTF-8"
    )
    # Where the rest is no JSON either, the byte alone is named.
    assert complaint(write(tmp_path, "data.json", content[:-1])) == (
        f"data.json: byte {at} (0xe9) is not UTF-8: save the file as UTF-8"
    )


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_broken_utf8_in_json_lines(tmp_path, mark):
    good = json.dumps(GOOD).encode()
    content = mark + good + b"\n\n" + good[:-3] + b"\xff" + good[-3:] + b"\n"
    at = content.index(b"\xff")
    assert complaint(write(tmp_path, "data.jsonl", content)) == (
        f"data.jsonl, line 3, record 1 (from 0): byte {at} (0xff) is not UTF-8; "
        "of 2 records 1 is bad: correct or remove it"
    )


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_utf16(tmp_path, name):
    path = write(tmp_path, name, json.dumps([GOOD]).encode("utf-16"))
    assert complaint(path) == f"{name} is UTF-16, byte 0 (0xff) begins no UTF-8: save it as UTF-8"


WANTED = 'write [{"instruction": ..., "input": ..., "output": ...}, ...]'


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (b"[]", "data.json holds no record: write objects with instruction, input, output"),
        (b"", f"data.json is not JSON (Expecting value: line 1 column 1 (char 0)): {WANTED}"),
        (b'[{"instruction"', f"data.json is not JSON (Expecting ':' delimiter: line 1 column 16 (char 15)): {WANTED}"),
        (
            b'{"instruction": "a"}\n{"instruction": "b"}',
            "data.json is not JSON (Extra data: line 2 column 1 (char 21)): "
            "if it holds an object a line, name it .jsonl",
        ),
        ({"data": [GOOD]}, f"data.json holds an object with 'data' where a list is expected: {WANTED}"),
        (GOOD, f"data.json holds an object with 'instruction', 'input', 'output' where a list is expected: {WANTED}"),
        (
            {"a": 1, "b": 2, "c": 3, "d": 4},
            f"data.json holds an object with 'a', 'b', 'c', ... where a list is expected: {WANTED}",
        ),
        ({}, f"data.json holds an object where a list is expected: {WANTED}"),
        ("text", f"data.json holds text where a list is expected: {WANTED}"),
        (b"[" * 100_000, f"data.json is nested too deeply: {WANTED}"),
        (
            [{**GOOD, "output": ""}, {**GOOD, "output": " "}],
            "data.json holds no usable record: the 'output' of all 2 is blank",
        ),
    ],
)
def test_a_json_file_of_another_shape(tmp_path, content, answer):
    assert complaint(write(tmp_path, "data.json", content)) == answer


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"instruction": "a', "not JSON (Unterminated string starting at at character 17)"),
        (b"[", "not JSON (Expecting value at character 2; a file with one list is named .json)"),
        (b"[" * 100_000, "nested too deeply"),
        (b"{}{}", "not JSON (Extra data at character 3)"),
    ],
)
def test_a_line_that_is_no_json(tmp_path, line, fault):
    assert complaint(write_lines(tmp_path, GOOD, line)) == (
        f"data.jsonl, line 2, record 1 (from 0): {fault}; of 2 records 1 is bad: correct or remove it"
    )


def test_a_number_of_too_many_digits(tmp_path):
    number = b'{"source": ' + b"1" * 5000 + b"}"
    assert "data.json is not JSON (Exceeds the limit (4300 digits)" in complaint(write(tmp_path, "data.json", number))
    assert "record 0 (from 0): not JSON (Exceeds the limit" in complaint(write_lines(tmp_path, number))


def test_no_line_at_all(tmp_path):
    assert complaint(write_lines(tmp_path, b"", b" ")) == (
        "data.jsonl holds no record: write objects with instruction, input, output"
    )


anything = st.none() | st.booleans() | st.integers() | st.text(st.characters(), max_size=3) | st.lists(st.text())
objects = st.fixed_dictionaries(
    {"instruction": st.text(max_size=3), "output": st.text(max_size=3)}, optional={"input": anything, "more": anything}
)


def is_good(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("input"), str | None):
        return False
    texts = [value.get("instruction"), value.get("output"), value.get("input") or ""]
    if not all(isinstance(text, str) for text in texts):
        return False
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return bool(texts[0].strip())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(objects | st.dictionaries(st.sampled_from(["instruction", "output"]), anything) | anything))
def test_whatever_json_holds_is_read_or_answered_in_a_line(tmp_path, values):
    values = json.loads(json.dumps(values))  # which joins surrogates that happen to make a pair
    path = write(tmp_path, "data.json", json.dumps(values).encode())
    usable = [value for value in values if is_good(value) and value["output"].strip()]
    if usable and all(map(is_good, values)):
        expected = [Record(value["instruction"], value.get("input") or "", value["output"]) for value in usable]
        assert read_records(path) == expected
    else:
        first = next((number for number, value in enumerate(values) if not is_good(value)), None)
        where = "data.json holds no" if first is None else f"data.json, record {first} (from 0): "
        assert complaint(path).startswith(where)


# -- where it comes from -----------------------------------------------------------------------------


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError(f"datasets was asked for {arguments} {options}")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


@pytest.mark.parametrize(
    "name", ["none.json", "none.jsonl", "none.parquet", "./none", "/none", "../none/x", "~/none", "a/b/c", "a\\b"]
)
@pytest.mark.usefixtures("no_hub")
def test_a_path_is_never_asked_for_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"^no data set at .*: there is no such file"):
        read_records(name)


@pytest.mark.usefixtures("no_hub")
def test_files_that_are_not_of_the_kinds(tmp_path):
    assert complaint(write(tmp_path, "data.csv", b"instruction,output")) == (
        "data.csv is neither .json nor .jsonl nor .parquet: name it by what it is, or convert it"
    )
    assert (
        complaint(" ") == "no data set is named: pass a .json, .jsonl or .parquet file, a folder or a name on the Hub"
    )


@pytest.fixture
def hub(monkeypatch):
    """A Hub that gives the rows put into it, and what it was asked for."""
    asked: dict[str, Any] = {}

    def load_dataset(**arguments: Any) -> datasets.Dataset:
        asked.update(arguments)
        return datasets.Dataset.from_list(asked.pop("rows"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_name_on_the_hub(hub):
    hub["rows"] = [{**GOOD, "text": "ignored"}, {"instruction": "Greet.", "input": None, "output": "Hi", "text": ""}]
    assert read_records("tatsu-lab/alpaca") == [Record("Add.", "1 2", "3"), Record("Greet.", "", "Hi")]
    assert hub == {"path": "tatsu-lab/alpaca", "split": "train"}


def test_rows_of_the_hub_are_checked_alike(hub):
    hub["rows"] = [GOOD, {"instruction": "Greet."}]
    assert complaint("tatsu-lab/alpaca") == (
        "tatsu-lab/alpaca, record 1 (from 0): 'output' must be text, found null; "
        "of 2 records 1 is bad: correct or remove it"
    ).replace("tatsu-lab/", "")


def test_other_columns(hub):
    hub["rows"] = [{"question": "a", "output": "b"}]
    assert complaint("someone/questions") == (
        "questions has no column 'instruction', but 'question', 'output': "
        "rename its columns to instruction, input, output"
    )


def test_the_hubs_errors_become_one_line(monkeypatch):
    def fail(**_: Any) -> None:
        raise ValueError("Unknown split \"train\". Should be one of ['test'].\nTraceback: more\n")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert complaint("nobody") == (
        "Hugging Face datasets cannot read nobody: Unknown split \"train\". Should be one of ['test']; "
        "no file or folder here has this name either: check the name, the connection and HF_TOKEN"
    )


@pytest.mark.parametrize("found", [None, sys], ids=["nothing", "a folder of that name"])
def test_without_the_package(monkeypatch, found):
    monkeypatch.setitem(sys.modules, "datasets", found)
    assert complaint("someone/records") == (
        "records is read with Hugging Face datasets, which is not installed: "
        "pip install 'llama-shards[hf]', or pass a .json or .jsonl file"
    )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("cache")
def test_parquet_and_folders(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    file = folder / "data.parquet"
    rows = [{"instruction": r.instruction, "input": r.input or None, "output": r.output} for r in READ]
    datasets.Dataset.from_list(rows).to_parquet(file)
    assert read_records(file) == READ
    assert read_records(folder) == READ


@pytest.mark.parametrize(("rank", "shows"), [("0", True), ("1", False)])
def test_the_library_is_quiet_while_it_works_for_us(monkeypatch, rank, shows):
    seen = []

    def load_dataset(**_: Any) -> datasets.Dataset:
        seen.extend([datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()])
        return datasets.Dataset.from_list([GOOD])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setenv("RANK", rank)
    datasets.logging.set_verbosity(datasets.logging.WARNING)
    read_records("someone/records")
    assert seen == [datasets.logging.CRITICAL, shows]
    assert datasets.logging.get_verbosity() == datasets.logging.WARNING
    assert datasets.is_progress_bar_enabled()


def test_a_table_without_the_column_that_may_be_missing(hub):
    hub["rows"] = [{"instruction": "Greet.", "output": "Hi"}]
    assert read_records("someone/records") == [Record("Greet.", "", "Hi")]


@pytest.mark.usefixtures("cache")
def test_a_damaged_parquet_file(tmp_path):
    assert complaint(write(tmp_path, "data.parquet", b"hello")) == (
        "Hugging Face datasets cannot read data.parquet: Parquet file size is 5 bytes, smaller than the minimum "
        "file footer (8 bytes); write it anew, or pass a .json or .jsonl file"
    )


# -- digest --------------------------------------------------------------------------------------------


def test_equal_records_have_one_digest_whatever_they_came_from(tmp_path):
    from_json = digest(read_records(write(tmp_path, "data.json", THREE)))
    assert from_json == digest(read_records(write_lines(tmp_path, *THREE)))


def test_the_digest_stays_the_same_in_later_versions():
    # `printf '["Add.", "1 2", "3"]\\n' | sha256sum`: checkpoints of earlier runs hold such digests.
    assert digest([Record("Add.", "1 2", "3")]) == "96b0c8ab38194985826e311f38d3316466986ad171ab71300d329aed957a8605"


@given(st.lists(st.builds(Record, st.text(max_size=3), st.text(max_size=3), st.text(max_size=3)), max_size=4))
def test_other_records_have_another_digest(records):
    more = [*records, Record("a", "", "b")]
    assert digest(records) != digest(more)
    assert digest(more) == digest(list(more))
    assert (digest(more) == digest(more[::-1])) == (more == more[::-1])


def test_text_that_moves_between_fields_or_records_changes_the_digest():
    parted = [[Record("a", "b", "c")], [Record("ab", "", "c")], [Record("a", "", "bc")], [Record("a", 'b", "c', "")]]
    assert len({digest(records) for records in parted}) == 4
