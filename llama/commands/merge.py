"""Fold a LoRA into a checkpoint: `python scripts/merge_adapter.py --ckpt_dir CKPT --adapter DIR --output OUT`."""

from pathlib import Path

from llama.adapters.files import read_adapter
from llama.adapters.fold import merge_adapter
from llama.checkpoint.source import open_checkpoint
from llama.cli import run
from llama.device import parse_dtype


def main(
    ckpt_dir: str,
    adapter: str,
    output: str,
    to: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    tokenizer_path: str | None = None,
    force: bool = False,
) -> None:
    """Write a checkpoint with a LoRA folded in, which then runs anywhere without the adapter.

    Args:
        ckpt_dir: anything that example.py reads.
        adapter: the LoRA's folder, as ft_main.py or PEFT writes it.
        output: the folder to write, or the file for single.
        to: hf, meta, or single (the .pth of LLMs-from-scratch); by default the layout that the checkpoint has.
        dtype: convert to fp32, bf16 or fp16.
        max_shard_size: size of one safetensors file at most, such as 5GB or 500MiB.
        tokenizer_path: its tokenizer; by default beside the weights or one folder up.
        force: replace what an earlier merge, conversion or split wrote.
    """
    tuned = read_adapter(adapter, open_checkpoint(ckpt_dir).args)
    kind, name = parse_dtype(dtype) if dtype else None, Path(adapter).resolve().name
    written = merge_adapter(ckpt_dir, tuned, name, output, to, kind, max_shard_size, tokenizer_path, force)
    print(f"wrote {written}")
    print(f"run it: python3 example.py --ckpt_dir {written}")


def start() -> None:
    """Run `main`."""
    run(main)
