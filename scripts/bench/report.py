"""The parts that the reports of all benchmarks share: the machine, medians with their spread, files and charts.

Every JSON file begins with

    date            when, ISO 8601 with time zone
    command         the words of the command line
    machine         cpu, cores (that this process may use), memory_bytes, card (null on CPU), system, python, torch
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from llama.env import notice
from llama.errors import LlamaError

Report = dict[str, Any]

# Told apart by every kind of eye (Okabe and Ito).
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#BBBBBB")


def parse_sizes(flag: str, text: str) -> list[int]:
    """Return the numbers in a flag's text, such as `8,32`.

    Raises:
        LlamaError: for anything but whole numbers from 1 on.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise LlamaError(f"--{flag} takes numbers from 1 on, such as 8,32, not {text!r}")
    return [int(word) for word in words]


# -- the beginning ---------------------------------------------------------------------------------


def beginning(device: torch.device) -> Report:
    """Return the entries that every report begins with: date, command and machine."""
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return {"date": date, "command": _command(), "machine": _machine(device)}


def _command() -> list[str]:
    """Return the words that start this process again: python with the file or with `-m` and the module."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = [sys.argv[0]] if spec is None else ["-m", spec.name]
    return ["python", *program, *sys.argv[1:]]


def _machine(device: torch.device) -> Report:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "memory_bytes": psutil.virtual_memory().total,
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def beginning_lines(report: Report) -> list[str]:
    """Return the beginning as two lines of a table: the machine, then the date and the command."""
    host = report["machine"]
    card = f", {host['card']}" if host["card"] else ""
    return [
        f"{host['cpu']}, {host['cores']} cores, {host['memory_bytes'] / 1e9:.0f} GB{card}; {host['system']}, "
        f"Python {host['python']}, torch {host['torch']}",
        f"{report['date']}  {' '.join(report['command'])}",
    ]


# -- numbers ---------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> Report:
    """Return the median, the smallest and the largest value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def cell(speed: Report) -> str:
    """Return a median with its spread as a cell of a table."""
    digits = 0 if speed["median"] >= 1000 else 1 if speed["median"] >= 10 else 2
    return f"{speed['median']:.{digits}f} ({speed['min']:.{digits}f}–{speed['max']:.{digits}f})"


# -- files -----------------------------------------------------------------------------------------


def write_report(
    report: Report, text: str, output_json: str | None, chart: str | None, draw: Callable[[Report, str], None]
) -> None:
    """Print the table `text`, and write the JSON file and the chart where their paths are given."""
    print(text)
    if output_json is not None:
        write_json(output_json, report)
    if chart is not None:
        draw(report, chart)


def write_json(path: str, report: Report) -> None:
    """Write the report to `path`, under another name until the file is whole."""
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


@contextlib.contextmanager
def panels(path: str, n_rows: int, n_columns: int) -> Iterator[Sequence[Sequence[Any]]]:
    """Yield the axes of a chart, row by row, then write the chart to `path` as PNG.

    Without matplotlib the user is told that there is no chart, and no row is yielded.
    """
    try:
        import matplotlib
    except ImportError:
        notice(f"no chart in {path}: it needs matplotlib, pip install -e '.[plots]'")
        yield []
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(n_rows, n_columns, figsize=(5 * n_columns, 3.2 * n_rows), squeeze=False)
    yield list(rows)
    for axes in rows.flat:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)
