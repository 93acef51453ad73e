"""Speed of prompt tuning in our loop beside `transformers.Trainer` with PEFT, on the same weights and batches.

    python scripts/bench/training.py --quick                                    # a toy model, under a minute
    python scripts/bench/training.py --dataset alpaca_data.json --tokenizer_path tokenizer.model \\
        --geometry 110m --batch_sizes 8,32 --output_json out.json --chart_path out.png
    python scripts/bench/training.py --device cuda --geometry llama-2-7b --batch_sizes 8 --peak_tflops 989

Each loop runs in a process of its own and stays loaded; rounds of a few steps take turns, so that whatever else the
machine does meets all of them. A first round is not timed, but its losses are reported. All take the same batches,
start from the same prompt and use the same AdamW. Trainer computes in 16 bit in the faster of its two ways, which a
trial finds: the frozen model held in 16 bit, or `bf16=True`. `training_report.py` documents the JSON file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Sequence

import torch

from llama import env
from llama.checkpoint.table import n_unique_params
from llama.cli import run
from llama.config import ModelArgs
from llama.data.examples import Example, encode_records
from llama.data.records import read_records
from llama.device import choose_dtype, set_threads
from llama.env import notice
from llama.errors import LlamaError
from llama.generation.tasks import check_writable
from llama.plan.words import NAMES
from llama.tokenizer import load_tokenizer
from scripts.bench.peers import Running, choose_bench_device
from scripts.bench.report import parse_sizes, write_report
from scripts.bench.training_peers import LOOPS, Steps, TrainingCase, TrainingSetup
from scripts.bench.training_report import Measured, build_report, draw, table
from scripts.bench.weights import model_args, prepared_weights

# Tokens of Alpaca's two templates in Llama's tokenizer: the opening that both share, then the rest of each.
OPENING, STEMS = 9, (30, 28)
TRIAL_STEPS = 2


def synthetic(vocab_size: int, n: int, longest: int, seed: int) -> list[Example]:
    """Return examples of random tokens: two templates that open alike, tasks and answers of many lengths."""
    rng = random.Random(seed)
    words = [rng.randrange(3, vocab_size) for _ in range(OPENING + sum(STEMS))]
    stems = [words[: OPENING + STEMS[0]], words[:OPENING] + words[OPENING + STEMS[0] :]]

    def text(mean: int) -> list[int]:
        return [rng.randrange(3, vocab_size) for _ in range(1 + int(rng.expovariate(1 / mean)))]

    examples = []
    for _ in range(n):
        context = [1, *rng.choice(stems), *text(20)][: longest - 1]
        examples.append(Example(tuple([*context, *text(60), 2][:longest]), len(context)))
    return examples


def read_examples(
    args: ModelArgs, dataset: str | None, tokenizer_path: str | None, max_seq_len: int, seed: int
) -> list[Example]:
    """Return the records in Alpaca's templates, or synthetic examples where no records are given."""
    if dataset is None or tokenizer_path is None:
        if dataset is not None or tokenizer_path is not None:
            raise LlamaError("--dataset and --tokenizer_path belong together: give both, or neither for random tokens")
        return synthetic(args.vocab_size, 1000, max_seq_len, seed)
    tokenizer = load_tokenizer(tokenizer_path)
    if tokenizer.n_words > args.vocab_size:
        raise LlamaError(
            f"{tokenizer_path} has {tokenizer.n_words:,} tokens and the model {args.vocab_size:,}: choose another "
            "--geometry or tokenizer"
        )
    encoded = encode_records(read_records(dataset), tokenizer, max_seq_len=max_seq_len)
    notice(encoded.report())
    return encoded.examples


def fastest_trainer(setup: TrainingSetup, case: TrainingCase, batch_size: int) -> tuple[str, dict[str, float]]:
    """Try Trainer's two ways to compute in 16 bit; return the suffix of the faster loop's name, and both times."""
    if setup.dtype != "bf16":
        return "", {}
    seconds: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        loops = [stack.enter_context(Running(name, setup, LOOPS)) for name in ("hf", "hf_autocast")]
        batch = case.batches(batch_size, 0)[:1]
        for number in range(1 + TRIAL_STEPS):
            for loop in loops:
                (taken,) = loop.ask((batch,))
                if number:
                    seconds[loop.name] = seconds.get(loop.name, 0.0) + taken.seconds
    notice("trial of Trainer: " + ", ".join(f"{name} {taken:.1f} s" for name, taken in seconds.items()))
    return ("_autocast" if seconds["hf_autocast"] < seconds["hf"] else ""), seconds


