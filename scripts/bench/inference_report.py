"""Reports of `inference.py`: a table, a JSON file and a chart.

The JSON file is one object:

    date, command, machine   as in `report.py`
    model           name, n_params (a tied table once), args (every field of ModelArgs), layout ("random" or the
                    checkpoint's), read_by (peer to the layout it read)
    settings        dtype, device, threads, world_size, tensor_split, compile, group_size, precisions, prompt_tokens,
                    new_tokens, batch_size, repeats, seed
    limits          of the machine, measured in the same run: read (bytes/s: read on a CPU, copied on a card, both ways
                    counted), flops (operations/s of a matrix product in dtype)
    peers           by name ("ours" and "hf"; with precisions "ours_bf16", "ours_int8", "ours_int4"; "hf_static",
                    "llamacpp_bf16", "llamacpp_q8_0", "llamacpp_q4_0"): label, version, dtype, world_size, threads (of
                    each rank), amx (when llama.cpp used the matrix units: always, decode or never; null for others;
                    with decode, its memory is that of two models), load_seconds, and
                    prefill, decode: tokens_per_second {median, min, max}, seconds (every run)
                    memory: peak_bytes, resident_bytes, baseline_bytes, one entry a rank. The peak is the resident set's
                    on a CPU (mapped pages counted), the allocator's on CUDA; the baseline is what was
                    resident before the weights were read: Python, torch and the engine's own code
                    of_limits (ours): decode (bytes of weights a step x steps a second / read), prefill (operations of
                    the linears a second / flops); medians
    ratio           "ours / peer" to {prefill, decode, peak_memory}: ours divided by that peer's
    same_tokens     whether all peers of the same numbers as one of ours chose the same greedy tokens
    equal_tokens    "ours / peer", of the same numbers, to how many tokens of the worst prompt agree before the first
                    that differs
    scaling         null, or dtype, threads, batch_size; one_rank, ranks (as many as threads, one each), gloo_ranks (the
                    same without shared memory), batch (one rank, that many prompts): prefill and decode as above;
                    ratio: the last three to {prefill, decode}, each divided by one_rank
    not_run         a list of what this machine could not run
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llama.checkpoint.table import n_unique_params
from llama.device import DTYPES
from scripts.bench.comparison import Comparison, InferenceCase, median_speed, speeds
from scripts.bench.limits import Limits, prefill_flops, read_bytes
from scripts.bench.peers import Running, Timing
from scripts.bench.report import PALETTE, Report, beginning, beginning_lines, cell, panels
from scripts.bench.weights import Weights

NO_CARD = "decode beside a card's copy bandwidth, prefill beside its matmul rate, hf_static compiled: no card here"


def build_report(
    peers: Sequence[Running],
    timings: Mapping[str, Sequence[Timing]],
    comparison: Comparison,
    case: InferenceCase,
    weights: Weights,
    limits: Limits,
    device: torch.device,
) -> Report:
    """Return the report, except `scaling`, while the peers still run."""
    n_prompt, n_new = (case.batch_size * n for n in (case.prompt_tokens, case.new_tokens))
    measured = {peer.name: peer_report(peer, timings[peer.name], n_prompt, n_new) for peer in peers}
    for peer in peers:
        if peer.name.startswith("ours"):
            measured[peer.name]["of_limits"] = of_limits(peer, measured[peer.name], weights, case, limits)
    pairs, last = comparison.pairs(), {name: runs[-1].tokens for name, runs in timings.items()}
    agreeing = {f"{ours} / {other}": equal_tokens(last[ours], last[other]) for ours, other, same in pairs if same}
    return {
        **beginning(device),
        "model": {
            "name": weights.name,
            "n_params": n_unique_params(weights.args),
            "args": dataclasses.asdict(weights.args),
            "layout": weights.layout,
            "read_by": {peer.name: read_layout(peer.name, weights) for peer in peers},
        },
        "settings": settings(peers[0], comparison, case),
        "limits": dataclasses.asdict(limits),
        "peers": measured,
        "ratio": {f"{ours} / {other}": ratio(measured[ours], measured[other]) for ours, other, _ in pairs},
        "same_tokens": all(count == case.new_tokens + 1 for count in agreeing.values()),
        "equal_tokens": agreeing,
        "scaling": None,
        "not_run": [] if device.type == "cuda" else [NO_CARD],
    }


def read_layout(name: str, weights: Weights) -> str:
    """Return the layout of the files that a peer reads."""
    return "gguf" if name.startswith("llamacpp") else weights.ours_layout if name.startswith("ours") else "hf"


def settings(ours: Running, comparison: Comparison, case: InferenceCase) -> Report:
    """Return the settings of the whole run, asked for or usual."""
    started = {key: getattr(ours.setup, key) for key in ("device", "threads", "world_size", "tensor_split", "compile")}
    compared = {"group_size": comparison.group_size, "precisions": list(comparison.precisions)}
    return {"dtype": comparison.dtype} | started | compared | dataclasses.asdict(case)


def peer_report(peer: Running, timings: Sequence[Timing], n_prompt: int, n_new: int) -> Report:
    """Return all that was measured of one peer.

    Args:
        peer: still running.
        timings: of its runs.
        n_prompt, n_new: tokens of the whole batch that each run prefills and decodes.
    """
    memory = peer.memory()
    return {
        "label": peer.kind.label,
        "version": peer.kind.version,
        "dtype": peer.setup.dtype,
        "world_size": peer.setup.world_size,
        "threads": max(1, peer.setup.threads // peer.setup.world_size),
        "amx": peer.setup.amx if peer.name.startswith("llamacpp") else None,
        "load_seconds": max(loaded.seconds for loaded in peer.loaded),
        **speeds(timings, n_prompt, n_new),
        "memory": {
            "peak_bytes": [rank.peak_bytes for rank in memory],
            "resident_bytes": [rank.resident_bytes for rank in memory],
            "baseline_bytes": [loaded.baseline_bytes for loaded in peer.loaded],
        },
    }


def of_limits(peer: Running, measured: Report, weights: Weights, case: InferenceCase, limits: Limits) -> Report:
    """Return the shares of the machine's limits that ours reached, all ranks together."""
    n_bytes = read_bytes(weights.args, DTYPES[peer.setup.dtype], peer.setup.scheme)
    steps = median_speed(measured, "decode") / case.batch_size
    return {
        "decode": n_bytes * steps / limits.read,
        "prefill": prefill_flops(weights.args) * median_speed(measured, "prefill") / limits.flops,
    }


