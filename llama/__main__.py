"""Every command by its word: `llama-shards WORD`, and under torchrun `torchrun --nproc_per_node 4 -m llama WORD`."""

from __future__ import annotations

import difflib
import importlib
import sys

from llama.env import is_speaker
from llama.errors import UsageError

# Modules of `llama.commands`, each with a `start`.
COMMANDS = {
    "complete": "complete prompts or answer dialogs (example.py)",
    "answer": "answer instructions with what was tuned (example_ft.py)",
    "tune": "fine-tune on Alpaca records (ft_main.py)",
    "perplexity": "measure the perplexity of a text, and what quantizing costs",
    "plan": "say whether a model fits into memory, and suggest runs that do",
    "split": "cut a checkpoint into shards, or merge them (split_model.py)",
    "convert": "convert a checkpoint to another layout",
    "quantize": "write a checkpoint as int8 or int4",
    "merge": "fold a LoRA into a checkpoint",
    "export": "write a GGUF file for llama.cpp and Ollama",
    "download": "fetch a checkpoint from the hub or by Meta's link",
}


def start() -> None:
    """Run the command that the first word names; without a word, list them."""
    word, *flags = sys.argv[1:] or ["--help"]
    if word in ("--help", "-h"):
        if is_speaker():
            print(overview())
        return
    if word not in COMMANDS:
        refuse(word)
    sys.argv = [f"llama-shards {word}", *flags]
    importlib.import_module(f"llama.commands.{word}").start()


def overview() -> str:
    """Return the list of commands, one a line."""
    lines = [f"  {word:<12} {told}" for word, told in COMMANDS.items()]
    return "\n".join(["llama-shards COMMAND [--flag value ...]; COMMAND --help lists its flags", "", *lines])


def refuse(word: str) -> None:
    """Leave with code 2 and one line on a word that is no command."""
    from llama.cli import run  # imports torch

    def unknown() -> None:
        close = difflib.get_close_matches(word, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(COMMANDS)}"
        raise UsageError(f"unknown command {word!r}: {hint}")

    run(unknown, [])


if __name__ == "__main__":
    start()
