"""Texts, instructions and dialogs that the flags name, read and checked before a model is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.chat import Dialog, alpaca_prompt
from llama.data.templates import FORMATS
from llama.errors import LlamaError, UsageError
from llama.generation.engine import EngineOptions
from llama.generation.sampling import Sampling
from llama.plan.inference import Workload
from llama.tokenizer.texts import read_text

# The bundled model was trained for these; see ckpts/tiny/README.md.
TINY_PROMPTS = (
    "Once upon a time",
    "3 + 4 =",
    "Q: What is 27 + 15?\nA:",
    "Question: Sort these numbers: 42 7 63.\nAnswer:",
    "The reverse of dog hat boat is",
)
# Open ends, lists and few-shot tasks for larger models.
PROMPTS = (
    "I believe the meaning of life is",
    "Simply put, the theory of relativity states that ",
    "A short recipe for pancakes:\n1.",
    "Translate English to French:\n\ndog => chien\nhouse => maison\nbread => pain\ncheese =>",
)


# Instructions like those of datasets/alpaca_tiny.json, which holds none of these.
TINY_INSTRUCTIONS = (
    "What is 32 plus 12?",
    "Add 12 and 28.",
    "Which number is right after 682?",
    "Name the number before 899.",
    "Put these numbers in order: 91 98 74.",
)
INSTRUCTIONS = (
    "Explain to a child what a prime number is.",
    "Write a polite note that declines an invitation to dinner.",
    "Name three reasons to walk rather than drive, one line each.",
    "Write a Python function that says whether a year is a leap year.",
)


@dataclass(frozen=True)
class Output:
    """Length and display of what is generated.

    Args:
        max_gen_len: new tokens a prompt, at most.
        logprobs: show log-probabilities.
        stream: print tokens as they come, one prompt or dialog after another.
        interactive: read prompts from the keyboard.
        output_json: write prompts, completions, tokens and log-probabilities to this file.

    Raises:
        LlamaError: for a `max_gen_len` below 0.
    """

    max_gen_len: int | None = None
    logprobs: bool = False
    stream: bool = False
    interactive: bool = False
    output_json: str | None = None

    def __post_init__(self) -> None:
        if self.max_gen_len is not None and self.max_gen_len < 0:
            raise LlamaError(f"max_gen_len must be 0 or more, is {self.max_gen_len}")

    @property
    def has_logprobs(self) -> bool:
        """True where log-probabilities are wanted, on the screen or in the file."""
        return self.logprobs or self.output_json is not None

    def options(self, sampling: Sampling) -> dict[str, Any]:
        """Return keyword arguments for the methods of `Llama`."""
        return {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_gen_len": self.max_gen_len,
            "logprobs": self.has_logprobs,
        }


@dataclass(frozen=True)
class Tasks:
    """Texts or dialogs to run; none of either where texts are read from the keyboard.

    Args:
        prompts: texts.
        dialogs: in place of texts.
        template: one of `llama.data.templates.FORMATS`, into which texts are put as instructions.
        input: what the instructions are about.
        echo: whether a prompt is shown as part of its completion.
    """

    prompts: Sequence[str] = ()
    dialogs: Sequence[Dialog] = ()
    template: str | None = None
    input: str = ""
    echo: bool = False


def read_tasks(
    prompts: str | None, prompt_file: str | None, dialogs: str | None, output: Output, ckpt_dir: str, echo: bool = False
) -> Tasks:
    """Return the texts or dialogs that the flags ask for; built-in prompts when the flags ask for none.

    Raises:
        LlamaError: when the flags ask for several things, or for something that cannot be read.
    """
    sources = {"--prompts": prompts, "--prompt_file": prompt_file, "--dialogs": dialogs}
    given = [flag for flag, value in sources.items() if value is not None] + ["--interactive"] * output.interactive
    if len(given) > 1:
        raise LlamaError(f"{' and '.join(given)} are given together: choose one")
    if dialogs is not None:
        if echo:
            raise UsageError("--echo makes a prompt part of its completion, and a dialog has none: leave it out")
        tasks = Tasks(dialogs=read_dialogs(dialogs))
    elif output.interactive:
        tasks = Tasks(echo=echo)
    else:
        builtin = TINY_PROMPTS if is_tiny(ckpt_dir) else PROMPTS
        tasks = Tasks(read_texts(prompts, prompt_file, builtin, "--prompts"), echo=echo)
    check_writable(output.output_json)
    return tasks


def read_instructions(
    instructions: str | None, instruction_file: str | None, input: str, template: str, output: Output, ckpt_dir: str
) -> Tasks:
    """Return the instructions that the flags ask for; built-in ones when the flags ask for none.

    Raises:
        LlamaError: when the flags ask for several things, or for something that cannot be read.
    """
    if template not in FORMATS:
        raise UsageError(f"unknown template {template!r}: use {', '.join(FORMATS)}")
    if instructions is not None and instruction_file is not None:
        raise LlamaError("--instructions and --instruction_file are given together: choose one")
    given = instructions is not None or instruction_file is not None
    if output.interactive and given:
        raise LlamaError("--interactive reads instructions from the keyboard: leave the others out")
    if input and not (given or output.interactive):
        raise LlamaError("--input is what an instruction is about: add --instructions")
    _check_unicode(input, "--input")
    builtin = TINY_INSTRUCTIONS if is_tiny(ckpt_dir) else INSTRUCTIONS
    texts = [] if output.interactive else read_texts(instructions, instruction_file, builtin, "--instructions")
    check_writable(output.output_json)
    return Tasks(texts, template=template, input=input)


def expected_work(tasks: Tasks, output: Output, limits: EngineOptions) -> Workload:
    """Return the most that runs at a time: at most the limits, often less."""
    n_prompts = 1 if output.interactive or output.stream else len(tasks.prompts or tasks.dialogs)
    length = limits.max_seq_len
    if tasks.prompts and output.max_gen_len is not None:
        # A token is a byte at least; BOS and a leading space come on top.
        longest = max(len(_framed(prompt, tasks).encode()) for prompt in tasks.prompts) + 2
        length = min(length, longest + output.max_gen_len)
    return Workload(max(1, min(n_prompts, limits.max_batch_size)), max(1, length))


def _framed(text: str, tasks: Tasks) -> str:
    """Return a text at least as long as what the model reads: no template is longer than Alpaca's."""
    return text if tasks.template is None else alpaca_prompt(text, tasks.input)


