"""Reports of `training.py`: a table, a JSON file and a chart.

The JSON file is one object:

    date, command, machine   as in `report.py`
    model           name, n_params (a tied table once), args (every field of ModelArgs)
    settings        dtype, device, threads, num_virtual_tokens, max_seq_len, lr, steps (of a round), rounds, seed,
                    n_examples (of the data set), peak_tflops
    trial           Trainer's loop to seconds in the trial that chose its way to compute in bf16; empty for other dtypes
    batches         by batch size (as text): n_examples and n_tokens (of each counted round: real tokens, no padding and
                    no virtual ones), and
        loops       by name ("ours", "hf", "hf_padded", the latter two with "_autocast" where that was faster):
                    label, version, load_seconds, seconds and cpu_seconds (every counted round),
                    examples_per_second and tokens_per_second {median, min, max}, losses (of every step,
                    the warm-up's included), mfu (null without peak_tflops), memory {peak_bytes, resident_bytes,
                    baseline_bytes} as in `report.py`
        ratio       loop to {examples_per_second (ours divided by that loop's, median of the rounds' own ratios),
                    cpu_seconds (that loop's divided by ours), peak_memory (ours divided by that loop's),
                    loss_difference (largest of any step)}

MFU counts only operations that cannot be avoided: four a parameter of the linears and real token, two forward and two
for the gradient of the input; frozen weights need no gradient.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llama.checkpoint.table import n_params, n_unique_params
from llama.config import ModelArgs
from scripts.bench.peers import Kind, Loaded, Memory
from scripts.bench.report import Report, beginning, beginning_lines, cell, panels, spread
from scripts.bench.training_peers import Steps, TrainingCase, TrainingSetup

COLOURS = {"ours": "#0072B2", "hf": "#E69F00", "hf_padded": "#BBBBBB"}


@dataclass(frozen=True)
class Measured:
    """A loop's rounds, the warm-up first, and its memory at the end."""

    kind: Kind
    rounds: Sequence[Steps]
    memory: Memory
    loaded: Loaded


def build_report(
    found: Mapping[int, Mapping[str, Measured]],
    case: TrainingCase,
    setup: TrainingSetup,
    geometry: str,
    args: ModelArgs,
    trial: Mapping[str, float],
    peak_tflops: float | None,
    device: torch.device,
) -> Report:
    """Return the report that the head of this file documents."""
    flops = 4 * (n_params(args) - args.vocab_size * args.dim) / (peak_tflops * 1e12) if peak_tflops else None
    return {
        **beginning(device),
        "model": {"name": geometry, "n_params": n_unique_params(args), "args": dataclasses.asdict(args)},
        "settings": {
            "dtype": setup.dtype, "device": setup.device, "threads": setup.threads,
            "num_virtual_tokens": len(setup.prompt), "max_seq_len": setup.max_seq_len, "lr": setup.lr,
            "steps": case.steps, "rounds": case.rounds, "seed": case.seed, "n_examples": len(case.examples),
            "peak_tflops": peak_tflops,
        },
        "trial": dict(trial),
        "batches": {str(size): _of_batch(size, loops, case, setup, flops) for size, loops in found.items()},
    }  # fmt: skip


def _of_batch(
    size: int, loops: Mapping[str, Measured], case: TrainingCase, setup: TrainingSetup, flops: float | None
) -> Report:
    rounds = [case.batches(size, number) for number in range(1, case.rounds + 1)]
    n_examples = [sum(len(batch) for batch in batches) for batches in rounds]
    n_tokens = [sum(len(example.tokens) for batch in batches for example in batch) for batches in rounds]
    measured = {name: _of_loop(loop, n_examples, n_tokens, setup, flops) for name, loop in loops.items()}
    ratio = {name: _ratio(measured["ours"], theirs) for name, theirs in measured.items() if name != "ours"}
    return {"n_examples": n_examples, "n_tokens": n_tokens, "loops": measured, "ratio": ratio}


def _of_loop(
    loop: Measured, n_examples: Sequence[int], n_tokens: Sequence[int], setup: TrainingSetup, flops: float | None
) -> Report:
    counted = loop.rounds[1:]
    tokens = [n / steps.seconds for n, steps in zip(n_tokens, counted, strict=True)]
    return {
        "label": loop.kind.label.format(max_seq_len=setup.max_seq_len),
        "version": loop.kind.version,
        "load_seconds": loop.loaded.seconds,
        "seconds": [steps.seconds for steps in counted],
        "cpu_seconds": [steps.cpu_seconds for steps in counted],
        "examples_per_second": spread([n / steps.seconds for n, steps in zip(n_examples, counted, strict=True)]),
        "tokens_per_second": spread(tokens),
        "losses": [loss for steps in loop.rounds for loss in steps.losses],
        "mfu": statistics.median(tokens) * flops if flops else None,
        "memory": dataclasses.asdict(loop.memory) | {"baseline_bytes": loop.loaded.baseline_bytes},
    }


