"""How well a model foretells a text: `python scripts/perplexity.py ckpts/7B --text_file book.txt --quantize int4`.

torchrun --nproc_per_node 2 scripts/perplexity.py ckpts/7B --text_file book.txt --tensor_split 3,1
python scripts/perplexity.py ckpts/7B --text_file book.txt --compare ckpts/7B-int4

The JSON file of `--output_json` is one object:

    text_file, n_tokens (of the text), n_windows, max_seq_len
    device, world_size
    results         one for each model, the first of them what the others are compared with: ckpt_dir, quantization (in
                    words; null for none), dtype, perplexity, nats (mean negative log-probability of a token), ratio (to
                    the first one's perplexity), change (mean magnitude by which a token's log-probability differs from
                    the first one's, nats)
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama import Llama
from llama.checkpoint.source import Checkpoint, open_checkpoint
from llama.cli import name_words, run
from llama.env import is_speaker
from llama.errors import UsageError
from llama.generation.command import write_json
from llama.generation.perplexity import Scores, read_windows, score
from llama.generation.tasks import check_writable
from llama.parallel import groups
from llama.plan.inference import Workload
from llama.quantization.scheme import Asked
from llama.tokenizer import find_tokenizer, load_tokenizer


@dataclass(frozen=True)
class Subject:
    """One model that is measured.

    Args:
        ckpt_dir: its checkpoint.
        asked: how it is quantized as it is loaded.
        words: how it is quantized, loaded so or stored so; None for not at all.
    """

    ckpt_dir: str
    asked: Asked
    words: str | None

    @property
    def name(self) -> str:
        """Of its line in the table."""
        return self.ckpt_dir if self.words is None else f"{self.ckpt_dir}, {self.words}"


def subjects(ckpt_dir: str, asked: Asked, compare: str | None) -> list[Subject]:
    """The model as it is, and those that are put beside it.

    Raises:
        LlamaError: when there is no such model, or it cannot be quantized so.
    """
    checkpoint, scheme = open_checkpoint(ckpt_dir), asked.scheme()
    found = [Subject(ckpt_dir, Asked(), _words(checkpoint))]
    if scheme is not None:
        checkpoint.require_numbers("measuring it before and after")
        found.append(Subject(ckpt_dir, asked, scheme.words()))
    if compare is not None:
        found.append(Subject(compare, Asked(), _words(open_checkpoint(compare))))
    return found


def _words(checkpoint: Checkpoint) -> str | None:
    return None if checkpoint.scheme is None else checkpoint.scheme.words()


def table(names: Sequence[str], scores: Sequence[Scores]) -> str:
    """A line a model; the first is what the others are compared with."""
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
    """One of the results of `--output_json`."""
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
    max_seq_len: int = 512,
    max_batch_size: int = 8,
    tokenizer_path: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    tensor_split: str | None = None,
    quantize: str | None = None,
    group_size: int | None = None,
    quantize_output: str | None = None,
    quantize_embedding: str | None = None,
    offload_layers: int = 0,
    output_json: str | None = None,
    no_plan: bool = False,
) -> None:
    """Tell the perplexity of a text under a model, and what quantizing the model costs.

    Args:
        ckpt_dir: anything that example.py reads.
        text_file: a UTF-8 text.
        compare: another checkpoint of the same tokenizer to put beside it, such as what quantize.py wrote of it.
        max_seq_len: tokens of the windows that the text is cut into.
        max_batch_size: windows that run at a time, at most; changes no result.
        tokenizer_path: its tokenizer; by default beside the weights or one folder up.
        dtype: auto, fp32, bf16 or fp16.
        device: auto, cpu, cuda, cuda:N or mps.
        threads: CPU threads of each rank.
        tensor_split: weights of the ranks, such as 3,1.
        quantize: measure it as int8 or int4 too.
        group_size: weights that share a scale in int4: 32, 64 or 128; by default 32.
        quantize_output: int8, int4 or none, for the output layer; by default int8.
        quantize_embedding: int8, int4 or none, for an embedding that is not the output layer; by default none.
        offload_layers: layers kept in host memory, which trades speed for a card's memory.
        output_json: write the figures to this file.
        no_plan: load without asking first whether the memory suffices.
    """
    with groups.phase("settings"):
        check_writable(output_json)
        if max_batch_size < 1:
            raise UsageError(f"--max_batch_size must be 1 or more, is {max_batch_size}")
        asked = Asked(quantize, group_size, quantize_output, quantize_embedding)
        measured = subjects(ckpt_dir, asked, compare)
        tokenizer_path = str(find_tokenizer(ckpt_dir, tokenizer_path))
        texts = read_windows(text_file, load_tokenizer(Path(tokenizer_path)), max_seq_len)
    work = Workload(min(len(texts), max_batch_size), len(texts[0]))
    scores, records = [], []
    for subject in measured:
        llama = Llama.build(
            subject.ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, dtype=dtype, device=device, threads=threads,
            tensor_split=tensor_split, plan=not no_plan and work, quantize=subject.asked,
            offload_layers=offload_layers,
        )  # fmt: skip
        scores.append(score(llama, texts))
        records.append(record(subject, scores[-1], scores[0], llama.model.norm.weight.dtype))
        place = {"device": llama.model.ranks.device.type, "world_size": llama.model.ranks.world_size}
        del llama
        gc.collect()  # the next one gets its memory
    n_tokens = len(scores[0].log_probs)
    if is_speaker():
        print(f"{text_file}: {n_tokens:,} tokens in {len(texts):,} windows of {max_seq_len}, BOS in front of each")
        print(table([subject.name for subject in measured], scores), flush=True)
    text = {"text_file": text_file, "n_tokens": n_tokens, "n_windows": len(texts), "max_seq_len": max_seq_len}
    write_json(output_json, {**text, **place, "results": records})


if __name__ == "__main__":
    run(main, name_words(main, sys.argv[1:], most=1))  # CKPT is --ckpt_dir CKPT
