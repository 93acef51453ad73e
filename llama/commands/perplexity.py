"""Perplexity of a text: `python scripts/perplexity.py ckpts/7B --text_file book.txt --quantize int4`.

torchrun --nproc_per_node 2 scripts/perplexity.py ckpts/7B --text_file book.txt --tensor_split 3,1
python scripts/perplexity.py ckpts/7B --text_file book.txt --compare ckpts/7B-int4

The JSON file of `--output_json` is one object:

    text_file, n_tokens (of the text), n_windows, max_seq_len
    device, world_size
    results         one for each model; the others are compared with the first: ckpt_dir, quantization (in
                    words; null for none), dtype, perplexity, nats (mean negative log-probability of a token), ratio (to
                    the first one's perplexity), change (mean magnitude by which a token's log-probability differs from
                    the first one's, nats)
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from llama.checkpoint.source import Checkpoint, open_checkpoint
from llama.cli import run
from llama.env import is_speaker
from llama.flags import Without
from llama.generation.command import write_json
from llama.generation.engine import EngineOptions
from llama.generation.llama import Llama
from llama.generation.perplexity import Scores, read_windows, score
from llama.generation.tasks import check_writable
from llama.parallel import groups
from llama.plan.inference import Workload
from llama.quantization.scheme import Asked
from llama.runtime import RunOptions
from llama.tokenizer import find_tokenizer, load_tokenizer


@dataclass(frozen=True)
class Subject:
    """One model that is measured.

    Args:
        ckpt_dir: its checkpoint.
        options: options to load it with, quantization included.
        words: its quantization in words, at load or as stored; None for none.
    """

    ckpt_dir: str
    options: RunOptions
    words: str | None

    @property
    def name(self) -> str:
        """The label of its line in the table."""
        return self.ckpt_dir if self.words is None else f"{self.ckpt_dir}, {self.words}"


def subjects(ckpt_dir: str, options: RunOptions, compare: str | None) -> list[Subject]:
    """Return the model as it is stored, and those that are put beside it.

    Raises:
        LlamaError: when there is no such model, or it cannot be quantized so.
    """
    checkpoint, asked = open_checkpoint(ckpt_dir), options.quantization
    scheme = asked.scheme() if isinstance(asked, Asked) else asked
    as_stored = dataclasses.replace(options, quantization=Asked())
    found = [Subject(ckpt_dir, as_stored, _words(checkpoint))]
    if scheme is not None:
        checkpoint.require_numbers("measuring it before and after")
        found.append(Subject(ckpt_dir, options, scheme.words()))
    if compare is not None:
        found.append(Subject(compare, as_stored, _words(open_checkpoint(compare))))
    return found


def _words(checkpoint: Checkpoint) -> str | None:
    return None if checkpoint.scheme is None else checkpoint.scheme.words()


def table(names: Sequence[str], scores: Sequence[Scores]) -> str:
    """Return one line of figures for each model; the others are compared with the first."""
    rows = [["", "perplexity", "nats a token", "ratio", "change"]]
    for name, own in zip(names, scores, strict=True):
        row = [name, f"{own.perplexity:.4f}", f"{own.nats:.5f}"]
        if own is not scores[0]:
            row += [f"{own.perplexity / scores[0].perplexity:.4f}", f"{own.change(scores[0]):.4f}"]
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if len(scores) == 1:
        rows = [row[:3] for row in rows]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )


def record(subject: Subject, own: Scores, first: Scores, dtype: torch.dtype) -> dict[str, Any]:
    """Return one entry of `results` in `--output_json`."""
    return {
        "ckpt_dir": subject.ckpt_dir,
        "quantization": subject.words,
        "dtype": str(dtype).removeprefix("torch."),
        "perplexity": own.perplexity,
        "nats": own.nats,
        "ratio": own.perplexity / first.perplexity,
        "change": own.change(first),
    }


def main(
    ckpt_dir: str,
    text_file: str,
    compare: str | None = None,
    tokenizer_path: str | None = None,
    output_json: str | None = None,
    engine: Annotated[EngineOptions, Without("compile")] = EngineOptions(max_batch_size=8),
    options: RunOptions = RunOptions(),
) -> None:
    """Measure the perplexity of a text under a model, and what quantizing the model costs.

    Args:
        ckpt_dir: anything that example.py reads.
        text_file: a UTF-8 text.
        compare: another checkpoint of the same tokenizer to put beside it, such as what quantize.py wrote of it.
        tokenizer_path: its tokenizer; by default beside the weights or one folder up.
        output_json: write the figures to this file.
        max_seq_len: tokens of the windows that the text is cut into.
        max_batch_size: windows that run at a time, at most; changes no result.
        quantize: measure the model as int8 or int4 too.
    """
    with groups.phase("settings"):
        check_writable(output_json)
        measured = subjects(ckpt_dir, options, compare)
        tokenizer_path = str(find_tokenizer(ckpt_dir, tokenizer_path))
        texts = read_windows(text_file, load_tokenizer(Path(tokenizer_path)), engine.max_seq_len)
    work = Workload(min(len(texts), engine.max_batch_size), len(texts[0]))
    scores, records = [], []
    for subject in measured:
        llama = Llama.open(subject.ckpt_dir, tokenizer_path, engine, subject.options, expected=work)
        scores.append(score(llama, texts))
        records.append(record(subject, scores[-1], scores[0], llama.model.norm.weight.dtype))
        place = {"device": llama.model.ranks.device.type, "world_size": llama.model.ranks.world_size}
        del llama
        gc.collect()  # free its memory for the next model
    n_tokens, length = len(scores[0].log_probs), engine.max_seq_len
    if is_speaker():
        print(f"{text_file}: {n_tokens:,} tokens in {len(texts):,} windows of {length}, BOS in front of each")
        print(table([subject.name for subject in measured], scores), flush=True)
    text = {"text_file": text_file, "n_tokens": n_tokens, "n_windows": len(texts), "max_seq_len": length}
    write_json(output_json, {**text, **place, "results": records})


def start() -> None:
    """Run `main`; `CKPT` is `--ckpt_dir CKPT`."""
    run(main, n_words=1)
