"""Write the data set for prompt tuning of the bundled model: Alpaca records from the tiny corpus.

    python scripts/tiny/alpaca.py                                # the committed files, datasets/alpaca_tiny*.json
    python scripts/tiny/alpaca.py --out_dir /tmp/alpaca --seed 2      # other records

`ckpts/tiny` can do these tasks and has never seen Stanford Alpaca's template: without tuning it answers hardly any
record. Held-out records ask items that neither the model nor the tuning has read (`corpus.is_held_out`).
"""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from llama.cli import run
from scripts.tiny.corpus import Item, make_item

# Tasks on numbers. The model solves `compare` and `pick` in any wrapping, so that tuning would show nothing; virtual
# tokens do not teach the model lists of words within a few minutes.
FAMILIES = ("add", "next", "sort")
# Part of the records with an `input`. The input is the whole question, since the tuned model would hardly read bare
# numbers there: at the start of a line numbers lack the blank piece that the model has always seen in front of them.
INPUT_SHARE = 0.2
# Numbers have two digits or more: virtual tokens teach the short ones last.
SMALLEST = 10
INSTRUCTIONS = ("Answer the question.", "Solve this task.", "Give the answer.")


class Record(TypedDict):
    """One record in Stanford Alpaca's form; `input` is empty where the instruction says everything."""

    instruction: str
    input: str
    output: str


def record(item: Item, rng: random.Random) -> Record:
    """Ask `item` by its question as the instruction, or as the input of an instruction to answer it."""
    if rng.random() < INPUT_SHARE:
        return Record(instruction=rng.choice(INSTRUCTIONS), input=item.question, output=item.answer)
    return Record(instruction=item.question, input="", output=item.answer)


def records(count: int, seed: int, *, held_out: bool) -> list[Record]:
    """Draw `count` records that ask different questions, the families in turn, from one side of the split."""
    rng = random.Random(f"alpaca {held_out} {seed}")
    asked: dict[tuple[str, str], Record] = {}
    while len(asked) < count:
        item = make_item(FAMILIES[len(asked) % len(FAMILIES)], rng, held_out=held_out)
        if min(map(int, re.findall(r"\d+", item.question))) < SMALLEST:
            continue
        drawn = record(item, rng)
        asked.setdefault((drawn["instruction"], drawn["input"]), drawn)
    return list(asked.values())


def to_json(entries: Sequence[Record]) -> str:
    """Return the records as a JSON list, a record a line."""
    return "[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n"


def main(out_dir: str = "datasets", seed: int = 1, train: int = 1800, heldout: int = 300) -> None:
    """Write `alpaca_tiny.json` and `alpaca_tiny_heldout.json`.

    Args:
        out_dir: folder of the two files.
        seed: of the records.
        train: records to tune with.
        heldout: records to measure with.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    for name, count, held_out in (("alpaca_tiny", train, False), ("alpaca_tiny_heldout", heldout, True)):
        path = out / f"{name}.json"
        path.write_text(to_json(records(count, seed, held_out=held_out)))
        print(f"{path}: {count} records, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    run(main)
