"""Export a checkpoint for llama.cpp: `python scripts/export_gguf.py CKPT OUT.gguf --type q8_0`."""

from pathlib import Path

from llama.adapters.adapter import LoraAdapter, PromptAdapter
from llama.adapters.files import read_adapter
from llama.adapters.fold import with_adapter
from llama.checkpoint.source import open_checkpoint
from llama.cli import run
from llama.export.gguf import export_gguf
from llama.tokenizer import find_tokenizer, load_tokenizer


def main(
    ckpt_dir: str,
    output: str,
    type: str = "f16",
    tokenizer_path: str | None = None,
    chat_format: str = "auto",
    context_length: int | None = None,
    adapter: str | None = None,
    force: bool = False,
) -> None:
    """Write a checkpoint and its tokenizer as one GGUF file, and an Ollama Modelfile beside it.

    Args:
        ckpt_dir: anything that example.py reads.
        output: the file to write, such as model.gguf.
        type: f32, f16, bf16, q8_0 or q4_0.
        tokenizer_path: the tokenizer; by default beside the weights, or one folder up.
        chat_format: template in the file: auto, llama2, llama3, alpaca, plain or none; auto goes by the tokenizer,
            and with an adapter is alpaca.
        context_length: tokens that the model was made for; by default as its files or its geometry say.
        adapter: a result of ft_main.py or PEFT: a soft prompt becomes tokens, LoRA is folded into the weights.
        force: replace a file that exists.
    """
    checkpoint = open_checkpoint(ckpt_dir)
    tokenizer = load_tokenizer(find_tokenizer(ckpt_dir, tokenizer_path))
    tuned = None if adapter is None else read_adapter(adapter, checkpoint.args)
    prompt = tuned.prompt if isinstance(tuned, PromptAdapter) else None
    if isinstance(tuned, LoraAdapter):
        checkpoint = with_adapter(checkpoint, tuned, Path(str(adapter)).name)
    if tuned is not None and chat_format == "auto":
        chat_format = "alpaca"
    file = export_gguf(checkpoint, tokenizer, output, type, chat_format, context_length, force, prompt)
    print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB, {type}) and {file.parent / 'Modelfile'}")
    flags = " --jinja" if tuned else ""  # llama.cpp knows other templates than these by itself
    print(f"run it: llama-cli -m {file}{flags}, or: ollama create NAME -f {file.parent / 'Modelfile'}")


def start() -> None:
    """Run `main`; `CKPT OUT` are `--ckpt_dir CKPT --output OUT`."""
    run(main, n_words=2)
