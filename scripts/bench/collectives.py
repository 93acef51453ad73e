"""Counts of what ranks send each other in the running program, and reckoned costs: when several ranks pay.

    python scripts/bench/collectives.py --quick                               # a toy model, under a minute
    python scripts/bench/collectives.py --output_json collectives.json --chart collectives.png
    python scripts/bench/collectives.py --bandwidth 2000 --tflops 250 --links "my switch=20us@50"

The engine runs on one rank of several over a process group that counts every call (`counters.py`). A decode step is
what one more token adds to a run. The program should ask for two all-reduces a layer, one for the embedding, and an
all-gather of candidates and a broadcast of the choice for the sampler, and for nothing else. The cost of these calls
is reckoned from nominal figures of links and cards (`limits.py`), not measured.

The JSON file is one object:

    date, command, machine   as in `report.py`; the machine only counted
    model           name, n_params (a tied table once), args (every field of ModelArgs)
    settings        dtype, prompt_tokens, context (tokens seen by a decode step), world_sizes, batch_sizes, bandwidth
                    (bytes/s), flops (operations/s), and links: name to {latency (s), bandwidth (bytes/s each way)}
    runs            a list of one entry for "decode" or "prefill" (stage), batch_size and world_size:
                    calls (a list of kind, bytes of the result, count), count, bytes (their sum), expected (whether they
                    are those named above), compute_seconds (of a rank), links: name to {seconds (of all
                    collectives), tokens_per_second, speedup (over one rank)}
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llama import env
from llama.checkpoint.table import n_unique_params
from llama.cli import run
from llama.config import ModelArgs
from llama.env import notice
from llama.errors import LlamaError
from llama.generation.engine import Engine, Request
from llama.generation.sampling import Sampling
from llama.generation.tasks import check_writable
from llama.model import Transformer
from llama.parallel.partition import Partition
from llama.plan.words import NAMES
from llama.sizes import show_bytes
from scripts.bench.counters import Calls, alone, empty_shard
from scripts.bench.limits import Limits, Link, collective_seconds, parse_links
from scripts.bench.report import PALETTE, Report, beginning, beginning_lines, panels, parse_sizes, write_report
from scripts.bench.weights import DTYPE, model_args

# -- counting --------------------------------------------------------------------------------------

# A stage and the batch size of a run.
Stage = tuple[str, int]
SHORT_PROMPT = 8  # tokens before a decode step, whose calls do not depend on their number


def count(partition: Partition, batch_sizes: Sequence[int], prompt_tokens: int) -> dict[Stage, Calls]:
    """Count what rank 0 asks its group for, greedy: in a "prefill" of one prompt and a "decode" step of each batch."""
    stages: list[Stage] = [("prefill", 1), *(("decode", size) for size in batch_sizes)]
    with alone(0, partition.world_size, "counting") as ranks:
        if ranks.world_size == 1:
            return {stage: Counter() for stage in stages}
        model = empty_shard(partition, ranks, DTYPE)

        def calls(batch_size: int, n_prompt: int, new_tokens: int) -> Calls:
            ranks.group.calls.clear()
            generate(model, batch_size, n_prompt, new_tokens)
            return Counter(ranks.group.calls)

        found = {("prefill", 1): calls(1, prompt_tokens, 1)}
        for size in batch_sizes:
            found["decode", size] = calls(size, SHORT_PROMPT, 3) - calls(size, SHORT_PROMPT, 2)
        return found


def generate(model: Transformer, batch_size: int, prompt_tokens: int, new_tokens: int) -> None:
    """Run the engine on prompts of one length, greedily."""
    vocab_size = model.args.vocab_size
    prompt = [token % vocab_size for token in range(prompt_tokens)]
    requests = [Request(index, prompt, new_tokens, Sampling(temperature=0)) for index in range(batch_size)]
    for _ in Engine(model, vocab_size).run(requests, batch_size):
        pass


def is_expected(calls: Calls, args: ModelArgs, world_size: int) -> bool:
    """Return whether a run asked for its passes' all-reduces and the sampler's two collectives, and nothing else.

    A pass has two all-reduces a layer and one for the embedding.
    """
    counts: Counter[str] = Counter()
    for (kind, _), number in calls.items():
        counts[kind] += number
    if world_size == 1:
        return not counts
    n_passes, rest = divmod(counts.pop("all-reduce", 0), 2 * args.n_layers + 1)
    return n_passes > 0 and not rest and counts == {"all-gather": 1, "broadcast": 1}


def run_report(
    stage: Stage, partition: Partition, calls: Calls, card: Limits, n_seen: int, links: Mapping[str, Link]
) -> Report:
    """Return an entry of `runs` without its speedups; `n_seen` tokens are prefilled, or seen by a decode step."""
    (name, batch_size), n_ranks = stage, partition.world_size
    if name == "decode":
        n_tokens, compute = batch_size, card.decode_seconds(partition, batch_size, n_seen)
    else:
        n_tokens, compute = n_seen, card.prefill_seconds(partition, n_seen)
    over = {}
    for link_name, link in links.items():
        taken = sum(
            number * collective_seconds(kind, nbytes, n_ranks, link) for (kind, nbytes), number in calls.items()
        )
        over[link_name] = {"seconds": taken, "tokens_per_second": n_tokens / (compute + taken)}
    return {
        "stage": name,
        "batch_size": batch_size,
        "world_size": n_ranks,
        "calls": [{"kind": kind, "bytes": nbytes, "count": number} for (kind, nbytes), number in calls.items()],
        "count": calls.total(),
        "bytes": sum(nbytes * number for (_, nbytes), number in calls.items()),
        "expected": is_expected(calls, partition.args, n_ranks),
        "compute_seconds": compute,
        "links": over,
    }


def add_speedups(runs: Sequence[Report]) -> None:
    """Add to each run its tokens a second divided by those of one rank, in place."""
    one_rank = {(run["stage"], run["batch_size"]): run for run in runs if run["world_size"] == 1}
    for entry in runs:
        one = one_rank[entry["stage"], entry["batch_size"]]["links"]
        for name, link in entry["links"].items():
            link["speedup"] = link["tokens_per_second"] / one[name]["tokens_per_second"]


# -- table and chart -------------------------------------------------------------------------------


def table(report: Report) -> str:
    """Return the report as text of at most about 110 columns."""
    model, settings = report["model"], report["settings"]
    lines = [
        f"{model['name']}: {model['n_params']:,} parameters, {settings['dtype']}; a card reads "
        f"{settings['bandwidth'] / 1e9:.0f} GB/s and computes {settings['flops'] / 1e12:.0f} TFLOP/s",
        *beginning_lines(report),
    ]
    for stage in dict.fromkeys((entry["stage"], entry["batch_size"]) for entry in report["runs"]):
        runs = [entry for entry in report["runs"] if (entry["stage"], entry["batch_size"]) == stage]
        lines += ["", *_stage_lines(stage, runs, settings)]
    strangers = [entry for entry in report["runs"] if not entry["expected"]]
    lines += [
        "",
        "×: speed over one rank; below 1 the model runs faster on one card, where it fits",
        "every run: two all-reduces a layer, one for the embedding, the sampler's two, nothing else",
    ]
    if strangers:
        lines[-1] = f"{len(strangers)} runs ask for something else than two all-reduces a layer, embedding and sampler"
    return "\n".join(lines)


def _stage_lines(stage: Stage, runs: Sequence[Report], settings: Report) -> list[str]:
    name, batch_size = stage
    what = (
        f"decode step, batch {batch_size}, {settings['context']} tokens seen"
        if name == "decode"
        else f"prefill of {settings['prompt_tokens']} tokens"
    )

    def row(label: str, cells: Sequence[str]) -> str:
        return f"{label:38}" + "".join(f"{cell:>18}" for cell in cells)

    return [
        row(what, [f"{size} rank{'s' if size > 1 else ''}" for size in settings["world_sizes"]]),
        row("  collectives", [f"{entry['count']}" for entry in runs]),
        row("  their bytes", [_bytes(entry["bytes"]) for entry in runs]),
        row("  computing, ms", [f"{entry['compute_seconds'] * 1e3:.2f}" for entry in runs]),
        *(row(f"  {link}: sending, ms", [_cost(entry, link) for entry in runs]) for link in settings["links"]),
    ]


def _bytes(nbytes: int) -> str:
    return show_bytes(nbytes) if nbytes >= 1e6 else f"{nbytes / 1e3:.1f} KB" if nbytes else "0"


def _cost(entry: Report, link: str) -> str:
    cost = entry["links"][link]
    if entry["world_size"] == 1:
        return "0"
    return f"{cost['seconds'] * 1e3:.2f} ({cost['speedup']:.2f}×)"


def draw(report: Report, path: str) -> None:
    """Draw the speedup over one rank by world size, one panel a stage and batch size."""
    stages = list(dict.fromkeys((entry["stage"], entry["batch_size"]) for entry in report["runs"]))
    with panels(path, 1, len(stages)) as rows:
        for row in rows:
            for axes, stage in zip(row, stages, strict=True):
                runs = [entry for entry in report["runs"] if (entry["stage"], entry["batch_size"]) == stage]
                _draw_stage(axes, stage, runs)


def _draw_stage(axes: Any, stage: Stage, runs: Sequence[Report]) -> None:
    ranks = [entry["world_size"] for entry in runs]
    axes.plot(ranks, ranks, color="black", linestyle=":", linewidth=1, label="nothing to send")
    for name, colour in zip(runs[0]["links"], PALETTE * 2, strict=False):
        axes.plot(ranks, [entry["links"][name]["speedup"] for entry in runs], color=colour, marker="o", label=name)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xticks(ranks)
    axes.set_xlabel("ranks")
    axes.set_ylabel("speed over one rank")
    axes.set_title(f"{stage[0]}, batch {stage[1]}")
    axes.legend(frameon=False, fontsize="small")


# -- command ---------------------------------------------------------------------------------------


def main(
    geometry: str | None = None,
    prompt_tokens: int | None = None,
    context: int = 512,
    world_sizes: str = "1,2,4,8",
    batch_sizes: str = "1,8",
    bandwidth: float = 936.0,
    tflops: float = 71.0,
    links: str | None = None,
    output_json: str | None = None,
    chart: str | None = None,
    quick: bool = False,
) -> None:
    """Count what ranks send each other, and reckon when several ranks pay.

    Args:
        geometry: a published geometry, llama-2-7b by default, or tiny.
        prompt_tokens: of the prefill that is counted; 512, or 32 with --quick.
        context: tokens that a decode step sees.
        world_sizes: ranks to reckon for, beginning with 1.
        batch_sizes: sequences of a decode step.
        bandwidth: GB/s that a card reads from its memory; an RTX 3090's by default.
        tflops: 1e12 operations a second that a card computes in 16 bit; an RTX 3090's by default.
        links: names of known links, or 'my switch=20us@50' (latency, GB/s each way), in a list with commas.
        output_json: write everything to this file.
        chart: draw the speedups into this PNG.
        quick: a toy model, to see that everything works.
    """
    if env.world_size() > 1:
        raise LlamaError("start this without torchrun: it counts one rank of several by itself")
    prompt_tokens = (32 if quick else 512) if prompt_tokens is None else prompt_tokens
    given = {"prompt_tokens": prompt_tokens, "context": context, "bandwidth": bandwidth, "tflops": tflops}
    for name, value in given.items():
        if value <= 0:
            raise LlamaError(f"{name} must lie above zero, is {value}")
    for path in (output_json, chart):
        check_writable(path)
    geometry = geometry or ("tiny" if quick else "llama-2-7b")
    args, known = model_args(geometry), parse_links(links)
    ranks, batches = parse_sizes("world_sizes", world_sizes), parse_sizes("batch_sizes", batch_sizes)
    if ranks[0] != 1:
        raise LlamaError(f"--world_sizes begins with 1, which the others are compared with, not {world_sizes!r}")
    partitions = [Partition.create(args, size) for size in ranks]
    card = Limits(bandwidth * 1e9, tflops * 1e12)
    runs = []
    for partition in partitions:
        notice(f"counting at {partition.world_size} ranks")
        for stage, calls in count(partition, batches, prompt_tokens).items():
            n_seen = context if stage[0] == "decode" else prompt_tokens
            runs.append(run_report(stage, partition, calls, card, n_seen, known))
    add_speedups(runs)
    report = {
        **beginning(torch.device("cpu")),
        "model": {"name": geometry, "n_params": n_unique_params(args), "args": dataclasses.asdict(args)},
        "settings": {
            "dtype": NAMES[DTYPE], "prompt_tokens": prompt_tokens, "context": context, "world_sizes": ranks,
            "batch_sizes": batches, "bandwidth": card.read, "flops": card.flops,
            "links": {name: dataclasses.asdict(link) for name, link in known.items()},
        },
        "runs": runs,
    }  # fmt: skip
    write_report(report, table(report), output_json, chart, draw)


if __name__ == "__main__":
    run(main)
