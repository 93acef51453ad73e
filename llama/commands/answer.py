"""Answer instructions in the template of a tuned model: `example_ft.py`, `llama-shards answer`."""

from llama.cli import run
from llama.generation.command import run_tasks
from llama.generation.engine import EngineOptions
from llama.generation.sampling import Sampling
from llama.generation.tasks import Output, read_instructions
from llama.parallel import groups
from llama.runtime import RunOptions, model_or_bundled


def main(
    ckpt_dir: str | None = None,
    tuning_ckpt_path: str | None = None,
    tokenizer_path: str | None = None,
    instructions: str | None = None,
    instruction_file: str | None = None,
    input: str = "",
    template: str = "alpaca",
    sampling: Sampling = Sampling(temperature=0.0, top_p=0.95),
    output: Output = Output(),
    engine: EngineOptions = EngineOptions(),
    options: RunOptions = RunOptions(),
) -> None:
    """Put instructions into the template of a tuned model and answer them, on any number of ranks.

    Args:
        ckpt_dir: folder of the base's weights; without it, the bundled model.
        tuning_ckpt_path: folder or file of a soft prompt or LoRA; without it, the base alone answers.
        tokenizer_path: the base's tokenizer; by default beside the weights or one folder up.
        instructions: an instruction, or a JSON list of them; without any, some that are built in.
        instruction_file: a file with one instruction a line, or a .json list of texts.
        input: what the instructions are about.
        template: that of the training: alpaca, llama2, llama3 or plain.
        max_seq_len: tokens of template, instruction and answer together, at most; virtual ones do not count.
        max_batch_size: instructions that run at a time, at most.
        max_gen_len: new tokens an answer, at most.
        stream: print tokens as they come, one instruction after another.
        interactive: read instructions from the keyboard.
        output_json: write instructions, answers, tokens and log-probabilities to this file.
    """
    with groups.phase("settings"):
        ckpt_dir = model_or_bundled(ckpt_dir)
        tasks = read_instructions(instructions, instruction_file, input, template, output, ckpt_dir)
    run_tasks(tasks, sampling, output, engine, ckpt_dir, tokenizer_path, options, adapter=tuning_ckpt_path)


def start() -> None:
    """Run `main`."""
    run(main)