def is_tiny(ckpt_dir: str) -> bool:
    """Return whether a path is that of the bundled model."""
    return Path(ckpt_dir).name == "tiny"


def read_texts(given: str | None, file: str | None, builtin: Sequence[str], flag: str) -> list[str]:
    """Return texts from a flag (a text or a JSON list), from a file, or built in.

    Raises:
        LlamaError: for an empty list, or a file that is missing, empty or not UTF-8.
    """
    if file is not None:
        texts = _texts_of_file(Path(file))
        _check_unicode(texts, file)
        return texts
    if given is not None:
        texts = _one_or_list(given, flag)
        _check_unicode(texts, flag)
        return texts
    return list(builtin)


def _one_or_list(text: str, where: str) -> list[str]:
    """Return a JSON list of texts, or the text itself if it is no JSON list."""
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
    """Refuse texts that no tokenizer can encode: bytes that were not UTF-8, or one half of a surrogate pair."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise LlamaError(f"{where}: a text is not valid Unicode; write it in UTF-8") from None


def _texts_of_file(path: Path) -> list[str]:
    """Read a JSON list of texts, or one prompt a line; blank lines are skipped."""
    text = read_text(path)
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise LlamaError(f"{path} holds no prompt: write one a line, or a JSON list in a .json file")
    return _list_of_texts(text, str(path)) if path.suffix == ".json" else lines


def read_dialogs(path: str) -> list[Dialog]:
    """Read the dialogs of a JSON file: a list of dialogs, or one dialog (a list of messages).

    Raises:
        LlamaError: when the file is missing, empty, no JSON or no list.
    """
    content = _parse_json(read_text(Path(path)), path)
    if not isinstance(content, list) or not content:
        raise LlamaError(f'{path} holds no dialog: expected [[{{"role": "user", "content": "..."}}]]')
    _check_unicode(content, path)
    return [content] if isinstance(content[0], dict) else content


def check_writable(path: str | None) -> None:
    """Refuse a result file that cannot be written, before the work rather than after it.

    Raises:
        LlamaError: when its folder is missing or not writable, or `path` is a folder itself.
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
