"""Carry a checkpoint into another layout: `python scripts/convert.py --ckpt_dir ckpts/7B --to hf --output 7B-hf`."""

from llama.commands.convert import start

if __name__ == "__main__":
    start()
