"""Perplexity of a text: `python scripts/perplexity.py ckpts/7B --text_file book.txt --quantize int4`."""

from llama.commands.perplexity import start

if __name__ == "__main__":
    start()
