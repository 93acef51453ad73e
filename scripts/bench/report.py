"""What reports of benchmarks share: the machine, medians with their spread, words and files.

Every JSON file begins with

    date            when, ISO 8601 with time zone
    command         the words of the command line
    machine         cpu, cores (that this process may use), memory_bytes, card (null on CPU), system, python, torch
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from llama.errors import LlamaError

Report = dict[str, Any]


def sizes(flag: str, text: str) -> list[int]:
    """The numbers in a flag's `8,32`."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise LlamaError(f"--{flag} takes numbers from 1 on, such as 8,32, not {text!r}")
    return [int(word) for word in words]


def machine(device: torch.device) -> Report:
    """What ran this."""
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


def now() -> str:
    """The date and time, to a second, with its zone."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def beginning(device: torch.device) -> Report:
    """What every report begins with: date, command and machine."""
    return {"date": now(), "command": ["python", *sys.argv], "machine": machine(device)}


def beginning_lines(report: Report) -> list[str]:
    """The same for people: the machine, then when and by which command."""
    host = report["machine"]
    card = f", {host['card']}" if host["card"] else ""
    return [
        f"{host['cpu']}, {host['cores']} cores, {host['memory_bytes'] / 1e9:.0f} GB{card}; {host['system']}, "
        f"Python {host['python']}, torch {host['torch']}",
        f"{report['date']}  {' '.join(report['command'])}",
    ]


def spread(values: Sequence[float]) -> Report:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def cell(speed: Report) -> str:
    """A median with its spread, as a table shows it."""
    digits = 0 if speed["median"] >= 1000 else 1 if speed["median"] >= 10 else 2
    return f"{speed['median']:.{digits}f} ({speed['min']:.{digits}f}–{speed['max']:.{digits}f})"


def write_json(path: str, report: Report) -> None:
    """Write the report beside and rename it, so that no half of a file is left."""
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def give_out(
    report: Report, text: str, output_json: str | None, chart: str | None, draw: Callable[[Report, str], None]
) -> None:
    """Print the table, and write the file and the chart that were asked for."""
    print(text)
    if output_json is not None:
        write_json(output_json, report)
    if chart is not None:
        draw(report, chart)
