"""The log of a run: a progress bar, `metrics.jsonl`, TensorBoard, and a picture of the losses at the end.

Only the speaking rank logs. A line of `metrics.jsonl` is an evaluation (`step`, `eval_loss`) or a step: `step`,
`epoch`, `loss` in nats, `lr`, `grad_norm`, `tokens` of the examples without padding and virtual tokens, `seconds`, and
`memory`, this rank's peak in bytes.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llama.checkpoint.folders import replace_text
from llama.env import notice

METRICS, PICTURE, TENSORBOARD = "metrics.jsonl", "loss.png", "tensorboard"
# Lines that a run prints where stderr is no terminal and so has no bar.
N_LINES = 10
# Width of the window over which the drawn training loss is averaged, as a fraction of the run.
SMOOTHING = 0.03


class RunLog:
    """The log of one run.

    Args:
        folder: of the run.
        n_done: steps done before; lines of later steps are dropped, since those steps run again.
        n_steps: steps of the whole run.
    """

    def __init__(self, folder: Path, n_done: int, n_steps: int) -> None:
        self.folder, self.n_steps = folder, n_steps
        self._given_up: set[str] = set()
        self.lines = _lines(folder / METRICS, n_done)
        replace_text(folder / METRICS, "".join(json.dumps(line) + "\n" for line in self.lines))
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        self._board = _board(folder / TENSORBOARD, n_done)
        self._draws = sys.stderr.isatty()
        self._bar = tqdm(
            total=n_steps, initial=n_done, unit="step", desc="training", disable=not self._draws, dynamic_ncols=True
        )

    def step(self, line: dict[str, Any]) -> None:
        """Log an optimiser step."""
        self._write(line)
        speed = line["tokens"] / line["seconds"]
        self._bar.set_postfix_str(
            f"loss {line['loss']:.4f}, lr {line['lr']:.2e}, {speed:,.0f} tokens/s, {line['memory'] / 1e9:.2f} GB",
            refresh=False,
        )
        self._bar.update()
        if not self._draws and (line["step"] == self.n_steps or line["step"] % max(1, self.n_steps // N_LINES) == 0):
            notice(
                f"step {line['step']}/{self.n_steps}: loss {line['loss']:.4f}, lr {line['lr']:.2e}, "
                f"{speed:,.0f} tokens/s, {line['memory'] / 1e9:.2f} GB, {_left(self.lines, self.n_steps)} left"
            )

    def evaluation(self, step: int, loss: float) -> None:
        """Log the loss on the examples set aside, in nats."""
        self._write({"step": step, "eval_loss": loss})
        self.say(f"step {step}: eval loss {loss:.4f}")

    def say(self, text: str) -> None:
        """Print a line for a person, above the bar."""
        self._bar.clear()
        notice(text)

    def close(self) -> None:
        """Close the files and draw the losses."""
        self._bar.close()
        self._try(METRICS, self._file.close)
        if self._board is not None:
            self._try(TENSORBOARD, self._board.close)
        try:
            self._try(PICTURE, lambda: draw(self.lines, self.folder / PICTURE))
        except ImportError:
            notice(f'{PICTURE} is not drawn: it needs matplotlib (pip install "llama-shards[plots]")')

    def _try(self, name: str, write: Callable[[], object]) -> None:
        """Write a file of the log, or give it up on an error: a full disk must not end the run before a checkpoint."""
        if name in self._given_up:
            return
        try:
            write()
        except OSError as error:
            self._given_up.add(name)
            self.say(f"{self.folder / name} is written no further: {error.strerror or error}")

    def _write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        self._try(METRICS, lambda: self._append(line))
        if self._board is not None:
            self._try(TENSORBOARD, lambda: self._plot(line))

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _plot(self, line: dict[str, Any]) -> None:
        for name in line.keys() - {"step"}:
            self._board.add_scalar(name, line[name], line["step"])


def _lines(path: Path, n_done: int) -> list[dict[str, Any]]:
    """Return the lines of an earlier part of the run, up to step `n_done`, without a line cut off by a kill."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line.get("step", n_done + 1) <= n_done:
            lines.append(line)
    return lines


def _board(folder: Path, n_done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    before = threading.excepthook
    # Without this, the writer's thread prints a traceback of an error that `add_scalar` then raises here as well.
    threading.excepthook = lambda told: None if isinstance(told.exc_value, OSError) else before(told)
    return SummaryWriter(str(folder), purge_step=n_done + 1)


def _left(lines: list[dict[str, Any]], n_steps: int) -> str:
    """Return the time that the rest of the run takes at the pace of its last steps, as h:mm:ss."""
    recent = [line["seconds"] for line in lines[-50:] if "seconds" in line]
    seconds = round((n_steps - lines[-1]["step"]) * sum(recent) / len(recent))
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


# -- the picture -----------------------------------------------------------------------------------


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the losses in the lines of `metrics.jsonl` into a PNG file.

    Raises:
        ImportError: without matplotlib.
    """
    import matplotlib  # an optional package, which takes a second to import

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

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
    """Return the mean of each value and those before it in a window, which is shorter at the start."""
    width = max(1, round(SMOOTHING * len(values)))
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]
