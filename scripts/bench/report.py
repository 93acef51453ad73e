"""What a benchmark run says: medians with their spread, the machine, a table and a JSON file.

The JSON file is one object:

    date            when, ISO 8601 with time zone
    command         the words of the command line
    machine         cpu, cores (that this process may use), memory_bytes, card (null on CPU), system, python, torch
    model           name, n_params (a tied table once), args (every field of ModelArgs), layout ("random" or the
                    checkpoint's), read_by (peer to the layout it read)
    settings        dtype, device, threads, world_size, tensor_split, prompt_tokens, new_tokens, batch_size, repeats,
                    seed
    peers           by name ("ours", "hf"): label, version, world_size, threads (of each rank), load_seconds, and
                    prefill, decode: tokens_per_second {median, min, max}, seconds (every run)
                    memory: peak_bytes, resident_bytes, baseline_bytes, one entry a rank. The peak is the resident set's
                    on a CPU (mapped pages counted), the allocator's on CUDA; the baseline is what was
                    resident before the weights were read: Python, torch and the engine's own code
    ratio           peer to {prefill, decode, peak_memory}: ours divided by that peer's
    same_tokens     whether all peers chose the same greedy tokens
    equal_tokens    peer to how many tokens of the worst prompt agree with ours before the first that differs
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from peers import Running, Timing

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


def peer_report(peer: Running, timings: Sequence[Timing], n_prompt: int, n_new: int) -> Report:
    """All that was measured of one peer.

    Args:
        peer: still running.
        timings: of its runs.
        n_prompt, n_new: tokens of the whole batch that a run prefills and decodes.
    """
    memory = peer.memory()
    return {
        "label": peer.kind.label,
        "version": peer.kind.version,
        "world_size": peer.setup.world_size,
        "threads": max(1, peer.setup.threads // peer.setup.world_size),
        "load_seconds": max(loaded.seconds for loaded in peer.loaded),
        "prefill": _speed([timing.prefill_seconds for timing in timings], n_prompt),
        "decode": _speed([timing.decode_seconds for timing in timings], n_new),
        "memory": {
            "peak_bytes": [rank.peak_bytes for rank in memory],
            "resident_bytes": [rank.resident_bytes for rank in memory],
            "baseline_bytes": [loaded.baseline_bytes for loaded in peer.loaded],
        },
    }


def _speed(seconds: Sequence[float], n_tokens: int) -> Report:
    # A difference of two times can come out at or below zero where both are tiny.
    rates = [n_tokens / max(one, 1e-9) for one in seconds]
    return {"tokens_per_second": spread(rates), "seconds": list(seconds)}


def spread(values: Sequence[float]) -> Report:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(peers: Mapping[str, Report]) -> Report:
    """Ours divided by every other peer's; memory by the sum over ranks."""
    ours = peers["ours"]
    return {
        name: {
            **{part: _median(ours, part) / _median(theirs, part) for part in ("prefill", "decode")},
            "peak_memory": _peak(ours) / _peak(theirs),
        }
        for name, theirs in peers.items()
        if name != "ours"
    }


def _median(peer: Report, part: str) -> float:
    return float(peer[part]["tokens_per_second"]["median"])


def _peak(peer: Report) -> int:
    return sum(peer["memory"]["peak_bytes"])


def equal_tokens(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> int:
    """Tokens that agree from the start, in the prompt where fewest do."""
    counts = []
    for one, other in zip(ours, theirs, strict=True):
        pairs = enumerate(zip(one, other, strict=True))
        counts.append(next((at for at, (a, b) in pairs if a != b), len(one)))
    return min(counts)


# -- for people ------------------------------------------------------------------------------------


def table(report: Report) -> str:
    """The report as text of at most about 100 columns."""
    return "\n".join((*_heading(report), "", *_rows(report), "", *_closing(report)))


def _heading(report: Report) -> list[str]:
    model, settings = report["model"], report["settings"]
    return [
        f"{model['name']}: {model['n_params']:,} parameters, {settings['dtype']} on {settings['device']}, "
        f"{settings['threads']} thread{'' if settings['threads'] == 1 else 's'}",
        f"batch {settings['batch_size']} x {settings['prompt_tokens']} prompt tokens, {settings['new_tokens']} "
        f"decoded; median of {settings['repeats']} interleaved runs (min–max)",
        *beginning_lines(report),
    ]


def _rows(report: Report) -> list[str]:
    lines = [f"{'':34}{'prefill tokens/s':>26}{'decode tokens/s':>26}{'peak memory':>14}"]
    for peer in report["peers"].values():
        ranks = f", {peer['world_size']} ranks" if peer["world_size"] > 1 else ""
        label = f"{peer['label']} ({peer['version']}{ranks})"
        memory = f"{_peak(peer) / 1e9:.2f} GB"
        lines.append(f"{label:34}{_cell(peer['prefill']):>26}{_cell(peer['decode']):>26}{memory:>14}")
    for name, ratio in report["ratio"].items():
        label = f"ours / {name}"
        lines.append(f"{label:34}{ratio['prefill']:>25.2f}×{ratio['decode']:>25.2f}×{ratio['peak_memory']:>13.2f}×")
    return lines


def _cell(part: Report) -> str:
    return cell(part["tokens_per_second"])


def cell(speed: Report) -> str:
    """A median with its spread, as a table shows it."""
    digits = 0 if speed["median"] >= 1000 else 1 if speed["median"] >= 10 else 2
    return f"{speed['median']:.{digits}f} ({speed['min']:.{digits}f}–{speed['max']:.{digits}f})"


def _closing(report: Report) -> list[str]:
    n_tokens = report["settings"]["new_tokens"] + 1
    lines = []
    for name, count in report["equal_tokens"].items():
        label = report["peers"][name]["label"]
        same = f"all {n_tokens} equal" if count == n_tokens else f"the first {count} of {n_tokens} equal"
        lines.append(f"greedy tokens of ours and {label}: {same}")
    return lines


def write_json(path: str, report: Report) -> None:
    """Write the report beside and rename it, so that no half of a file is left."""
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
