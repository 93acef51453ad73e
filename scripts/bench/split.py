"""Times of splitting a checkpoint beside a plain `cp` of the same files, their ratio, and peak memory.

    python scripts/bench/split.py --quick                        # a toy model
    python scripts/bench/split.py --folder /some/disk --n 4      # 13.5 GB of Llama 2 7B, three times that on disk

The two take turns, each in a process of its own, with the same page cache. The JSON file holds date, command and
machine as in `report.py`, settings, seconds of every run ("copy", "split"), their medians, the ratio split / copy, and
peak_resident_bytes of the splitting process (as `/usr/bin/time -v` counts them).
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from llama.checkpoint.params import to_params
from llama.checkpoint.table import specs
from llama.checkpoint.write import PthWriter
from llama.cli import run
from llama.config import ModelArgs
from llama.config import geometry as published_geometry
from llama.errors import LlamaError
from scripts.bench.report import beginning, write_json
from scripts.bench.weights import TINY

RANDOM_BYTES = 16 << 20


def write_random(folder: Path, args: ModelArgs) -> int:
    """Write `consolidated.00.pth` in fp16, of random bytes; return their number."""
    folder.mkdir(parents=True)
    layout = {name: (spec.shape, torch.float16) for name, spec in specs(args).items()}
    noise = torch.randint(0, 2**15, (RANDOM_BYTES // 2,), dtype=torch.int16).view(torch.float16)
    total = sum(torch.Size(shape).numel() * 2 for shape, _ in layout.values())
    with ThreadPoolExecutor(4) as workers, tqdm(total=total, unit="B", unit_scale=True, desc="writing") as bar:
        writer = PthWriter(folder / "consolidated.00.pth", layout, workers)
        for name, (shape, _) in layout.items():
            left = torch.Size(shape).numel()
            while left:
                part = noise[: min(left, len(noise))]
                for future in writer.append(name, part):
                    future.result()
                left -= len(part)
                bar.update(part.nbytes)
        writer.finish()
    (folder / "params.json").write_text(json.dumps(to_params(args)) + "\n")
    return total


def timed(command: list[str]) -> tuple[float, int]:
    """Run a command to its end; return its seconds and peak resident bytes."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise LlamaError(f"{' '.join(command)} failed: {said.strip().splitlines()[-1:]}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def main(
    geometry: str = "llama-2-7b",
    n: int = 4,
    folder: str | None = None,
    repeats: int = 3,
    output_json: str | None = None,
    quick: bool = False,
) -> None:
    """Split a random checkpoint beside a cp of it.

    Args:
        geometry: a published geometry.
        n: shards to write.
        folder: to work in; by default a temporary folder.
        repeats: runs of each; the median counts.
        output_json: write the figures to this file.
        quick: a toy model and one run of each.
    """
    args, repeats = (TINY, 1) if quick else (published_geometry(geometry), repeats)
    script = str(Path(__file__).resolve().parents[2] / "split_model.py")
    with tempfile.TemporaryDirectory(dir=folder) as work:
        source = Path(work) / "model"
        n_bytes = write_random(source, args)
        seconds: dict[str, list[float]] = {"copy": [], "split": []}
        peak = 0
        for _ in range(repeats):
            for name, command in (
                ("copy", ["cp", "-r", str(source), f"{work}/copy"]),
                ("split", [sys.executable, script, "--ckpt_dir", str(source), "--n", str(n)]),
            ):
                taken, resident = timed(command)
                seconds[name].append(taken)
                peak = max(peak, resident) if name == "split" else peak
                shutil.rmtree(f"{work}/copy" if name == "copy" else f"{source}_fs{n}")
    medians = {name: statistics.median(runs) for name, runs in seconds.items()}
    ratio = medians["split"] / medians["copy"]
    print(f"{n_bytes / 1e9:.2f} GB into {n} shards, median of {repeats}")
    print(f"cp           {medians['copy']:8.2f} s")
    print(f"split_model  {medians['split']:8.2f} s   {ratio:.2f} times cp   peak memory {peak / 2**30:.2f} GiB")
    if output_json is not None:
        settings = {"geometry": geometry, "n": n, "bytes": n_bytes, "repeats": repeats}
        report = {
            **beginning(torch.device("cpu")), "settings": settings, "seconds": seconds, "medians": medians,
            "ratio": ratio, "peak_resident_bytes": peak,
        }  # fmt: skip
        write_json(output_json, report)


if __name__ == "__main__":
    run(main)
