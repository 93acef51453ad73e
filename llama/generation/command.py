"""What `example.py` and `example_ft.py` do: run what is asked, show what came."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.chat import Dialog
from llama.checkpoint.folders import replace_text
from llama.data.records import Record
from llama.data.templates import find_template
from llama.env import is_speaker, notice
from llama.errors import LlamaError
from llama.generation.llama import Completion, Llama, StreamedToken
from llama.generation.tasks import Settings, Tasks
from llama.parallel import groups

RULE = "\n==================================\n"


@dataclass(frozen=True)
class Query:
    """One text to continue.

    Args:
        prompt: what the model reads: a text or token ids.
        shown: what is printed above the answer.
        source: what `--output_json` says of it.
    """

    prompt: Any
    shown: str
    source: Mapping[str, str]


def perform(llama: Llama, tasks: Tasks, settings: Settings, streaming: bool) -> None:
    """Run the tasks, print results on rank 0 and the summary after them, write one record a result."""
    records: list[dict[str, Any]] = []
    if tasks.interactive:
        records = interact(llama, _reader(llama, tasks), settings)
    elif tasks.dialogs:
        records = (stream_chat if streaming else chat)(llama, tasks.dialogs, settings)
    else:
        queries = list(map(_reader(llama, tasks), tasks.prompts))
        records = (stream if streaming else complete)(llama, queries, settings)
    notice(llama.summary())
    write_json(tasks.output_json, records)


def _reader(llama: Llama, tasks: Tasks) -> Callable[[str], Query]:
    """How a text that a person gives becomes what the model reads: as it is, or as an instruction in a template."""
    if tasks.template is None:
        return lambda text: Query(text, text, {"prompt": text})
    template = find_template(tasks.template, llama.tokenizer)

    def instruct(text: str) -> Query:
        prompt = template.encode_prompt(Record(text, tasks.input, ""))
        shown = f"{text}\n{tasks.input}" if tasks.input else text
        return Query(prompt, shown, {"instruction": text, "input": tasks.input})

    return instruct


def complete(llama: Llama, queries: Sequence[Query], settings: Settings) -> list[dict[str, Any]]:
    """Run the queries as one call and print each with its completion."""
    completions = llama.collect([query.prompt for query in queries], echo=settings.echo, **settings.options())
    for query, completion in zip(queries, completions, strict=True):
        _say(f"{query.shown}\n> {completion.text}\n{_details(completion, settings)}{RULE}")
    return [_record(llama, query.source, c) for query, c in zip(queries, completions, strict=True)]


def stream(llama: Llama, queries: Sequence[Query], settings: Settings) -> list[dict[str, Any]]:
    """Run the queries one after another and print each token as it comes."""
    records = []
    for number, query in enumerate(queries):
        _say(f"{query.shown}\n> ", end="")
        completion = _show_stream(llama, query, number, settings)
        _say(f"\n{_details(completion, settings)}{RULE}")
        records.append(_record(llama, query.source, completion))
    return records


def _show_stream(llama: Llama, query: Query, number: int, settings: Settings) -> Completion:
    return _show(llama.stream([query.prompt], echo=settings.echo, first_index=number, **settings.options()))


def _show(items: Iterable[StreamedToken]) -> Completion:
    completion = Completion()
    for item in items:
        completion.add(item)
        _say(item.text, end="")
    return completion


def chat(llama: Llama, dialogs: Sequence[Dialog], settings: Settings) -> list[dict[str, Any]]:
    """Answer the dialogs as one call and print each with its answer."""
    answers = llama.answer(dialogs, **settings.options())
    for dialog, answer in zip(dialogs, answers, strict=True):
        _show_dialog(dialog)
        _say(f"> Assistant: {answer.text}\n{_details(answer, settings)}{RULE}")
    return [_record(llama, {"dialog": d}, a) for d, a in zip(dialogs, answers, strict=True)]


def stream_chat(llama: Llama, dialogs: Sequence[Dialog], settings: Settings) -> list[dict[str, Any]]:
    """Answer the dialogs one after another and print each token as it comes."""
    for number, dialog in enumerate(dialogs):
        llama.format.encode(dialog, number)  # raises before anything is shown
    records = []
    for number, dialog in enumerate(dialogs):
        _show_dialog(dialog)
        _say("> Assistant: ", end="")
        answer = _show(llama.stream_answer(dialog, first_index=number, **settings.options()))
        _say(f"\n{_details(answer, settings)}{RULE}")
        records.append(_record(llama, {"dialog": dialog}, answer))
    return records


def _show_dialog(dialog: Dialog) -> None:
    for message in dialog:
        _say(f"{message['role'].capitalize()}: {message['content']}\n")


def interact(llama: Llama, read: Callable[[str], Query], settings: Settings) -> list[dict[str, Any]]:
    """Read prompts from the keyboard until the end of the input, or "exit"; ranks wait as long as it takes."""
    notice('type a prompt and press Enter; "exit" or Ctrl-D ends')
    records: list[dict[str, Any]] = []
    while (prompt := groups.broadcast_object(_ask() if is_speaker() else None)) is not None:
        try:
            query = read(prompt)
            completion = _show_stream(llama, query, len(records), settings)
        except LlamaError as error:  # such as a prompt that is too long: ask again
            notice(f"error: {error}")
            continue
        _say("")
        records.append(_record(llama, query.source, completion))
    return records


def _ask() -> str | None:
    """The next line that is not blank; None at the end of the input."""
    while True:
        try:
            line = input("> ")
        except EOFError:
            return None
        except UnicodeDecodeError:
            notice("error: that line is not UTF-8")
            continue
        if line.strip() in ("exit", "quit"):
            return None
        if line.strip():
            return line


def _record(llama: Llama, source: Mapping[str, Any], completion: Completion) -> dict[str, Any]:
    """One entry of `--output_json`."""
    return {
        **source,
        "generation": completion.text,
        "token_ids": completion.tokens,
        "tokens": [llama.tokenizer.token_text(token) for token in completion.tokens],
        "logprobs": completion.logprobs,
        "finish_reason": completion.finish_reason,
    }


def _details(completion: Completion, settings: Settings) -> str:
    """The line that `--logprobs` adds."""
    if not settings.logprobs or not completion.logprobs:
        return ""
    mean = sum(completion.logprobs) / len(completion.logprobs)
    return f"({len(completion.tokens)} tokens, mean log-probability {mean:.4f} nats, {completion.finish_reason})\n"


def write_json(path: str | None, records: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> None:
    """Write the results on rank 0, beside and renamed, so that no half of a file is left; nothing without a path.

    Raises:
        LlamaError: on every rank, when the system refuses.
    """
    if path is None:
        return
    with groups.phase("results"):
        if is_speaker():
            replace_text(Path(path), json.dumps(records, ensure_ascii=False, indent=2) + "\n")


def _say(text: str, end: str = "\n") -> None:
    if is_speaker():
        print(text, end=end, flush=True)