def measure(names: Sequence[str], setup: TrainingSetup, case: TrainingCase, batch_size: int) -> dict[str, Measured]:
    """Measure the loops, whose rounds take turns."""
    with contextlib.ExitStack() as stack:
        loops = [stack.enter_context(Running(name, setup, LOOPS)) for name in names]
        rounds: dict[str, list[Steps]] = {name: [] for name in names}
        for number in range(case.rounds + 1):
            batches = case.batches(batch_size, number)
            for loop in loops:
                rounds[loop.name] += loop.ask((batches,))
            took = ", ".join(f"{name} {steps[-1].seconds:.2f} s" for name, steps in rounds.items())
            notice(f"batch {batch_size}, {f'round {number} of {case.rounds}' if number else 'warm-up'}: {took}")
        return {loop.name: Measured(loop.kind, rounds[loop.name], loop.memory()[0], loop.loaded[0]) for loop in loops}


def main(
    dataset: str | None = None,
    tokenizer_path: str | None = None,
    geometry: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    batch_sizes: str | None = None,
    num_virtual_tokens: int = 32,
    max_seq_len: int = 512,
    steps: int | None = None,
    rounds: int = 3,
    lr: float = 0.003,
    padded: bool = True,
    peak_tflops: float | None = None,
    seed: int = 1,
    output_json: str | None = None,
    chart_path: str | None = None,
    keep_dir: str | None = None,
    quick: bool = False,
) -> None:
    """Measure our prompt tuning beside Trainer's with PEFT.

    Args:
        dataset: Alpaca's records (JSON or JSONL); without them, random tokens in that form.
        tokenizer_path: the tokenizer of these records.
        geometry: random weights of 110m (the default), of a published geometry such as llama-2-7b, or tiny.
        dtype: bf16 (the default), fp32 (with --quick) or fp16, for all.
        device: auto, cpu or cuda, for all.
        threads: CPU threads; by default all cores.
        batch_sizes: examples a step, such as 8,32; each is measured by itself.
        num_virtual_tokens: virtual tokens of the prompt.
        max_seq_len: tokens at which examples are cut, and to which the padded loop pads.
        steps: of a round; 2, or 3 with --quick.
        rounds: counted rounds of each loop; medians are over rounds.
        lr: constant learning rate.
        padded: whether Trainer padding every example to max_seq_len is measured too, at the first batch size.
        peak_tflops: the most that the card computes; the share that real tokens use is reported (MFU).
        seed: of weights, the prompt and the order.
        output_json: write everything measured to this file.
        chart_path: draw speed and losses into this PNG.
        keep_dir: keep the weights that are written in this folder, or use those of an earlier run.
        quick: a toy model and small numbers, to see that everything works.
    """
    if env.world_size() > 1:
        raise LlamaError("start this without torchrun: every loop runs in one process")
    for name, value in (("num_virtual_tokens", num_virtual_tokens), ("rounds", rounds), ("steps", steps)):
        if value is not None and value < 1:
            raise LlamaError(f"--{name} must be at least 1, is {value}")
    check_writable(output_json)
    check_writable(chart_path)
    geometry = geometry or ("tiny" if quick else "110m")
    max_seq_len = min(max_seq_len, 128) if quick else max_seq_len
    wanted = parse_sizes("batch_sizes", batch_sizes or ("4" if quick else "8,32"))
    where, args = choose_bench_device(device), model_args(geometry)
    compute = choose_dtype(dtype or ("fp32" if quick else "bf16"), where, torch.bfloat16, n_unique_params(args))
    examples = read_examples(args, dataset, tokenizer_path, max_seq_len, seed)
    case = TrainingCase(examples, steps or (3 if quick else 2), rounds, seed)
    generator = torch.Generator().manual_seed(seed)
    # Of the size of the random weights' embeddings.
    prompt = torch.randn(num_virtual_tokens, args.dim, generator=generator) * args.dim**-0.5
    setup = TrainingSetup("", NAMES[compute], str(where), set_threads(threads), 1, None, prompt, lr, max_seq_len)
    with prepared_weights(geometry, None, compute, keep_dir, seed) as weights:
        setup = dataclasses.replace(setup, folder=weights.ours)
        way, trial = fastest_trainer(setup, case, wanted[0])
        found = {}
        for size in wanted:
            names = ["ours", f"hf{way}"] + ([f"hf_padded{way}"] if padded and size == wanted[0] else [])
            found[size] = measure(names, setup, case, size)
    report = build_report(found, case, setup, geometry, args, trial, peak_tflops, where)
    write_report(report, table(report), output_json, chart_path, draw)


if __name__ == "__main__":
    run(main)
