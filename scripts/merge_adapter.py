"""Fold a LoRA into a checkpoint: `python scripts/merge_adapter.py --ckpt_dir CKPT --adapter DIR --output OUT`."""

from llama.commands.merge import start

if __name__ == "__main__":
    start()
