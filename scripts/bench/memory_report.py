"""Reports of `memory.py`: a table, a JSON file and a chart.

The JSON file is one object:

    date, command, machine   as in `report.py`
    model           name, n_params (a tied table once), args (every field of ModelArgs)
    settings        tokens (of a sequence, prompt and completion), group_size (of int4)
    cases           a list: world_size, batch_size, precision, limit_bytes and ancestor_bytes (of a rank, or null),
                    planned_bytes (what `llama.plan.advice` expects on the fullest rank), and
        ranks       one entry for each size of shard: rank (the first that has it), weights, cache, and what prefill and
                    decode take beyond them, all in bytes; total (the fuller of the two with weights and cache)
    split           tensor_split, batch_size, precision, ranks (bytes of weights and cache of each), shares (of the sum,
                    without what every rank holds whole), wanted (shares asked for), unit_bytes (a head group or a block
                    of the FFN in all layers, whichever is larger), misfit_bytes (how far the furthest rank is off)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama.sizes import GB, show_bytes
from scripts.bench.report import PALETTE, Report, beginning_lines, panels

COLUMNS = ("weights", "cache", "prefill", "decode", "total")
BESIDE = ("planned", "limit", "ancestor")


def label(case: Report) -> str:
    """Return the label of a case, such as "4 ranks, batch 32, int4"."""
    return f"{case['world_size']} ranks, batch {case['batch_size']}, {case['precision']}"


def table(report: Report) -> str:
    """Return the report as text of at most about 110 columns."""
    model, tokens = report["model"], report["settings"]["tokens"]
    return "\n".join(
        (
            f"{model['name']}: {model['n_params']:,} parameters, sequences of {tokens} tokens; bytes of a rank, the "
            "fullest of each case",
            *beginning_lines(report),
            "",
            f"{'':28}" + "".join(f"{head:>10}" for head in (*COLUMNS, *BESIDE)),
            *(_row(case) for case in report["cases"]),
            "",
            *_split_lines(report["split"]),
        )
    )


def _row(case: Report) -> str:
    fullest = max(case["ranks"], key=lambda rank: rank["total"])
    sizes = [
        *(fullest[name] for name in COLUMNS),
        *(case[f"{name}_bytes"] for name in ("planned", "limit", "ancestor")),
    ]
    cells = "".join(f"{_size(size):>10}" for size in sizes)
    return f"{label(case):28}{cells}  {_verdict(fullest['total'], case['limit_bytes'])}".rstrip()


def _size(nbytes: float | None) -> str:
    return "–" if nbytes is None else show_bytes(nbytes)


def _verdict(total: int, limit: float | None) -> str:
    if limit is None:
        return ""
    return "within" if total <= limit else f"over by {show_bytes(total - limit)}"


def _split_lines(split: Report) -> list[str]:
    ranks = ", ".join(show_bytes(nbytes) for nbytes in split["ranks"])
    fits = "within one unit" if split["misfit_bytes"] <= split["unit_bytes"] else "more than one unit"
    return [
        f"--tensor_split {split['tensor_split']}, batch {split['batch_size']}: weights and cache of the ranks {ranks}",
        f"{fits} of their weights: off by {show_bytes(split['misfit_bytes'])}, where the larger of a head group and an "
        f"FFN block has {show_bytes(split['unit_bytes'])}",
    ]


def draw(report: Report, path: str) -> None:
    """Draw a bar a case, with weights, cache and activations, its limit and the original fork's figure."""
    with panels(path, 1, 2) as rows:
        for axes in (row[0] for row in rows):
            for place, case in enumerate(report["cases"]):
                _draw_case(axes, place, case)
            axes.set_yticks(range(len(report["cases"])), [label(case) for case in report["cases"]])
            axes.invert_yaxis()
            axes.set_xlabel("GB of a rank")
            axes.legend(
                *_once(axes), frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3
            )
        for axes in (row[1] for row in rows):
            _draw_split(axes, report["split"])


def _draw_case(axes: Any, place: int, case: Report) -> None:
    fullest = max(case["ranks"], key=lambda rank: rank["total"])
    parts = {"weights": fullest["weights"], "cache": fullest["cache"]}
    parts["activations"] = max(fullest["prefill"], fullest["decode"])
    left = 0.0
    for (name, nbytes), colour in zip(parts.items(), PALETTE, strict=False):
        axes.barh(place, nbytes / GB, left=left, color=colour, label=name)
        left += nbytes / GB
    for name, style in (("limit", "-"), ("ancestor", ":")):
        if case[f"{name}_bytes"] is not None:
            at = case[f"{name}_bytes"] / GB
            axes.plot([at, at], [place - 0.45, place + 0.45], color="black", linestyle=style, label=name)


def _once(axes: Any) -> tuple[Sequence[Any], Sequence[str]]:
    """Return handles and labels of a legend, each label once."""
    found = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    return list(found.values()), list(found)


def _draw_split(axes: Any, split: Report) -> None:
    axes.bar(range(len(split["ranks"])), [nbytes / GB for nbytes in split["ranks"]], color=PALETTE[0])
    axes.set_xticks(range(len(split["ranks"])), [f"rank {rank}" for rank in range(len(split["ranks"]))])
    axes.set_title(f"--tensor_split {split['tensor_split']}")
    axes.set_ylabel("GB of weights and cache")
