"""What `example.py` does: read prompts, run them, show what came."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.chat import Dialog
from llama.checkpoint.activations import Workload
from llama.console import is_speaker, notice
from llama.errors import LlamaError
from llama.generation.llama import Completion, Llama
from llama.generation.sampling import Sampling
from llama.parallel import groups

RULE = "\n==================================\n"

# The bundled model was trained for these; see ckpts/tiny/README.md.
TINY_PROMPTS = (
    "Once upon a time",
    "3 + 4 =",
    "Q: What is 27 + 15?\nA:",
    "Question: Sort these numbers: 42 7 63.\nAnswer:",
    "The reverse of dog hat boat is",
)
# Open ends, lists and few-shot tasks for a model that has read more.
PROMPTS = (
    "I believe the meaning of life is",
    "Simply put, the theory of relativity states that ",
    "A short recipe for pancakes:\n1.",
    "Translate English to French:\n\ndog => chien\nhouse => maison\nbread => pain\ncheese =>",
)


@dataclass(frozen=True)
class Settings:
    """How `example.py` generates: the arguments of `Llama.stream`, and how results are shown."""

    temperature: float
    top_p: float
    top_k: int | None
    max_gen_len: int | None
    logprobs: bool = False
    echo: bool = False

    def __post_init__(self) -> None:
        Sampling(self.temperature, self.top_p, self.top_k)  # raises before anything is loaded
        if self.max_gen_len is not None and self.max_gen_len < 0:
            raise LlamaError(f"max_gen_len must be 0 or more, is {self.max_gen_len}")

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the methods of `Llama`."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "max_gen_len": self.max_gen_len,
            "logprobs": self.logprobs,
        }


@dataclass(frozen=True)
class Tasks:
    """What is to be run: one of texts, dialogs, or whatever is typed."""

    prompts: Sequence[str] = ()
    dialogs: Sequence[Dialog] = ()
    interactive: bool = False


def read_tasks(
    prompts: str | None, prompt_file: str | None, dialogs: str | None, interactive: bool, ckpt_dir: str
) -> Tasks:
    """What the flags ask for; built-in prompts when they ask for nothing.

    Raises:
        LlamaError: when they ask for several things, or for something that cannot be read.
    """
    sources = {"--prompts": prompts, "--prompt_file": prompt_file, "--dialogs": dialogs}
    given = [flag for flag, value in sources.items() if value is not None] + ["--interactive"] * interactive
    if len(given) > 1:
        raise LlamaError(f"{' and '.join(given)} are given together: choose one")
    if dialogs is not None:
        return Tasks(dialogs=read_dialogs(dialogs))
    return Tasks(interactive=True) if interactive else Tasks(read_prompts(prompts, prompt_file, ckpt_dir))


def expected_work(tasks: Tasks, settings: Settings, streaming: bool, max_batch_size: int, max_seq_len: int) -> Workload:
    """What the tasks are going to need at a time: at most the limits, often less."""
    n_prompts = 1 if tasks.interactive or (streaming and tasks.prompts) else len(tasks.prompts or tasks.dialogs)
    length = max_seq_len
    if tasks.prompts and settings.max_gen_len is not None:
        # A token is a byte at least; BOS and a leading space come on top.
        longest = max(len(prompt.encode()) for prompt in tasks.prompts) + 2
        length = min(length, longest + settings.max_gen_len)
    return Workload(max(1, min(n_prompts, max_batch_size)), max(1, length))


def perform(llama: Llama, tasks: Tasks, settings: Settings, streaming: bool) -> list[dict[str, Any]]:
    """Run the tasks, print results on rank 0 and the summary after them; one record a result."""
    records: list[dict[str, Any]] = []
    if tasks.interactive:
        records = interact(llama, settings)
    elif tasks.dialogs:
        records = chat(llama, tasks.dialogs, settings)
    else:
        records = (stream if streaming else complete)(llama, tasks.prompts, settings)
    notice(llama.summary())
    return records


def read_prompts(prompts: str | None, prompt_file: str | None, ckpt_dir: str) -> list[str]:
    """The texts to complete: from a flag (a text or a JSON list), a file, or built in.

    Raises:
        LlamaError: for an empty list, or a file that is missing, empty or not UTF-8.
    """
    if prompt_file is not None:
        texts = _prompts_of_file(Path(prompt_file))
        _check_unicode(texts, prompt_file)
        return texts
    if prompts is not None:
        texts = _one_or_list(prompts, "--prompts")
        _check_unicode(texts, "--prompts")
        return texts
    return list(TINY_PROMPTS if Path(ckpt_dir).name == "tiny" else PROMPTS)


def _one_or_list(text: str, where: str) -> list[str]:
    """A JSON list of texts, or the text itself where it is no JSON list."""
    try:
        is_list = isinstance(json.loads(text), list)
    except ValueError:
        is_list = False
    return _list_of_texts(text, where) if is_list else [text]


def _list_of_texts(text: str, where: str) -> list[str]:
    values = _parse_json(text, where)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise LlamaError(f'{where} must be a JSON list of texts, such as ["one", "two"]')
    if not values:
        raise LlamaError(f"{where} is an empty list: give at least one prompt")
    return values


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise LlamaError(f"{where} is not JSON: {error}") from None


def _check_unicode(content: Any, where: str) -> None:
    """Refuse what no tokenizer can encode: bytes that were no UTF-8, or one half of a surrogate pair."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise LlamaError(f"{where}: a text is not valid Unicode; write it in UTF-8") from None


