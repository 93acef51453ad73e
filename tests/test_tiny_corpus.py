"""The corpus of the bundled model: it repeats itself, tells the truth, and keeps what is held out out."""

import itertools
import random
import re

import pytest

from scripts.tiny import corpus

N = 300


def _numbers(text):
    return [int(number) for number in re.findall(r"\d+", text)]


def _listed(text):
    """The list in a question: the longest run of words that lists are made of."""
    runs = re.findall(rf"\b(?:{'|'.join(corpus.LIST_WORDS)})\b(?: (?:{'|'.join(corpus.LIST_WORDS)})\b)+", text)
    return max(runs, key=len).split()


def _solve_recall(item):
    *facts, question = re.split(r"(?<=[.?]) ", item.question)
    known = dict(re.fullmatch(r"(\w+) (?:has|is) (.*)\.", fact).groups() for fact in facts)
    for asked, answer in ((question, item.answer), item.follow_up):
        name = re.search(r"(?:does|is) ([A-Z]\w+)", asked)
        if name:
            assert known[name[1]] == answer
        else:
            value = re.fullmatch(r"Who (?:has|is) (.*)\?", asked)[1]
            assert re.sub("^a ", "the ", known[answer]) == value


def _solve(item):
    """The right answer, worked out from the question's words alone."""
    question, numbers = item.question, _numbers(item.question)
    match item.family:
        case "add":
            return str(sum(numbers))
        case "compare":
            return str(max(numbers) if "larger" in question else min(numbers))
        case "next":
            return str(numbers[0] + (1 if "after" in question else -1))
        case "sort":
            return " ".join(map(str, sorted(numbers)))
        case "count":
            return str(len(_listed(question)))
        case "copy":
            return " ".join(_listed(question))
        case "reverse":
            return " ".join(reversed(_listed(question)))
        case "position":
            place = re.search("first|second|third|last", question)[0]
            return _listed(question)[("first", "second", "third", "last").index(place) if place != "last" else -1]
        case "pick":
            kind = next(kind for kind in corpus.CATEGORIES if kind in question)
            (word,) = [word for word in _listed(question) if word in corpus.CATEGORIES[kind]]
            return word


@pytest.mark.parametrize("family", [*corpus.FAMILIES, *corpus.UNPROMISED])
@pytest.mark.parametrize("held_out", [False, True])
def test_answers_are_right(family, held_out):
    rng = random.Random(3)
    for _ in range(N):
        item = corpus.make_item(family, rng, held_out=held_out)
        assert item.family == family
        assert item.answer == item.answer.strip()
        if family == "recall":
            _solve_recall(item)
        else:
            assert item.answer == _solve(item), item


@pytest.mark.parametrize("family", corpus.FAMILIES)
def test_heldout_is_what_its_seed_says(family):
    pairs = corpus.heldout(family, 50, 7)
    assert pairs == corpus.heldout(family, 50, 7)
    assert pairs != corpus.heldout(family, 50, 8)
    assert len(set(pairs)) == 50
    assert [answer for _, answer in pairs] == [item.answer for item in corpus.heldout_items(family, 50, 7)]


def test_documents_repeat():
    first, second, other = (list(itertools.islice(corpus.documents(seed), 500)) for seed in (5, 5, 6))
    assert first == second != other


def test_hash_is_pinned():
    """The committed weights were trained on this split: another hash would leak."""
    assert [n for n in range(200) if corpus.is_held_out(f"pair 7 {n}")] == [16, 28, 66, 85, 99, 122, 154, 176, 190]


@pytest.mark.parametrize("family", corpus.FAMILIES)
def test_about_one_item_in_twelve_is_held_out(family):
    rng = random.Random(4)
    drawn = [corpus._MAKERS[family](rng) for _ in range(4000)]
    assert 0.05 < sum(corpus.is_held_out(item.key) for item in drawn) / len(drawn) < 0.11


def _number_pairs(text):
    return {tuple(sorted(map(int, pair))) for pair in re.findall(r"(\d+) (?:\+|plus|and|or) (\d+)", text)}


def test_training_never_shows_a_held_out_item():
    """By text, not by key: no held-out pair, list or set of facts stands in a training document."""
    text = " \n ".join(
        f" {turn.prompt} ; {turn.completion} "
        for document in itertools.islice(corpus.documents(9), 60_000)
        for turn in document
    )
    words = "|".join(corpus.LIST_WORDS)
    lists = set(re.findall(rf"\b(?:{words})\b(?: (?:{words})\b)+", text))
    pairs = _number_pairs(text)
    neighbours = {int(n) - (word == "before") for word, n in re.findall(r"(after|before) (\d+)", text)}
    triples = {tuple(sorted(t.split())) for t in re.findall(r"\d+ \d+ \d+", text)}
    assert min(len(lists), len(pairs), len(triples)) > 2000
    assert len(neighbours) > 500
    for family in corpus.FAMILIES:
        for item in corpus.heldout_items(family, 60, 11):
            numbers = _numbers(item.question)
            match family:
                case "add" | "compare":
                    assert tuple(sorted(numbers)) not in pairs
                case "next":
                    assert numbers[0] - ("before" in item.question) not in neighbours
                case "sort":
                    assert tuple(sorted(map(str, numbers))) not in triples
                case _:
                    listed = _listed(item.question)
                    assert " ".join(listed) not in lists
                    assert " ".join(reversed(listed)) not in lists


def test_chat_turns_are_metas():
    seen = {"system": False, "second": False}
    for document in itertools.islice(corpus.documents(2), 3000):
        if not document[0].prompt.startswith("[INST]"):
            continue
        for i, turn in enumerate(document):
            assert re.fullmatch(r"\[INST\] (<<SYS>>\n.+\n<</SYS>>\n\n)?\S.* \[/INST\]", turn.prompt)
            assert turn.completion == turn.completion.strip() + " "
            seen["system"] |= "<<SYS>>" in turn.prompt
            seen["second"] |= i > 0
            assert i == 0 or "<<SYS>>" not in turn.prompt
    assert all(seen.values())


def test_alpaca_template_is_kept_out():
    text = " ".join(
        f"{turn.prompt} {turn.completion}"
        for document in itertools.islice(corpus.documents(1), 5000)
        for turn in document
    )
    for part in ("###", "Below is", "nstruction", "esponse"):
        assert part not in text


def test_every_form_is_asked():
    prompts = [prompt for family in corpus.FAMILIES for prompt, _ in corpus.heldout(family, 60, 1)]
    for opening in ("Q: ", "Question: ", "Task: ", "User: ", "Teacher: ", "[INST] ", "[INST] <<SYS>>\n"):
        assert any(opening in prompt for prompt in prompts)


def test_stories_are_whole():
    rng = random.Random(1)
    for _ in range(500):
        text = corpus.story(rng)
        assert not re.search(r"[{}]|  |\ba [aeiou]", text)
        assert text[0].isupper()
        assert text.rstrip('"')[-1] in ".!"
