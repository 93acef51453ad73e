"""The tasks of `example.py` and `example_ft.py`, run on a model, printed and written to a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.chat import Dialog
from llama.checkpoint.folders import replace_text
from llama.data.records import Record
from llama.data.templates import find_template
from llama.env import is_speaker, notice
from llama.errors import LlamaError
from llama.generation.engine import EngineOptions
from llama.generation.llama import Completion, Llama, StreamedToken
from llama.generation.sampling import Sampling
from llama.generation.tasks import Output, Tasks, expected_work
from llama.parallel import groups
from llama.runtime import RunOptions

RULE = "\n==================================\n"


@dataclass(frozen=True)
class Query:
    """One text to continue.

    Args:
        prompt: what the model reads: a text or token ids.
        shown: text that is printed above the answer.
        source: entries of `--output_json` that say what was asked.
    """

    prompt: Any
    shown: str
    source: Mapping[str, str]


def run_tasks(
    tasks: Tasks, sampling: Sampling, output: Output, engine: EngineOptions, ckpt_dir: str,
    tokenizer_path: str | None, options: RunOptions, **settings: Any,
) -> None:  # fmt: skip
    """Load a model, run the tasks, print results and a summary on rank 0, and write a record for each result.

    Args:
        tasks: texts or dialogs.
        sampling: choice of tokens.
        output: length and display.
        engine, ckpt_dir, tokenizer_path, options, settings: as in `Llama.open`.
    """
    llama = Llama.open(
        ckpt_dir, tokenizer_path, engine, options, seed=sampling.seed, expected=expected_work(tasks, output, engine),
        **settings,
    )  # fmt: skip
    runner = _Runner(llama, tasks, output, output.options(sampling))
    records = runner.run()
    notice(llama.summary())
    write_json(output.output_json, records)


@dataclass(frozen=True)
class _Runner:
    """Tasks on a model.

    Args:
        llama: loaded.
        tasks, output: as the flags say.
        options: keyword arguments of the methods of `Llama`.
    """

    llama: Llama
    tasks: Tasks
    output: Output
    options: dict[str, Any]

    def run(self) -> list[dict[str, Any]]:
        """Run and print everything; return a record a result."""
        if self.output.interactive:
            return self.interact()
        if self.tasks.dialogs:
            return self.stream_chat() if self.output.stream else self.chat()
        queries = [self.query(text) for text in self.tasks.prompts]
        return self.stream(queries) if self.output.stream else self.complete(queries)

    def query(self, text: str) -> Query:
        """Return what the model reads for a text: the text as it is, or as an instruction in a template."""
        tasks = self.tasks
        if tasks.template is None:
            return Query(text, text, {"prompt": text})
        template = find_template(tasks.template, self.llama.tokenizer)
        prompt = template.encode_prompt(Record(text, tasks.input, ""))
        shown = f"{text}\n{tasks.input}" if tasks.input else text
        return Query(prompt, shown, {"instruction": text, "input": tasks.input})

    def complete(self, queries: Sequence[Query]) -> list[dict[str, Any]]:
        """Run the queries as one call and print each with its completion."""
        completions = self.llama.collect([q.prompt for q in queries], echo=self.tasks.echo, **self.options)
        for query, completion in zip(queries, completions, strict=True):
            _say(f"{query.shown}\n> {completion.text}\n{self.details(completion)}{RULE}")
        return [self.record(query.source, c) for query, c in zip(queries, completions, strict=True)]

    def stream(self, queries: Sequence[Query]) -> list[dict[str, Any]]:
        """Run the queries one after another and print each token as it comes."""
        records = []
        for number, query in enumerate(queries):
            _say(f"{query.shown}\n> ", end="")
            completion = self.show_stream(query, number)
            _say(f"\n{self.details(completion)}{RULE}")
            records.append(self.record(query.source, completion))
        return records

    def show_stream(self, query: Query, number: int) -> Completion:
        """Print the tokens of a query as they come."""
        return _show(self.llama.stream([query.prompt], echo=self.tasks.echo, first_index=number, **self.options))

    def chat(self) -> list[dict[str, Any]]:
        """Answer the dialogs as one call and print each with its answer."""
        dialogs = self.tasks.dialogs
        answers = self.llama.answer(dialogs, **self.options)
        for dialog, answer in zip(dialogs, answers, strict=True):
            _show_dialog(dialog)
            _say(f"> Assistant: {answer.text}\n{self.details(answer)}{RULE}")
        return [self.record({"dialog": d}, a) for d, a in zip(dialogs, answers, strict=True)]

    def stream_chat(self) -> list[dict[str, Any]]:
        """Answer the dialogs one after another and print each token as it comes."""
        for number, dialog in enumerate(self.tasks.dialogs):
            self.llama.format.encode(dialog, number)  # raises before anything is shown
        records = []
        for number, dialog in enumerate(self.tasks.dialogs):
            _show_dialog(dialog)
            _say("> Assistant: ", end="")
            answer = _show(self.llama.stream_answer(dialog, first_index=number, **self.options))
            _say(f"\n{self.details(answer)}{RULE}")
            records.append(self.record({"dialog": dialog}, answer))
        return records

    def interact(self) -> list[dict[str, Any]]:
        """Read prompts from the keyboard until the end of the input, or "exit"; ranks wait as long as it takes."""
        notice('type a prompt and press Enter; "exit" or Ctrl-D ends')
        records: list[dict[str, Any]] = []
        while (prompt := groups.broadcast_object(_ask() if is_speaker() else None)) is not None:
            try:
                query = self.query(prompt)
                completion = self.show_stream(query, len(records))
            except LlamaError as error:  # such as a prompt that is too long: ask again
                notice(f"error: {error}")
                continue
            _say("")
            records.append(self.record(query.source, completion))
        return records

    def record(self, source: Mapping[str, Any], completion: Completion) -> dict[str, Any]:
        """Return one entry of `--output_json`."""
        return {
            **source,
            "generation": completion.text,
            "token_ids": completion.tokens,
            "tokens": [self.llama.tokenizer.token_text(token) for token in completion.tokens],
            "logprobs": completion.logprobs,
            "finish_reason": completion.finish_reason,
        }

    def details(self, completion: Completion) -> str:
        """Return the line that `--logprobs` adds."""
        if not self.output.has_logprobs or not completion.logprobs:
            return ""
        mean = sum(completion.logprobs) / len(completion.logprobs)
        return f"({len(completion.tokens)} tokens, mean log-probability {mean:.4f} nats, {completion.finish_reason})\n"


def _show(items: Iterable[StreamedToken]) -> Completion:
    """Print tokens as they come."""
    completion = Completion()
    for item in items:
        completion.add(item)
        _say(item.text, end="")
    return completion


def _show_dialog(dialog: Dialog) -> None:
    for message in dialog:
        _say(f"{message['role'].capitalize()}: {message['content']}\n")


def _ask() -> str | None:
    """Return the next line that is not blank; None at the end of the input."""
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


def write_json(path: str | None, records: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> None:
    """Write the results on rank 0, to a temporary file that is then renamed, so that no partial file is left.

    Args:
        path: the file; None to write nothing.
        records: JSON content.

    Raises:
        LlamaError: on every rank, when the file cannot be written.
    """
    if path is None:
        return
    with groups.phase("results"):
        if is_speaker():
            replace_text(Path(path), json.dumps(records, ensure_ascii=False, indent=2) + "\n")


def _say(text: str, end: str = "\n") -> None:
    if is_speaker():
        print(text, end=end, flush=True)
