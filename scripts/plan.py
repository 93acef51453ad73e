"""Will it fit? The needs of each rank beside its memory: `python scripts/plan.py --ckpt_dir ckpts/7B --nproc 2`."""

from llama.commands.plan import start

if __name__ == "__main__":
    start()