def _ratio(ours: Report, theirs: Report) -> Report:
    def median(key: str) -> float:
        return statistics.median(b / a for a, b in zip(ours[key], theirs[key], strict=True))

    return {
        "examples_per_second": median("seconds"),
        "cpu_seconds": median("cpu_seconds"),
        "peak_memory": ours["memory"]["peak_bytes"] / theirs["memory"]["peak_bytes"],
        "loss_difference": max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)),
    }


# -- table and chart -------------------------------------------------------------------------------


def table(report: Report) -> str:
    """Return the report as text of at most about 110 columns."""
    return "\n".join(_heading(report) + [line for size in report["batches"] for line in _rows(report, size)])


def _heading(report: Report) -> list[str]:
    model, settings = report["model"], report["settings"]
    trial = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report["trial"].items())
    return [
        f"{model['name']}: {model['n_params']:,} parameters, {settings['dtype']} on {settings['device']}, "
        f"{settings['threads']} thread{'' if settings['threads'] == 1 else 's'}",
        f"{settings['num_virtual_tokens']} virtual tokens, {settings['n_examples']:,} examples of at most "
        f"{settings['max_seq_len']} tokens; median of {settings['rounds']} interleaved rounds of {settings['steps']} "
        "steps (min–max)",
        *beginning_lines(report),
        *([f"Trainer's way to compute in bf16, tried first: {trial}"] if trial else []),
    ]


def _rows(report: Report, size: str) -> list[str]:
    batch = report["batches"][size]
    lines = ["", f"{f'batch {size}':36}{'examples/s':>22}{'real tokens/s':>22}{'peak memory':>14}{'last loss':>12}"]
    for loop in batch["loops"].values():
        label = f"{loop['label']} ({loop['version']})"
        speeds = f"{cell(loop['examples_per_second']):>22}{cell(loop['tokens_per_second']):>22}"
        memory = f"{loop['memory']['peak_bytes'] / 1e9:.2f} GB"
        mfu = f"  MFU {loop['mfu']:.1%}" if loop["mfu"] is not None else ""
        lines.append(f"{label:36}{speeds}{memory:>14}{loop['losses'][-1]:>12.4f}{mfu}")
    for name, ratio in batch["ratio"].items():
        speed, memory = f"{ratio['examples_per_second']:.2f}×", f"{ratio['peak_memory']:.2f}×"
        apart = f"losses differ by at most {ratio['loss_difference']:.1e}"
        lines.append(f"{f'ours / {name}':36}{speed:>22}{'':22}{memory:>14}  {apart}")
    return lines


def draw(report: Report, path: str) -> None:
    """Draw speed and losses of every batch size into a PNG."""
    batches = report["batches"]
    with panels(path, len(batches), 2) as rows:
        for (size, batch), (speed, losses) in zip(batches.items(), rows, strict=False):
            _draw_speed(speed, batch, size)
            _draw_losses(losses, batch)


def _colour(name: str) -> str:
    return COLOURS[name.removesuffix("_autocast")]


def _draw_speed(axes: Any, batch: Report, size: str) -> None:
    for place, (name, loop) in enumerate(batch["loops"].items()):
        speed = loop["examples_per_second"]
        around = [[speed["median"] - speed["min"]], [speed["max"] - speed["median"]]]
        axes.barh(place, speed["median"], xerr=around, color=_colour(name), capsize=3)
        axes.text(0, place, f" {speed['median']:.2f}", va="center")
    axes.set_yticks(range(len(batch["loops"])), [loop["label"] for loop in batch["loops"].values()])
    axes.invert_yaxis()
    axes.set_title(f"batch {size}: examples/s")


def _draw_losses(axes: Any, batch: Report) -> None:
    for name, loop in batch["loops"].items():
        steps = range(1, len(loop["losses"]) + 1)
        width = 3 if name == "ours" else 1.2
        axes.plot(steps, loop["losses"], color=_colour(name), linewidth=width, marker=".", label=loop["label"])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step")
    axes.set_title("loss before the step")
    axes.legend(frameon=False, fontsize="small")
