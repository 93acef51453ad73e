"""Answer instructions with what was tuned: `torchrun --nproc_per_node 4 example_ft.py --tuning_ckpt_path DIR`."""

from llama.commands.answer import start

if __name__ == "__main__":
    start()
