"""Complete prompts or answer dialogs: `torchrun --nproc_per_node 4 example.py --ckpt_dir ckpts/7B_fs4`."""

from llama.commands.complete import start

if __name__ == "__main__":
    start()
