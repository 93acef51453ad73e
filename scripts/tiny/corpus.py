"""Training text of the bundled model `ckpts/tiny`, written by a grammar; nothing is copied from anywhere.

There are two kinds of documents: short stories, which end properly, and families of small checkable tasks
(`FAMILIES`). Each task is asked in many surface forms (`FORMS`), so that a model learns the task and takes the form
for a wrapper. Everything follows from a `random.Random` that the caller seeds.

An item has a key, for example the two numbers of a sum. A hash decides whether a key is held out (`is_held_out`), the
same for every seed; a held-out key never occurs in training, in no form and in no family with that kind of key. The
Stanford Alpaca template is left out on purpose: prompt tuning has to teach this form later.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

HELD_OUT_PERCENT = 8

# ---------------------------------------------------------------------------------------------- words

BOYS = ("Tom", "Ben", "Leo", "Max", "Sam", "Jack")
GIRLS = ("Mia", "Anna", "Sara", "Lily", "Nora", "Ella")
NAMES = BOYS + GIRLS
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "pink")
THINGS = ("ball", "kite", "book", "cup", "box", "drum", "bell", "key", "flag", "stone")
PLACES = ("garden", "kitchen", "park", "forest", "school", "library", "barn", "market", "tower", "cave")
CATEGORIES = {
    "an animal": ("cat", "dog", "fox", "horse", "bird", "mouse", "sheep", "duck", "bear", "rabbit"),
    "a fruit": ("apple", "pear", "plum", "lemon", "cherry", "peach", "grape", "banana"),
    "a colour": COLOURS,
    "a tool": ("hammer", "saw", "spade", "rope", "brush", "needle", "nail", "ladder"),
    "a part of the body": ("hand", "foot", "nose", "ear", "arm", "knee", "chin", "back"),
    "something to wear": ("hat", "coat", "shirt", "sock", "shoe", "glove", "scarf", "dress"),
    "furniture": ("table", "chair", "bed", "lamp", "shelf", "desk", "sofa", "stool"),
    "a vehicle": ("car", "bus", "train", "boat", "truck", "bike", "plane", "sled"),
}
LIST_WORDS = tuple(word for words in CATEGORIES.values() for word in words)
POSITIONS = ("first", "second", "third")

# ---------------------------------------------------------------------------------------------- items


@dataclass(frozen=True)
class Item:
    """One checkable task.

    Attributes:
        family: one of `FAMILIES`.
        key: held out or not; a training item and a held-out item never share a key.
        question: the task in a person's words.
        statement: a text that the answer completes.
        answer: the one right answer, without blanks around it.
        follow_up: a second question about the same facts and its answer, where the family has one.
    """

    family: str
    key: str
    question: str
    statement: str
    answer: str
    follow_up: tuple[str, str] | None = None


def is_held_out(key: str) -> bool:
    """Return True for a key of held-out items: decided by a hash, the same in every run and process."""
    return zlib.crc32(key.encode()) % 100 < HELD_OUT_PERCENT


def _pair_key(a: int, b: int) -> str:
    return f"pair {min(a, b)} {max(a, b)}"


def _list_key(words: list[str]) -> str:
    """Return the key of a list and of its reverse, each of which would be the answer to the other."""
    return "list " + min(" ".join(words), " ".join(reversed(words)))


def _words(rng: random.Random, fewest: int, most: int) -> list[str]:
    return rng.sample(LIST_WORDS, rng.randint(fewest, most))


def _add(rng: random.Random) -> Item:
    """The sum of two numbers from 0 to 49."""
    a, b = rng.randrange(50), rng.randrange(50)
    question = rng.choice(
        (f"What is {a} + {b}?", f"Add {a} and {b}.", f"What is {a} plus {b}?", f"Calculate {a} + {b}.")
    )
    statement = rng.choice((f"{a} + {b} =", f"The sum of {a} and {b} is"))
    return Item("add", _pair_key(a, b), question, statement, str(a + b))


def _compare(rng: random.Random) -> Item:
    """The larger or the smaller of two different numbers from 0 to 99."""
    a, b = rng.sample(range(100), 2)
    larger = rng.random() < 0.5
    word = "larger" if larger else "smaller"
    question = rng.choice(
        (
            f"Which number is {word}, {a} or {b}?",
            f"Which is {word}: {a} or {b}?",
            f"Name the {word} one of {a} and {b}.",
        )
    )
    statement = rng.choice((f"The {word} one of {a} and {b} is", f"Of the numbers {a} and {b} the {word} is"))
    return Item("compare", _pair_key(a, b), question, statement, str(max(a, b) if larger else min(a, b)))


def _next(rng: random.Random) -> Item:
    """The number after or before one from 100 to 999."""
    low = rng.randrange(100, 999)
    after = rng.random() < 0.5
    word, given, answer = ("after", low, low + 1) if after else ("before", low + 1, low)
    question = rng.choice(
        (
            f"What number comes {word} {given}?",
            f"Which number is right {word} {given}?",
            f"Name the number {word} {given}.",
        )
    )
    return Item("next", f"neighbours {low}", question, f"The number {word} {given} is", str(answer))


def _recall(rng: random.Random) -> Item:
    """A fact read from two to four sentences."""
    count = rng.randint(2, 4)
    names = rng.sample(NAMES, count)
    if rng.random() < 0.6:
        values = [f"a {c} {t}" for c, t in zip(rng.sample(COLOURS, count), rng.sample(THINGS, count), strict=True)]
        verb, ask = "has", "What does {} have?"
    else:
        values = [f"in the {place}" for place in rng.sample(PLACES, count)]
        verb, ask = "is", "Where is {}?"
    facts = [f"{name} {verb} {value}." for name, value in zip(names, values, strict=True)]
    context = " ".join(facts)
    i, j = rng.sample(range(count), 2)
    key = "facts " + " ".join(sorted(facts))
    if rng.random() < 0.7:
        question, statement, answer = ask.format(names[i]), f"So {names[i]} {verb}", values[i]
        follow_up = ("And " + ask[0].lower() + ask[1:].format(names[j]), values[j])
    else:
        value = values[i].replace("a ", "the ", 1) if verb == "has" else values[i]
        question, statement, answer = f"Who {verb} {value}?", f"The one who {verb} {value} is", names[i]
        follow_up = (ask.format(names[j]), values[j])
    return Item("recall", key, f"{context} {question}", f"{context} {statement}", answer, follow_up)


def _position(rng: random.Random) -> Item:
    """The first, second, third or last word of a list of three to five."""
    words = _words(rng, 3, 5)
    listed = " ".join(words)
    place = rng.choice((*POSITIONS, "last"))
    answer = words[-1] if place == "last" else words[POSITIONS.index(place)]
    question = rng.choice(
        (
            f"What is the {place} word of this list: {listed}?",
            f"Which word comes {place}: {listed}?",
            f"Give the {place} word: {listed}.",
        )
    )
    return Item("position", _list_key(words), question, f"In the list {listed} the {place} word is", answer)


def _copy(rng: random.Random) -> Item:
    """A list of three to five words, said again."""
    words = _words(rng, 3, 5)
    listed = " ".join(words)
    question = rng.choice(
        (f"Repeat this list: {listed}.", f"Say these words again: {listed}.", f"Copy these words: {listed}.")
    )
    return Item("copy", _list_key(words), question, f"The words {listed} once more are", listed)


def _reverse(rng: random.Random) -> Item:
    """A list of three to five words in reverse order."""
    words = _words(rng, 3, 5)
    listed = " ".join(words)
    question = rng.choice(
        (
            f"Reverse this list: {listed}.",
            f"Write these words in reverse order: {listed}.",
            f"What is this list backwards: {listed}?",
        )
    )
    statement = f"The reverse of {listed} is"
    return Item("reverse", _list_key(words), question, statement, " ".join(reversed(words)))


def _count(rng: random.Random) -> Item:
    """The number of words in a list of two to eight."""
    words = _words(rng, 2, 8)
    listed = " ".join(words)
    question = rng.choice(
        (
            f"How many words are in this list: {listed}?",
            f"Count these words: {listed}.",
            f"How many words do you see here: {listed}?",
        )
    )
    return Item("count", _list_key(words), question, f"The number of words in {listed} is", str(len(words)))


def _pick(rng: random.Random) -> Item:
    """The one word of three that belongs to a category."""
    kind = rng.choice(tuple(CATEGORIES))
    others = [word for word in LIST_WORDS if word not in CATEGORIES[kind]]
    answer = rng.choice(CATEGORIES[kind])
    words = [answer, *rng.sample(others, 2)]
    rng.shuffle(words)
    listed = " ".join(words)
    question = rng.choice(
        (f"Which of these is {kind}: {listed}?", f"Find {kind}: {listed}.", f"Which word is {kind}: {listed}?")
    )
    return Item("pick", _list_key(words), question, f"Among {listed} the word that is {kind} is", answer)


def _sort(rng: random.Random) -> Item:
    """Three different numbers from 0 to 99, sorted upwards."""
    numbers = rng.sample(range(100), 3)
    listed = " ".join(map(str, numbers))
    answer = " ".join(map(str, sorted(numbers)))
    question = rng.choice(
        (
            f"Sort these numbers: {listed}.",
            f"Put these numbers in order: {listed}.",
            f"What is {listed} in order from small to large?",
        )
    )
    return Item("sort", f"sorted {answer}", question, f"The numbers {listed} in order are", answer)


_MAKERS: dict[str, Callable[[random.Random], Item]] = {
    "add": _add,
    "compare": _compare,
    "next": _next,
    "recall": _recall,
    "position": _position,
    "copy": _copy,
    "reverse": _reverse,
    "count": _count,
    "pick": _pick,
    "sort": _sort,
}
# Families in the training text that are learned too late to be promised: half right after 6,000 steps.
UNPROMISED = ("recall",)
FAMILIES = tuple(family for family in _MAKERS if family not in UNPROMISED)
# Weights with which families are drawn for training: harder families more often.
_SHARES = {
    "add": 5,
    "compare": 2,
    "next": 2,
    "recall": 3,
    "position": 2,
    "copy": 2,
    "reverse": 3,
    "count": 1,
    "pick": 2,
    "sort": 3,
}


def describe(family: str) -> str:
    """Return a few words on the task of a family: the docstring of its maker."""
    return (_MAKERS[family].__doc__ or "").rstrip(".")


def make_item(family: str, rng: random.Random, *, held_out: bool) -> Item:
    """Draw an item of `family` from the training side or the held-out side."""
    while True:
        item = _MAKERS[family](rng)
        if is_held_out(item.key) == held_out:
            return item


# ---------------------------------------------------------------------------------------------- forms

PREAMBLES = (
    "Here is a question.",
    "Please answer this.",
    "Let us begin.",
    "This is a small test.",
    "Think first, then answer.",
    "It is a quiet morning at school.",
    "The sun is warm today.",
    "The children sit down and listen.",
    "Good morning, everyone!",
    "We have time for one more exercise.",
    "Rain falls on the roof, so we stay inside.",
    "Note: keep the answer short.",
)
SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "Answer the question.",
    "Answer in a few words.",
    "You are a friendly teacher. Be brief and correct.",
    "Always tell the truth.",
)
# Texts around a question; the answer follows after a blank. `statement` uses the item's own sentence instead.
FORMS = {
    "plain": "Q: {}\nA:",
    "question": "Question: {}\nAnswer:",
    "task": "Task: {}\nResult:",
    "user": "User: {}\nBot:",
    "teacher": "Teacher: {}\nPupil:",
    "statement": "{}",
    "chat": "[INST] {} [/INST]",
    "chat_system": "[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{} [/INST]",
}
_FORM_SHARES = {
    "plain": 4, "question": 2, "task": 2, "user": 2, "teacher": 2, "statement": 4, "chat": 4, "chat_system": 2,
}  # fmt: skip
_CHAT = ("chat", "chat_system")


def render(item: Item, form: str, rng: random.Random) -> str:
    """Return the prompt that asks `item` in `form`; three in ten open with a preamble, but for chats."""
    text = item.statement if form == "statement" else item.question
    prompt = FORMS[form].format(text, system=rng.choice(SYSTEM_MESSAGES))
    if form not in _CHAT and rng.random() < 0.3:
        prompt = rng.choice(PREAMBLES) + rng.choice((" ", "\n", "\n\n")) + prompt
    return prompt


def _draw(rng: random.Random, shares: dict[str, int]) -> str:
    return rng.choices(tuple(shares), weights=tuple(shares.values()))[0]


# Draws an item, after which no more held-out questions are sought: a small family has only a few.
MOST_DRAWS = 50


def heldout_items(family: str, n: int, seed: int) -> list[Item]:
    """Draw `n` held-out items of `family` with different questions, fewer where there are no more."""
    rng = random.Random(f"{family} {seed}")
    items: dict[str, Item] = {}
    for _ in range(MOST_DRAWS * n):
        item = make_item(family, rng, held_out=True)
        items.setdefault(item.question, item)
        if len(items) == n:
            break
    return list(items.values())


def heldout(family: str, n: int, seed: int) -> list[tuple[str, str]]:
    """Draw `n` pairs of prompt and answer on held-out items of `family`, the forms mixed as in training.

    A completion is right when, without blanks around it, it equals the answer.
    """
    rng = random.Random(f"forms {family} {seed}")
    items = heldout_items(family, n, seed)
    return [(render(item, _draw(rng, _FORM_SHARES), rng), item.answer) for item in items]


# ---------------------------------------------------------------------------------------------- stories

_ADJECTIVES = ("little", "small", "happy", "brave", "kind", "quiet", "clever", "young", "gentle", "cheerful")
_HOMES = ("near a forest", "by the sea", "in a small village", "on a green hill", "beside a river", "on a farm")
_WEATHERS = ("sunny", "cold", "windy", "bright", "rainy", "warm")
_OPENINGS = (
    "Once upon a time there was a {adj} {kind} named {h}. {H} lived {home}.",
    "Once upon a time, a {adj} {kind} named {h} lived {home}.",
    "There was once a {adj} {kind} named {h}, and {he} lived {home}.",
    "{h} was a {adj} {kind} who lived {home}.",
    "One {weather} morning, a {adj} {kind} named {h} woke up early.",
)
# A plot is a list of beats; a beat is a choice of sentences. The slots are the same through a story.
_PLOTS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (  # lost and found
        ("{h} had a {c} {o} and took it everywhere.", "More than anything, {h} loved {his} {c} {o}."),
        (
            "One day the {o} was gone.",
            "But one {weather} day {he} could not find the {o}.",
            "Then one evening {he} lost it.",
        ),
        (
            "{h} looked in the {p}, but it was not there.",
            "{H} looked under the bed and behind the door, but found nothing.",
            "{H} felt sad and did not know what to do.",
        ),
        (
            "{f} heard about it and came to help.",
            '"Do not worry," said {f}. "We will look together."',
            "{H} asked {f} for help.",
        ),
        ("At last they found the {o} in the {q}.", "Soon {f} saw something {c} in the {q}. It was the {o}!"),
        (
            '"Thank you, {f}!" said {h}, and they both smiled.',
            "{h} was so happy that {he} gave {f} a big hug.",
            "From that day on, {h} and {f} were best friends.",
        ),
    ),
    (  # a gift
        ("It was the birthday of {his} friend {f}.", "{H} had a good friend named {f}, who was ill."),
        (
            "{h} wanted to give {f} a present.",
            '"What can I give to {f}?" {he} thought.',
            "{H} wished to bring {f} something nice.",
        ),
        (
            "{H} went to the {p} and found a {c} {o}.",
            "In the {p} {he} saw a {c} {o}, and it was just right.",
            "{H} worked all day and made a {c} {o}.",
        ),
        (
            "Then {he} carried the {o} to the house of {f}.",
            "{H} put the {o} in a basket and walked to see {f}.",
        ),
        ("{f} opened the door and laughed with joy.", '"A {c} {o}!" said {f}. "It is beautiful."'),
        ("They ate cake and sang until the sun went down.", "It was the best day of the year for both of them."),
    ),
    (  # the storm
        ("{h} liked to walk to the {p} every day.", "One {weather} day {h} went to the {p} to play."),
        (
            "Suddenly dark clouds came and it began to rain.",
            "After a while the wind grew strong and the sky turned black.",
        ),
        (
            "{h} was afraid and ran to the {q}.",
            "{H} was wet and cold, so {he} looked for a dry place.",
        ),
        (
            "There {he} met {f}, who was waiting too.",
            "In the {q} {he} found {f}, who had a warm fire.",
        ),
        (
            "They told each other stories until the storm was over.",
            "{f} shared some bread and soup, and they talked for hours.",
        ),
        (
            "When the sun came out again, they walked home together.",
            "After the rain they saw a rainbow, and {h} was not afraid any more.",
        ),
    ),
    (  # learning
        (
            "{h} wanted to learn how to {skill}.",
            "All the others could {skill}, but {h} could not.",
            "{H} had one wish: to {skill}.",
        ),
        ("{H} tried and tried, but it was hard.", "On the first day {he} tried, and nothing went well."),
        (
            '"I will never learn it," said {h}.',
            "{h} wanted to give up and sat down in the {p}.",
        ),
        (
            '"You only need time," said {f}. "Let me show you."',
            'Then {f} came and said, "Try a little every day."',
        ),
        (
            "So {h} went on, day after day.",
            "{h} listened well and tried again each morning.",
            "Every evening they met in the {p} and worked together.",
        ),
        (
            "After a week {he} could {skill} better than anyone.",
            "In the end {h} could {skill}, and everyone was proud of {him}.",
        ),
    ),
    (  # sharing
        (
            "In summer {h} picked many {fruit} in the {p}.",
            "One day {h} found a basket full of {fruit} in the {p}.",
        ),
        ("{H} wanted to keep all of them.", '"They are all for me," {he} thought.'),
        (
            "Then {f} came along and was very hungry.",
            "On the way home {he} met {f}, who had nothing to eat.",
        ),
        (
            "{h} thought about it and gave {f} half of the {fruit}.",
            '"Please take some," said {h}, and {f} was glad.',
        ),
        (
            "They sat down under a tree and ate together.",
            "The {fruit} were sweet, and they talked and laughed.",
        ),
        (
            "{h} learned that things taste better when you share them.",
            "From then on {h} always shared with others.",
        ),
    ),
    (  # the treasure
        (
            "One day {he} found an old map.",
            "Under a stone {h} found a letter with a map.",
        ),
        (
            "The map showed a way to the {p}.",
            "A {c} cross was painted on it, right in the {p}.",
        ),
        (
            '"Come with me!" {he} said to {f}.',
            "{h} showed it to {f}, and they set out at once.",
        ),
        (
            "They crossed a bridge and climbed a high hill.",
            "They walked through tall grass and over a small river.",
        ),
        (
            "In the {p} they dug a hole and found a box.",
            "Behind a big tree they saw a box made of wood.",
        ),
        (
            "There was a {c} {o} inside, and it shone like the sun.",
            "Inside was a {c} {o} and a note: a friend is the best treasure.",
        ),
        ("They went home tired and happy.", "They kept it for ever and told everyone the story."),
    ),
)
_ENDINGS = ("", "", " The end.", " That night {h} slept well.", " And they lived happily ever after.")
_SKILLS = ("swim", "sing", "dance", "read", "climb trees", "fly a kite", "bake bread", "play the drum")
_FRUITS = ("apples", "pears", "plums", "cherries", "peaches", "grapes", "bananas")


def _hero(rng: random.Random, kind: str | None) -> dict[str, str]:
    name = rng.choice(NAMES)
    boy = name in BOYS
    person = "boy" if boy else "girl"
    he, his, him = ("he", "his", "him") if boy else ("she", "her", "her")
    kind = kind or rng.choice((*CATEGORIES["an animal"], person, person, person))
    return {"h": name, "kind": kind, "he": he, "his": his, "him": him, "H": he.capitalize()}


def story(rng: random.Random, kind: str | None = None) -> str:
    """Return a story of six to nine sentences; its hero is of `kind`, such as "fox", or of any kind."""
    slots = _hero(rng, kind)
    slots["f"] = rng.choice([name for name in NAMES if name != slots["h"]])
    slots["p"], slots["q"] = rng.sample(PLACES, 2)
    for slot, words in (
        ("adj", _ADJECTIVES),
        ("home", _HOMES),
        ("weather", _WEATHERS),
        ("c", COLOURS),
        ("o", THINGS),
        ("skill", _SKILLS),
        ("fruit", _FRUITS),
    ):
        slots[slot] = rng.choice(words)
    beats = [rng.choice(beat) for beat in ((_OPENINGS), *rng.choice(_PLOTS))]
    return (" ".join(beats) + rng.choice(_ENDINGS)).format(**slots)


# ---------------------------------------------------------------------------------------------- documents


@dataclass(frozen=True)
class Turn:
    """A prompt and its completion, `<s>prompt completion</s>` in training. A story has an empty prompt."""

    prompt: str
    completion: str


Document = list[Turn]


def _small_talk(rng: random.Random) -> tuple[str, str]:
    """Return a message that is no task, and the reply."""
    animal = rng.choice(CATEGORIES["an animal"])
    name = rng.choice(NAMES)
    return rng.choice(
        (
            (rng.choice(("Hello!", "Hi!", "Good morning!", "Hello, how are you?")), "Hello! How can I help you?"),
            (rng.choice(("Thank you.", "Thanks!", "Thank you very much!")), "You are welcome!"),
            (rng.choice(("Goodbye!", "Bye!", "See you soon!")), "Goodbye! Have a nice day."),
            (rng.choice(("Who are you?", "What are you?")), "I am a tiny language model."),
            (f"My name is {name}.", f"Nice to meet you, {name}!"),
            (f"My name is {name}. What is my name?", f"Your name is {name}."),
            (
                "What can you do?",
                "I can add, compare, sort and count, remember facts and tell stories.",
            ),
            (f"Tell me a story about a {animal}.", story(rng, animal)),
            ("Tell me a story.", story(rng)),
        )
    )


def _chat(turns: list[tuple[str, str]], system: str | None = None) -> Document:
    """Return a dialog in Llama 2's form, each turn `[INST] question [/INST] answer ` with a blank at its end."""
    document = []
    for i, (question, answer) in enumerate(turns):
        if i == 0 and system is not None:
            question = f"<<SYS>>\n{system}\n<</SYS>>\n\n{question}"
        document.append(Turn(f"[INST] {question} [/INST]", answer + " "))
    return document


