"""Split a checkpoint into N shards, or merge one: `python3 split_model.py --ckpt_dir ckpts/7B --n 2`."""

from pathlib import Path

from tqdm import tqdm

from llama.checkpoint import manifest
from llama.checkpoint.split import split
from llama.cli import run
from llama.device import parse_dtype
from llama.runtime import model_or_bundled


def main(
    ckpt_dir: str | None = None,
    n: int = 2,
    output_dir: str | None = None,
    names: str = "fs_consolidated",
    tensor_split: str | None = None,
    dtype: str | None = None,
    force: bool = False,
) -> None:
    """Rewrite a checkpoint into n shards, in a gigabyte of memory at most.

    Args:
        ckpt_dir: anything that example.py reads; without it, the bundled model.
        n: shards to write; 1 merges.
        output_dir: folder to write; by default <ckpt_dir>_fs<n>.
        names: fs_consolidated or consolidated, the stem of the files.
        tensor_split: weights of the shards, such as 3,1.
        dtype: convert to fp32, bf16 or fp16.
        force: replace the folder of an earlier split.
    """
    folder = split(
        model_or_bundled(ckpt_dir), n, output_dir, names, tensor_split, parse_dtype(dtype) if dtype else None, force
    )
    print(f"wrote {n} shard{'' if n == 1 else 's'} to {folder}")
    print(f"run them: torchrun --nproc_per_node {n} example.py --ckpt_dir {folder}")


def verify(folder: str) -> None:
    """Check every tensor of a written checkpoint against its manifest.

    Args:
        folder: folder that split_model.py or scripts/convert.py wrote; for a single file, the .pth.json beside it.
    """
    path = Path(folder)
    files = [file for pattern in ("*.pth", "*.safetensors") for file in path.glob(pattern)]
    size = sum(file.stat().st_size for file in files or [path.with_suffix("")] if file.exists())
    with tqdm(total=size, unit="B", unit_scale=True, desc="verifying", leave=False) as bar:
        n_tensors = manifest.verify(Path(folder), bar.update)
    print(f"{folder}: {n_tensors} tensors are what the manifest says")


def start() -> None:
    """Run `main`, or `verify` if `verify` is the first word."""
    run(main, verify=verify)
