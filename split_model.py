"""Split a checkpoint into N shards, or merge one: `python3 split_model.py --ckpt_dir ckpts/7B --n 2`."""

from llama.commands.split import start

if __name__ == "__main__":
    start()
