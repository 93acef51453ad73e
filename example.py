"""Complete prompts or answer dialogs: `torchrun --nproc_per_node 4 example.py --ckpt_dir ckpts/7B_fs4`."""

from pathlib import Path

from llama import Llama
from llama.cli import run
from llama.generation import command, tasks
from llama.parallel import groups
from llama.quantization.scheme import Asked

TINY = str(Path(__file__).parent / "ckpts" / "tiny")


def main(
    ckpt_dir: str = TINY, tokenizer_path: str | None = None, tuning_ckpt_path: str | None = None,
    prompts: str | None = None, prompt_file: str | None = None, dialogs: str | None = None,
    temperature: float = 0.8, top_p: float = 0.95, top_k: int | None = None,
    max_seq_len: int = 512, max_batch_size: int = 32, max_gen_len: int | None = None, seed: int = 1,
    dtype: str = "auto", device: str = "auto", threads: int | None = None, tensor_split: str | None = None,
    quantize: str | None = None, group_size: int | None = None,
    quantize_output: str | None = None, quantize_embedding: str | None = None, offload_layers: int = 0,
    compile: str = "auto",
    chat_format: str = "auto", logprobs: bool = False, echo: bool = False, stream: bool = False,
    interactive: bool = False, output_json: str | None = None, no_plan: bool = False,
) -> None:  # fmt: skip
    """Run a Llama on any number of ranks, from any checkpoint layout.

    Args:
        ckpt_dir: folder of the weights, or LLMs-from-scratch's single .pth; without it, the bundled model.
        tokenizer_path: its tokenizer; by default beside the weights or one folder up.
        tuning_ckpt_path: a soft prompt or LoRA to run it with, as ft_main.py or PEFT writes it.
        prompts: a text to complete, or a JSON list of texts.
        prompt_file: a file with one prompt a line, or a .json list of texts.
        dialogs: a JSON file of dialogs to answer.
        temperature: 0 is greedy.
        top_p: keep the most probable tokens until their probabilities sum to this.
        top_k: keep this many tokens.
        max_seq_len: tokens of prompt and completion together, at most.
        max_batch_size: prompts that run at a time, at most.
        max_gen_len: new tokens a prompt, at most.
        seed: of the sampling; the same text at any number of ranks.
        dtype: auto, fp32, bf16 or fp16.
        device: auto, cpu, cuda, cuda:N or mps.
        threads: CPU threads of each rank.
        tensor_split: weights of the ranks, such as 3,1.
        quantize: hold the weights as int8 or int4; by default as the checkpoint holds them.
        group_size: weights that share a scale in int4: 32, 64 or 128; by default 32.
        quantize_output: int8, int4 or none, for the output layer; by default int8.
        quantize_embedding: int8, int4 or none, for an embedding that is not the output layer; by default none.
        offload_layers: layers that stay in main memory and are streamed to the card.
        compile: on, off, or auto for where it pays.
        chat_format: auto, llama2, llama3 or alpaca, for --dialogs.
        logprobs: show log-probabilities.
        echo: show the prompt as part of the completion.
        stream: print tokens as they come, one prompt or dialog after another.
        interactive: read prompts from the keyboard.
        output_json: write prompts, completions, tokens and log-probabilities to this file.
        no_plan: load without asking first whether the memory suffices.
    """
    with groups.phase("settings"):
        settings = tasks.Settings(temperature, top_p, top_k, max_gen_len, logprobs or output_json is not None, echo)
        asked = tasks.read_tasks(prompts, prompt_file, dialogs, interactive, output_json, ckpt_dir, echo)
        work = tasks.expected_work(asked, settings, stream, max_batch_size, max_seq_len)
    llama = Llama.build(
        ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, seed=seed, dtype=dtype, device=device, threads=threads,
        tensor_split=tensor_split, chat_format=chat_format, plan=not no_plan and work, adapter=tuning_ckpt_path,
        quantize=Asked(quantize, group_size, quantize_output, quantize_embedding), offload_layers=offload_layers,
        compile=compile,
    )  # fmt: skip
    command.perform(llama, asked, settings, stream)


if __name__ == "__main__":
    run(main)
