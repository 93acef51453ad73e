"""Answer instructions with what was tuned: `torchrun --nproc_per_node 4 example_ft.py --tuning_ckpt_path DIR`."""

from pathlib import Path

from llama import Llama
from llama.cli import run
from llama.generation import command, tasks
from llama.parallel import groups
from llama.quantization.scheme import Asked

TINY = str(Path(__file__).parent / "ckpts" / "tiny")


def main(
    ckpt_dir: str = TINY, tuning_ckpt_path: str | None = None, tokenizer_path: str | None = None,
    instructions: str | None = None, instruction_file: str | None = None, input: str = "", template: str = "alpaca",
    temperature: float = 0.0, top_p: float = 0.95, top_k: int | None = None,
    max_seq_len: int = 512, max_batch_size: int = 32, max_gen_len: int | None = None, seed: int = 1,
    dtype: str = "auto", device: str = "auto", threads: int | None = None, tensor_split: str | None = None,
    quantize: str | None = None, group_size: int | None = None,
    quantize_output: str | None = None, quantize_embedding: str | None = None, offload_layers: int = 0,
    compile: str = "auto",
    logprobs: bool = False, stream: bool = False,
    interactive: bool = False, output_json: str | None = None, no_plan: bool = False,
) -> None:  # fmt: skip
    """Put instructions into the template of a tuned model and answer them, on any number of ranks.

    Args:
        ckpt_dir: folder of the base's weights; without it, the bundled model.
        tuning_ckpt_path: folder or file of a soft prompt or LoRA; without it, the base alone answers.
        tokenizer_path: the base's tokenizer; by default beside the weights or one folder up.
        instructions: an instruction, or a JSON list of them; without any, some that are built in.
        instruction_file: a file with one instruction a line, or a .json list of texts.
        input: what the instructions are about.
        template: that of the training: alpaca, llama2, llama3 or plain.
        temperature: 0 is greedy.
        top_p: keep the most probable tokens until their probabilities sum to this.
        top_k: keep this many tokens.
        max_seq_len: tokens of template, instruction and answer together, at most; virtual ones do not count.
        max_batch_size: instructions that run at a time, at most.
        max_gen_len: new tokens an answer, at most.
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
        logprobs: show log-probabilities.
        stream: print tokens as they come, one instruction after another.
        interactive: read instructions from the keyboard.
        output_json: write instructions, answers, tokens and log-probabilities to this file.
        no_plan: load without asking first whether the memory suffices.
    """
    with groups.phase("settings"):
        settings = tasks.Settings(temperature, top_p, top_k, max_gen_len, logprobs or output_json is not None)
        asked = tasks.read_instructions(
            instructions, instruction_file, input, template, interactive, output_json, ckpt_dir
        )
        work = tasks.expected_work(asked, settings, stream, max_batch_size, max_seq_len)
    llama = Llama.build(
        ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, seed=seed, dtype=dtype, device=device,
        tensor_split=tensor_split, threads=threads, plan=not no_plan and work, adapter=tuning_ckpt_path,
        quantize=Asked(quantize, group_size, quantize_output, quantize_embedding), offload_layers=offload_layers,
        compile=compile,
    )  # fmt: skip
    command.perform(llama, asked, settings, stream)


if __name__ == "__main__":
    run(main)
