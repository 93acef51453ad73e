"""Fine-tune a Llama: `torchrun --nproc_per_node 4 ft_main.py --ckpt_dir ckpts/7B_fs4 --dataset alpaca_data.json`."""

from llama.commands.tune import start

if __name__ == "__main__":
    start()
