"""The `Vocabulary` of a Hugging Face `tokenizer.json`, where llama.cpp's kinds of tokenizer can express it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama.errors import TokenizerError
from llama.tokenizer.base import SPACE_MARK
from llama.tokenizer.vocabulary import UNUSED_SCORE, Kind, Vocabulary, check_bytes, halves

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
Step = Mapping[str, Any]


def vocabulary_of_json(spec: Step, byte_level: bool) -> Vocabulary:
    """Read the content of a `tokenizer.json`.

    Args:
        spec: the content.
        byte_level: true for tokens in GPT-2's alphabet of bytes (Llama 3), false for tokens with U+2581
            (Llama 1 and 2).

    Raises:
        TokenizerError: it cuts text in a way that llama.cpp's kinds of tokenizer do not express.
    """
    if spec["model"].get("type", "BPE") != "BPE":
        raise _refusal(f"its model is {spec['model']['type']}, not BPE")
    tokens, kinds = _tokens(spec)
    merges = [_halves(merge) for merge in spec["model"]["merges"]]
    if byte_level:
        return _byte_level(spec, tokens, kinds, merges)
    return _sentencepiece(spec, tokens, kinds, merges)


def _refusal(why: str) -> TokenizerError:
    return TokenizerError(
        f"tokenizer.json cannot be exported: {why}, which llama.cpp does not know; "
        "pass the tokenizer.model of this model instead, if there is one"
    )


def _halves(merge: str | Sequence[str]) -> tuple[str, str]:
    """Return the two tokens of a merge in either spelling, "left right" or a pair."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _tokens(spec: Step) -> tuple[list[str], list[Kind]]:
    """Return every token by id with its kind; unused ids get tokens of kind UNUSED."""
    vocab, unknown = spec["model"]["vocab"], spec["model"].get("unk_token")
    added = {token["id"]: token for token in spec.get("added_tokens") or []}
    by_id = {number: token for token, number in vocab.items()} | {i: token["content"] for i, token in added.items()}
    tokens, kinds = [], []
    for number in range(max(by_id) + 1):
        token = by_id.get(number)
        tokens.append(f"[UNUSED{number}]" if token is None else token)
        if token is None:
            kinds.append(Kind.UNUSED)
        elif token == unknown:
            kinds.append(Kind.UNKNOWN)
        elif number in added:
            kinds.append(Kind.CONTROL if added[number]["special"] else Kind.USER_DEFINED)
        elif spec["model"].get("byte_fallback") and _BYTE_PIECE.fullmatch(token):
            kinds.append(Kind.BYTE)
        else:
            kinds.append(Kind.NORMAL)
    return tokens, kinds


def _steps(step: Step | None) -> Iterator[Step]:
    """Yield the steps of a normalizer or pre-tokenizer, sequences taken apart."""
    if step and step["type"] == "Sequence":
        for inner in step.get("normalizers") or step.get("pretokenizers") or []:
            yield from _steps(inner)
    elif step:
        yield step


# -- byte-level ------------------------------------------------------------------------------------


def _byte_level(spec: Step, tokens: list[str], kinds: list[Kind], merges: list[tuple[str, str]]) -> Vocabulary:
    if list(_steps(spec.get("normalizer"))):
        raise _refusal("it rewrites text before cutting it")
    pattern = _pattern(list(_steps(spec.get("pre_tokenizer"))))
    remarks = []
    if pattern == "llama3" and not spec["model"].get("ignore_merges"):
        remarks.append("llama.cpp takes a whole word that is a token as it is, also where no merges lead to it")
    return Vocabulary(
        family="bpe",
        tokens=tokens,
        kinds=kinds,
        merges=[f"{left} {right}" for left, right in merges],
        pattern=pattern,
        remarks=remarks,
    )


def _pattern(steps: list[Step]) -> str:
    """Return the name of the rule that cuts text into words."""
    from llama.tokenizer.bpe import SPLIT_PATTERN

    *before, last = steps or [{"type": "none"}]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        raise _refusal("its text is cut into words by another rule than Llama 3's")
    if not before and last.get("use_regex", True):
        return "gpt2"
    splits = [step.get("pattern", {}).get("Regex") for step in before]
    if splits == [SPLIT_PATTERN] and before[0].get("behavior") == "Isolated" and not last.get("use_regex", True):
        return "llama3"
    raise _refusal("its text is cut into words by another rule than Llama 3's")


# -- SentencePiece's -------------------------------------------------------------------------------


def _sentencepiece(spec: Step, tokens: list[str], kinds: list[Kind], merges: list[tuple[str, str]]) -> Vocabulary:
    check_bytes(kinds)
    places = _places(merges)
    normal = {token for token, kind in zip(tokens, kinds, strict=True) if kind == Kind.NORMAL}
    _check_all_cuts(normal, merges)
    last = float(len(places))
    scores = {Kind.NORMAL: -last, Kind.UNUSED: UNUSED_SCORE}
    unknown = spec["model"].get("unk_token")
    return Vocabulary(
        family="spm",
        tokens=tokens,
        kinds=kinds,
        scores=[-float(places[t]) if t in places else scores.get(k, 0.0) for t, k in zip(tokens, kinds, strict=True)],
        space_prefix=_space_prefix(spec),
        unk_id=tokens.index(unknown) if unknown in tokens else -1,
        remarks=["llama.cpp puts a blank behind user-defined tokens"] if Kind.USER_DEFINED in kinds else [],
    )


def _places(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Return the place of every merged token in the order of merging: SentencePiece's score, negated.

    Raises:
        TokenizerError: a token's merges do not stand together, so that no single score says when.
    """
    places: dict[str, int] = {}
    previous = None
    for left, right in merges:
        token = left + right
        if token != previous and token in places:
            raise _refusal("its merges are not ordered by the token they make")
        places.setdefault(token, len(places))
        previous = token
    return places


def _check_all_cuts(normal: set[str], merges: list[tuple[str, str]]) -> None:
    """Refuse a file that lists only some merges, where SentencePiece would join any two tokens that spell a third."""
    listed = {(left, right) for left, right in merges if left in normal and right in normal}
    for left, right in (pair for token in normal for pair in halves(token, normal)):
        if (left, right) not in listed:
            raise _refusal(f"{left!r} and {right!r} make a token that its merges do not make of them")


def _space_prefix(spec: Step) -> bool:
    """Return True where a blank goes in front of every text.

    Raises:
        TokenizerError: text is rewritten or cut besides marking its blanks.
    """
    prefix = False
    for step in [*_steps(spec.get("normalizer")), *_steps(spec.get("pre_tokenizer"))]:
        if step["type"] == "Prepend" and step.get("prepend") == SPACE_MARK:
            prefix = True
        elif step["type"] == "Metaspace" and step.get("replacement") == SPACE_MARK and not step.get("split", True):
            prefix |= step.get("prepend_scheme", "always") != "never"
        elif not (step["type"] == "Replace" and step.get("pattern") == {"String": " "}):
            raise _refusal(f"its text goes through {step['type']}")
    return prefix
