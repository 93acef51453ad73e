"""Convert a checkpoint to another layout: `python scripts/convert.py --ckpt_dir ckpts/7B --to hf --output 7B-hf`."""

from llama.checkpoint.convert import convert
from llama.cli import run
from llama.device import parse_dtype


def main(
    ckpt_dir: str,
    to: str,
    output: str,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    tokenizer_path: str | None = None,
    force: bool = False,
) -> None:
    """Write a checkpoint in Hugging Face's, Meta's or LLMs-from-scratch's layout.

    Args:
        ckpt_dir: anything that example.py reads.
        to: hf, meta, or single (the .pth of LLMs-from-scratch).
        output: the folder to write, or the file for single.
        dtype: convert to fp32, bf16 or fp16.
        max_shard_size: size of one safetensors file at most, such as 5GB or 500MiB.
        tokenizer_path: its tokenizer; by default beside the weights or one folder up.
        force: replace what an earlier conversion or split wrote.
    """
    written = convert(
        ckpt_dir, to, output, parse_dtype(dtype) if dtype else None, max_shard_size, tokenizer_path, force
    )
    print(f"wrote {written}")
    print(f"run it: python3 example.py --ckpt_dir {written}")


def start() -> None:
    """Run `main`."""
    run(main)