def _prompts_of_file(path: Path) -> list[str]:
    """A JSON list of texts, or one prompt a line; blank lines are skipped."""
    text = read_text(path)
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise LlamaError(f"{path} holds no prompt: write one a line, or a JSON list in a .json file")
    return _list_of_texts(text, str(path)) if path.suffix == ".json" else lines


def read_text(path: Path) -> str:
    """A UTF-8 file's text, or a `LlamaError` that names the file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise LlamaError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise LlamaError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None


def read_dialogs(path: str) -> list[Dialog]:
    """Dialogs of a JSON file: a list of dialogs, or one dialog (a list of messages).

    Raises:
        LlamaError: when it is missing, empty, no JSON or no list.
    """
    content = _parse_json(read_text(Path(path)), path)
    if not isinstance(content, list) or not content:
        raise LlamaError(f'{path} holds no dialog: expected [[{{"role": "user", "content": "..."}}]]')
    _check_unicode(content, path)
    return [content] if isinstance(content[0], dict) else content


def complete(llama: Llama, prompts: Sequence[str], settings: Settings) -> list[dict[str, Any]]:
    """Run the prompts as one call and print each with its completion."""
    completions = llama.collect(prompts, echo=settings.echo, **settings.options())
    for prompt, completion in zip(prompts, completions, strict=True):
        _say(f"{prompt}\n> {completion.text}\n{_details(completion, settings)}{RULE}")
    return [_record(llama, {"prompt": p}, c) for p, c in zip(prompts, completions, strict=True)]


def stream(llama: Llama, prompts: Sequence[str], settings: Settings) -> list[dict[str, Any]]:
    """Run the prompts one after another and print each token as it comes."""
    records = []
    for number, prompt in enumerate(prompts):
        _say(f"{prompt}\n> ", end="")
        completion = _show_stream(llama, prompt, number, settings)
        _say(f"\n{_details(completion, settings)}{RULE}")
        records.append(_record(llama, {"prompt": prompt}, completion))
    return records


def _show_stream(llama: Llama, prompt: str, number: int, settings: Settings) -> Completion:
    completion = Completion()
    for item in llama.stream([prompt], echo=settings.echo, first_index=number, **settings.options()):
        completion.add(item)
        _say(item.text, end="")
    return completion


def chat(llama: Llama, dialogs: Sequence[Dialog], settings: Settings) -> list[dict[str, Any]]:
    """Answer the dialogs as one call and print each with its answer."""
    answers = llama.answer(dialogs, **settings.options())
    for dialog, answer in zip(dialogs, answers, strict=True):
        for message in dialog:
            _say(f"{message['role'].capitalize()}: {message['content']}\n")
        _say(f"> Assistant: {answer.text}\n{_details(answer, settings)}{RULE}")
    return [_record(llama, {"dialog": d}, a) for d, a in zip(dialogs, answers, strict=True)]


def interact(llama: Llama, settings: Settings) -> list[dict[str, Any]]:
    """Read prompts from the keyboard until the end of the input, or "exit"; ranks wait as long as it takes."""
    notice('type a prompt and press Enter; "exit" or Ctrl-D ends')
    records: list[dict[str, Any]] = []
    while (prompt := groups.broadcast_object(_ask() if is_speaker() else None)) is not None:
        try:
            completion = _show_stream(llama, prompt, len(records), settings)
        except LlamaError as error:  # such as a prompt that is too long: ask again
            notice(f"error: {error}")
            continue
        _say("")
        records.append(_record(llama, {"prompt": prompt}, completion))
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


def _record(llama: Llama, source: dict[str, Any], completion: Completion) -> dict[str, Any]:
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


def check_writable(path: str | None) -> None:
    """Whether a result file can be written, told before the work rather than after it.

    Raises:
        LlamaError: when its folder is missing or closed, or it is a folder itself.
    """
    if path is None:
        return
    target = Path(path).resolve()
    if target.is_dir():
        raise LlamaError(f"cannot write {path}: it is a folder, give the name of a file")
    if not target.parent.is_dir():
        raise LlamaError(f"cannot write {path}: there is no folder {target.parent}, make it first")
    if not os.access(target.parent, os.W_OK):
        raise LlamaError(f"cannot write {path}: you may not write to {target.parent}")


def write_json(path: str | None, records: list[dict[str, Any]]) -> None:
    """Write the results on rank 0, beside and renamed, so that no half of a file is left; nothing without a path.

    Raises:
        LlamaError: on every rank, when the system refuses.
    """
    if path is None:
        return
    with groups.phase("results"):
        if is_speaker():
            _replace(Path(path), json.dumps(records, ensure_ascii=False, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise LlamaError(f"cannot write {path}: {error.strerror}") from None


def _say(text: str, end: str = "\n") -> None:
    if is_speaker():
        print(text, end=end, flush=True)
