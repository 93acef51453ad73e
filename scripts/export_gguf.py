"""Export a checkpoint for llama.cpp: `python scripts/export_gguf.py CKPT OUT.gguf --type q8_0`."""

from llama.commands.export import start

if __name__ == "__main__":
    start()