def _dialog(rng: random.Random) -> Document:
    """Draw a chat of one to three turns, seldom more, on tasks, small talk, or one set of facts."""
    system = rng.choice(SYSTEM_MESSAGES) if rng.random() < 0.3 else None
    kind = rng.random()
    if kind < 0.1:
        name = rng.choice(NAMES)
        first = [(rng.choice(("Who are you?", "What is your name?")), f"My name is {name}.")]
        return _chat(first, f"Your name is {name}.")
    if kind < 0.4:
        item = make_item("recall", rng, held_out=False)
        assert item.follow_up is not None
        return _chat([(item.question, item.answer), item.follow_up], system)
    turns = []
    for _ in range(rng.randint(1, 3) if rng.random() < 0.9 else rng.randint(4, 12)):
        if rng.random() < 0.4:
            turns.append(_small_talk(rng))
        else:
            item = make_item(_draw(rng, _SHARES), rng, held_out=False)
            turns.append((item.question, item.answer))
    return _chat(turns, system)


def _exercise(rng: random.Random) -> Document:
    """Draw a training item in one form."""
    item = make_item(_draw(rng, _SHARES), rng, held_out=False)
    form = _draw(rng, _FORM_SHARES)
    blank = " " if form in _CHAT else ""
    return [Turn(render(item, form, rng), item.answer + blank)]


