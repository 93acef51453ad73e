"""Download a model, or check one: `python -m llama.download --model llama-3.2-1b`."""

from llama.commands.download import start

if __name__ == "__main__":
    start()
