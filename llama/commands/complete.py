"""Complete prompts or answer dialogs: `example.py`, `llama-shards complete`."""

from llama.cli import run
from llama.generation.command import run_tasks
from llama.generation.engine import EngineOptions
from llama.generation.sampling import Sampling
from llama.generation.tasks import Output, read_tasks
from llama.parallel import groups
from llama.runtime import RunOptions, model_or_bundled


def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    tuning_ckpt_path: str | None = None,
    prompts: str | None = None,
    prompt_file: str | None = None,
    dialogs: str | None = None,
    chat_format: str = "auto",
    echo: bool = False,
    sampling: Sampling = Sampling(temperature=0.8, top_p=0.95),
    output: Output = Output(),
    engine: EngineOptions = EngineOptions(),
    options: RunOptions = RunOptions(),
) -> None:
    """Run a Llama on any number of ranks, from any checkpoint layout.

    Args:
        ckpt_dir: folder of the weights, or LLMs-from-scratch's single .pth; without it, the bundled model.
        tokenizer_path: its tokenizer; by default beside the weights or one folder up.
        tuning_ckpt_path: a soft prompt or LoRA to run it with, as ft_main.py or PEFT writes it.
        prompts: a text to complete, or a JSON list of texts.
        prompt_file: a file with one prompt a line, or a .json list of texts.
        dialogs: a JSON file of dialogs to answer.
        chat_format: auto, llama2, llama3 or alpaca, for --dialogs.
        echo: show the prompt as part of the completion.
    """
    with groups.phase("settings"):
        ckpt_dir = model_or_bundled(ckpt_dir)
        tasks = read_tasks(prompts, prompt_file, dialogs, output, ckpt_dir, echo)
    run_tasks(
        tasks, sampling, output, engine, ckpt_dir, tokenizer_path, options,
        chat_format=chat_format, adapter=tuning_ckpt_path,
    )  # fmt: skip


def start() -> None:
    """Run `main`."""
    run(main)