def _story_document(rng: random.Random) -> Document:
    return [Turn("", story(rng))]


def documents(seed: int) -> Iterator[Document]:
    """Yield training documents without end: stories, exercises and dialogs."""
    rng = random.Random(f"train {seed}")
    kinds = (_exercise, _dialog, _story_document)
    while True:
        yield rng.choices(kinds, weights=(78, 9, 13))[0](rng)


# ---------------------------------------------------------------------------------------------- tokenizer text

# Ordinary English and code-like text, so that the tokenizer handles more than the grammar.
_PROSE = """
This is a list of common words that people use when they write to each other in English.
The weather has been good this week, but there will be more rain before the weekend.
Please write a short summary of the following text and explain the main idea in your own words.
Describe how a computer works, and give three examples of things that you can do with it.
What would you say if somebody asked you about the history of your country?
She said that she had never been there before, although her brother lives in the same street.
We should think about which of these ideas could be useful, and then choose the best one.
Most people know that water boils at 100 degrees and that the earth goes around the sun.
He wrote the first letter in the year 1984 and the second one only after a long time.
If you have any questions, do not be afraid to ask; I would be happy to help you.
There are many different ways to solve this problem, and some of them are quite simple.
Scientists believe that these animals came from another part of the world through the ocean.
Generate a list of five healthy meals, with the time that is needed to cook each of them.
The company makes products for people who work at home, such as chairs, desks and screens.
Because it was getting late, they decided to take the last train and return on Saturday.
Identify the subject of the sentence. Classify the items. Rewrite the paragraph. Translate it.
Create a new sentence that uses both words. Edit the text so that it is easy to understand.
He took his bag, closed the window, turned off the light and went down into the street.
Music, art and science have always been important for the life of every city in the world.
I think it's fine; you can't always get what you want, and that's why we don't complain.
Provide information about the system, including its name, number, type, value and state.
for i in range(10): print(i, x[i] * 2 - 1) # a comment; if (a < b && c > d) { return "text"; }
user@example.com, https://www.example.org/page?id=42&lang=en, 50% of $1,000, ~/data_file.txt
###, ---, ***, ..., !!!, ???, [1], (2), {3}, <4>, a/b, c\\d, e|f, g^h, `code`, 'quoted', "said"
"""
PRINTABLE = "".join(map(chr, range(33, 127)))


def tokenizer_lines(seed: int, count: int = 20_000) -> Iterator[str]:
    """Yield lines for training the tokenizer: `count` documents, a tenth as many stories, and English."""
    source = documents(seed)
    for _ in range(count):
        for turn in next(source):
            text = f"{turn.prompt} {turn.completion}".strip()
            yield from (line for line in text.split("\n") if line)
    rng = random.Random(f"tokenizer {seed}")
    yield from (story(rng) for _ in range(count // 10))
    for _ in range(count // 100):
        yield from _PROSE.strip().split("\n")
