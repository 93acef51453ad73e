"""What `example.py` does: read prompts, run them, show what came."""

from __future__ import annotations

import json
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
TINY_PROMPTS = ("Once upon a time", "3 + 4 =")
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
        interact(llama, settings)
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
        return _prompts_of_file(Path(prompt_file))
    if prompts is not None:
        return _one_or_list(prompts, "--prompts")
    return list(TINY_PROMPTS if Path(ckpt_dir).name == "tiny" else PROMPTS)


def _one_or_list(text: str, where: str) -> list[str]:
    """A JSON list of texts, or the text itself where it is no JSON list."""
    if not text.lstrip().startswith("["):
        return [text]
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        return [text]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise LlamaError(f"{where} is a JSON list, but not of texts")
    if not values:
        raise LlamaError(f"{where} is an empty list: give at least one prompt")
    return values


def _prompts_of_file(path: Path) -> list[str]:
    """A JSON list of texts, or one prompt a line; blank lines are skipped."""
    text = read_text(path)
    if text.lstrip().startswith("[") and path.suffix == ".json":
        return _one_or_list(text, str(path))
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise LlamaError(f"{path} holds no prompt: write one a line, or a JSON list")
    return lines


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
    try:
        content = json.loads(read_text(Path(path)))
    except json.JSONDecodeError as error:
        raise LlamaError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, list) or not content:
        raise LlamaError(f'{path} holds no dialog: expected [[{{"role": "user", "content": "..."}}]]')
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
    for prompt in prompts:
        _say(f"{prompt}\n> ", end="")
        completion = _show_stream(llama, prompt, settings)
        _say(f"\n{_details(completion, settings)}{RULE}")
        records.append(_record(llama, {"prompt": prompt}, completion))
    return records


def _show_stream(llama: Llama, prompt: str, settings: Settings) -> Completion:
    completion = Completion()
    for item in llama.stream([prompt], echo=settings.echo, **settings.options()):
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


def interact(llama: Llama, settings: Settings) -> None:
    """Read prompts from the keyboard until the end of the input, or "exit"; ranks wait as long as it takes."""
    notice('type a prompt and press Enter; "exit" or Ctrl-D ends')
    while True:
        prompt = groups.broadcast_object(_ask() if is_speaker() else None)
        if prompt is None:
            return
        try:
            _show_stream(llama, prompt, settings)
            _say("")
        except LlamaError as error:  # such as a prompt that is too long: ask again
            notice(f"error: {error}")


def _ask() -> str | None:
    """The next line that is not blank; None at the end of the input."""
    while True:
        try:
            line = input("> ")
        except EOFError:
            return None
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
        LlamaError: when its folder is missing or it is a folder itself.
    """
    if path is None:
        return
    if Path(path).is_dir() or not Path(path).resolve().parent.is_dir():
        raise LlamaError(f"cannot write {path}: no such folder, or it is one")


def write_json(path: str | None, records: list[dict[str, Any]]) -> None:
    """Write the results on rank 0, beside and renamed, so that no half of a file is left; nothing without a path."""
    if path is None or not is_speaker():
        return
    partial = Path(f"{path}.partial")
    try:
        partial.write_text(json.dumps(records, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise LlamaError(f"cannot write {path}: {error.strerror}") from None


def _say(text: str, end: str = "\n") -> None:
    if is_speaker():
        print(text, end=end, flush=True)
