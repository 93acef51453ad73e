"""Write a quantized checkpoint: `python scripts/quantize.py CKPT OUT --type int4 --group_size 32`."""

from llama.commands.quantize import start

if __name__ == "__main__":
    start()