def ratio(ours: Report, theirs: Report) -> Report:
    """Return the figures of ours divided by a peer's; memory is summed over the ranks."""
    speed = {part: median_speed(ours, part) / median_speed(theirs, part) for part in ("prefill", "decode")}
    return speed | {"peak_memory": _peak(ours) / _peak(theirs)}


def _peak(peer: Report) -> int:
    return sum(peer["memory"]["peak_bytes"])


def equal_tokens(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> int:
    """Return the number of tokens that agree from the start, in the prompt where fewest do."""
    counts = []
    for one, other in zip(ours, theirs, strict=True):
        pairs = enumerate(zip(one, other, strict=True))
        counts.append(next((at for at, (a, b) in pairs if a != b), len(one)))
    return min(counts)


# -- table and chart -------------------------------------------------------------------------------


def table(report: Report) -> str:
    """Return the report as text of at most about 100 columns."""
    return "\n".join((*_heading(report), "", *_rows(report), "", *_closing(report)))


def _heading(report: Report) -> list[str]:
    model, settings = report["model"], report["settings"]
    return [
        f"{model['name']}: {model['n_params']:,} parameters, {settings['dtype']} on {settings['device']}, "
        f"{settings['threads']} thread{'' if settings['threads'] == 1 else 's'}, compile {settings['compile']}",
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
        lines.append(f"{name:34}{ratio['prefill']:>25.2f}×{ratio['decode']:>25.2f}×{ratio['peak_memory']:>13.2f}×")
    for peer in report["peers"].values():
        if "of_limits" in peer:
            part = peer["of_limits"]
            lines.append(f"{peer['label'] + ', of the best here':34}{part['prefill']:>25.0%} {part['decode']:>25.0%}")
    return lines


def _cell(part: Report) -> str:
    return cell(part["tokens_per_second"])


def _closing(report: Report) -> list[str]:
    n_tokens, limits = report["settings"]["new_tokens"] + 1, report["limits"]
    moved = "copies (read and written)" if report["machine"]["card"] else "reads"
    lines = [f"the best here: {moved} {limits['read'] / 1e9:.1f} GB/s, multiplies {limits['flops'] / 1e12:.2f} TFLOP/s"]
    for name, count in report["equal_tokens"].items():
        same = f"all {n_tokens} equal" if count == n_tokens else f"the first {count} of {n_tokens} equal"
        lines.append(f"greedy tokens of {name}: {same}")
    for use, words in (("decode", "prefill without and decode (in a second copy) with"), ("never", "without")):
        crashing = [peer["label"] for peer in report["peers"].values() if peer["amx"] == use]
        if crashing:
            lines.append(f"{', '.join(crashing)}: {words} the kernels for matrix units, which crash on this machine")
    return [*lines, *(f"not run: {what}" for what in report["not_run"])]


def draw(report: Report, path: str) -> None:
    """Draw prefill and decode of every peer into a PNG."""
    with panels(path, 1, 2) as rows:
        for axes, part in ((axes, part) for row in rows for axes, part in zip(row, ("prefill", "decode"), strict=True)):
            _draw_part(axes, part, report["peers"])


def _draw_part(axes: Any, part: str, peers: Mapping[str, Report]) -> None:
    for place, (name, peer) in enumerate(peers.items()):
        speed = peer[part]["tokens_per_second"]
        around = [[speed["median"] - speed["min"]], [speed["max"] - speed["median"]]]
        family = ("ours", "hf", "llamacpp").index(name.split("_")[0])
        axes.barh(place, speed["median"], xerr=around, color=PALETTE[family], capsize=3)
        axes.text(0, place, f" {speed['median']:.1f}", va="center")
    axes.set_yticks(range(len(peers)), [peer["label"] for peer in peers.values()])
    axes.invert_yaxis()
    axes.set_title(f"{part}: tokens/s")


def scaling_lines(scaling: Report) -> list[str]:
    """Return the report of `comparison.measure_scaling` as text."""
    threads, ratio = scaling["threads"], scaling["ratio"]

    def line(label: str, name: str, target: float | None = None) -> str:
        over = f"{ratio[name]['decode']:.2f}×" if name in ratio else ""
        aim = "" if target is None else f" (target {target})"
        return f"  {label:44}{median_speed(scaling[name], 'decode'):>10.2f} tokens/s  {over}{aim}".rstrip()

    return [
        f"decode in {scaling['dtype']} on {threads} threads, as:",
        line("one rank", "one_rank"),
        line(f"{threads} ranks of a thread each", "ranks", 0.8),
        line(f"{threads} ranks of a thread each, over gloo alone", "gloo_ranks"),
        line(f"one rank, batch {scaling['batch_size']}", "batch", 3),
    ]
