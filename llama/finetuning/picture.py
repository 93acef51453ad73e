"""The losses of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Steps over which the drawn training loss is averaged, as a part of the run.
SMOOTHING = 0.03


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the losses in the lines of `metrics.jsonl` (see `llama.finetuning.logs`) into a PNG file."""
    training = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    evaluation = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    if training:
        steps, losses = zip(*training, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1)
        axes.plot(steps, smooth(losses), color="tab:blue", label="train")
    if evaluation:
        steps, losses = zip(*evaluation, strict=True)
        axes.plot(steps, losses, color="tab:orange", marker="o", markersize=4, label="eval")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if training or evaluation:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def smooth(values: Sequence[float]) -> list[float]:
    """Means over a window that looks back, shorter at the start."""
    width = max(1, round(SMOOTHING * len(values)))
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]
