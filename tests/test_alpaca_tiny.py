"""The bundled data set: what its script writes, right, and its held-out part kept out of training."""

import json
import re
from pathlib import Path

import pytest

from scripts.tiny import alpaca
from scripts.tiny.corpus import is_held_out

ROOT = Path(__file__).resolve().parent.parent
TRAIN, HELD_OUT = "alpaca_tiny.json", "alpaca_tiny_heldout.json"
FILES = (TRAIN, HELD_OUT)
LARGEST = 400_000


def read(name):
    return json.loads((ROOT / "datasets" / name).read_text())


def asked(record):
    return f"{record['instruction']} {record['input']}"


def numbers(record):
    return [int(number) for number in re.findall(r"\d+", asked(record))]


def solve(record):
    """Family and right answer, worked out from the record's words alone."""
    text, given = asked(record), numbers(record)
    if re.search("after|before", text):
        (number,) = given
        return "next", str(number + (1 if "after" in text else -1))
    if re.search("order|Sort", text):
        assert len(given) == 3
        return "sort", " ".join(map(str, sorted(given)))
    assert re.search(r"\+|Add|plus", text)
    assert len(given) == 2
    return "add", str(sum(given))


def key(record):
    """The key that `corpus.py` gives the item, spelled out here a second time."""
    family, answer = solve(record)
    match family:
        case "add":
            return "pair {} {}".format(*sorted(numbers(record)))
        case "next":
            return f"neighbours {min(numbers(record)[0], int(answer))}"
        case "sort":
            return f"sorted {answer}"


def test_files_are_what_the_script_writes(tmp_path):
    alpaca.main(out_dir=str(tmp_path))
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (ROOT / "datasets" / name).read_bytes(), name


def test_another_seed_writes_other_records():
    first, again, other = (alpaca.records(50, seed, held_out=False) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("name", FILES)
def test_outputs_are_right(name):
    for record in read(name):
        assert record["output"] == solve(record)[1], record


@pytest.mark.parametrize("name", FILES)
def test_records_are_alpacas_and_differ(name):
    records = read(name)
    assert (ROOT / "datasets" / name).stat().st_size < LARGEST
    assert {frozenset(record) for record in records} == {frozenset({"instruction", "input", "output"})}
    assert all(text == text.strip() for record in records for text in record.values())
    assert len({asked(record) for record in records}) == len(records)


@pytest.mark.parametrize("name", FILES)
def test_every_family_comes_in_both_templates(name):
    records = read(name)
    for family in alpaca.FAMILIES:
        with_input = [bool(record["input"]) for record in records if solve(record)[0] == family]
        assert len(with_input) >= len(records) // 4
        assert 0.1 < sum(with_input) / len(with_input) < 0.5


def test_held_out_items_are_in_no_training_record():
    train, held_out = ({key(record) for record in read(name)} for name in FILES)
    assert len(held_out) > 150
    assert not train & held_out
    assert not any(map(is_held_out, train))
    assert all(map(is_held_out, held_out))
