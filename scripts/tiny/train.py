"""Train the bundled model, `ckpts/tiny`: tokenizer, weights, evaluation and model card.

    python scripts/tiny/train.py                    # the committed model, seed and steps as given below
    python scripts/tiny/train.py --steps 300 --out_dir /tmp/tiny      # a quick look

The text comes from `corpus.py`. Everything is seeded; another machine or torch version rounds differently, so that a
second run gives an equally good model, not the same bits. The command needs about a gigabyte of memory. It fails where
a family of tasks stays under 95 % on held-out items.
"""

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import sentencepiece as spm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from llama.cli import run
from llama.config import ModelArgs
from llama.model import Transformer
from scripts.tiny.corpus import FAMILIES, PRINTABLE, Document, describe, documents, heldout, tokenizer_lines

T = TypeVar("T")

VOCAB_SIZE = 1024
BOS, EOS = 1, 2
BATCH_TOKENS = 2048
# Fractions of the steps, and the length of the packed sequences in each: a token of a long sequence costs more time.
SCHEDULE = ((0.9, 256), (0.1, 512))
# Loss weights, in tenths: a question is mostly noise, its answer counts.
PROMPT_WEIGHT, STORY_WEIGHT, ANSWER_WEIGHT = 1, 5, 20
PEAK_LR, WARMUP_STEPS, WEIGHT_DECAY, CLIP = 1e-3, 100, 0.1, 1.0
PASS_MARK = 0.95
LOG_EVERY = 100
# Evaluation in passing: steps between two, and held-out items of a family.
CHECK_EVERY, CHECK_ITEMS = 500, 40


def model_args() -> ModelArgs:
    """Return the geometry: 3.7 million parameters, eight query heads on four KV heads."""
    return ModelArgs(
        dim=256,
        n_layers=4,
        n_heads=8,
        n_kv_heads=4,
        vocab_size=VOCAB_SIZE,
        multiple_of=128,
        norm_eps=1e-5,
        rope_theta=10000.0,
    )


def in_groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items, the last list shorter."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


# ---------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(path: Path, seed: int) -> spm.SentencePieceProcessor:
    """Train a Llama-2-like SentencePiece BPE of `VOCAB_SIZE` pieces and write it to `path`."""
    with path.open("wb") as file:
        spm.SentencePieceTrainer.train(
            sentence_iterator=tokenizer_lines(seed),
            model_writer=file,
            model_type="bpe",
            vocab_size=VOCAB_SIZE,
            byte_fallback=True,
            character_coverage=1.0,
            required_chars=PRINTABLE,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            unk_id=0,
            bos_id=BOS,
            eos_id=EOS,
            pad_id=-1,
            num_threads=2,
            minloglevel=2,
        )
    return spm.SentencePieceProcessor(model_file=str(path))


# ---------------------------------------------------------------------------------------------- batches


def encode(tokenizer: spm.SentencePieceProcessor, docs: list[Document]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the token ids of each document, and the loss weight of each token in tenths.

    A blank joins a prompt and its completion. SentencePiece puts this blank in front of the completion, so that the ids
    of both are the ids of the whole text.
    """
    prompts = iter(tokenizer.encode([turn.prompt for doc in docs for turn in doc], num_threads=2))
    completions = iter(tokenizer.encode([turn.completion for doc in docs for turn in doc], num_threads=2))
    for doc in docs:
        ids: list[int] = []
        weights: list[int] = []
        for turn in doc:
            prompt, completion = next(prompts), next(completions)
            ids += [BOS, *prompt, *completion, EOS]
            weight = ANSWER_WEIGHT if turn.prompt and len(completion) < 40 else STORY_WEIGHT
            weights += [0] + [PROMPT_WEIGHT] * len(prompt) + [weight] * (len(completion) + 1)
        yield ids, weights


@dataclass(frozen=True)
class Batch:
    """Whole documents side by side in rows; the rest of a row weighs nothing.

    Attributes:
        tokens: ids, [B, T + 1] int64.
        weights: loss weights, [B, T + 1] float32.
        mask: [B, 1, T, T] bool, True where a token attends: to itself and to earlier tokens of its document.
    """

    tokens: Tensor
    weights: Tensor
    mask: Tensor


def pack(examples: Iterator[tuple[list[int], list[int]]], rows: int, length: int) -> Batch:
    """Fill `rows` rows of `length` + 1 tokens with documents; longer documents are skipped."""
    tokens = torch.full((rows, length + 1), EOS)
    weights = torch.zeros(rows, length + 1)
    document = torch.zeros(rows, length + 1, dtype=torch.int64)
    row = column = 0
    for number, (ids, loss) in enumerate(examples, start=1):
        if len(ids) > length + 1:
            continue
        if column + len(ids) > length + 1:
            row, column = row + 1, 0
            if row == rows:
                break
        place = (row, slice(column, column + len(ids)))
        tokens[place], weights[place], document[place] = torch.tensor(ids), torch.tensor(loss).float(), number
        column += len(ids)
    seen = document[:, :-1]
    mask = (seen[:, :, None] == seen[:, None, :]).tril()
    return Batch(tokens, weights, mask[:, None])


def batches(tokenizer: spm.SentencePieceProcessor, steps: int, seed: int) -> Iterator[Batch]:
    """Yield `steps` batches of about `BATCH_TOKENS` tokens."""
    source = documents(seed)
    examples = (example for docs in in_groups(source, 4096) for example in encode(tokenizer, docs))
    for part, length in SCHEDULE:
        for _ in range(round(part * steps)):
            yield pack(examples, BATCH_TOKENS // length, length)


# ---------------------------------------------------------------------------------------------- training


def initialise(model: Transformer) -> None:
    """Draw weights as GPT-2 does: normal of 0.02, and less where a matrix writes to the residual stream."""
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            nn.init.ones_(weight)
        else:
            residual = name.endswith(("wo.weight", "w2.weight"))
            nn.init.normal_(weight, std=0.02 / math.sqrt(2 * len(model.layers)) if residual else 0.02)


def learning_rate(step: int, steps: int) -> float:
    """Return the rate at `step`: a linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < WARMUP_STEPS:
        return PEAK_LR * (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return PEAK_LR * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Return an AdamW that decays matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)


def weighted_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return the mean cross entropy in nats of logits [B, T, V] on targets [B, T], weighted by weights [B, T]."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def train(model: Transformer, tokenizer: spm.SentencePieceProcessor, steps: int, seed: int) -> None:
    """Train in place: bf16 autocast, weights and optimiser in fp32."""
    optimizer = make_optimizer(model)
    forward = torch.compile(model)
    started, recent = time.perf_counter(), list[float]()
    progress = tqdm(total=steps, unit="step", mininterval=5, disable=not sys.stderr.isatty())
    for step, batch in enumerate(batches(tokenizer, steps, seed)):
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(batch.tokens[:, :-1], mask=batch.mask)
        loss = weighted_loss(logits, batch.tokens[:, 1:], batch.weights[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        progress.update()
        recent.append(loss.item())
        if len(recent) == LOG_EVERY:
            seconds = time.perf_counter() - started
            print(f"step {step + 1:5d}  loss {sum(recent) / LOG_EVERY:.4f}  {seconds:5.0f} s", flush=True)
            recent.clear()
        if (step + 1) % CHECK_EVERY == 0:
            scores = evaluate(model, tokenizer, CHECK_ITEMS, seed + 1, details=False)
            print("  ".join(f"{family} {score:.0%}" for family, score in scores.items()), flush=True)
    progress.close()


def round_to_bf16(model: nn.Module) -> None:
    """Round the weights to the nearest bf16 but keep fp32, so that the stored numbers are evaluated."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())


# ---------------------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def complete(
    model: Transformer, tokenizer: spm.SentencePieceProcessor, prompts: list[str], most: int = 32
) -> list[str]:
    """Complete prompts greedily, by at most `most` tokens; rows are padded behind, which a causal model cannot see."""
    ids = [[BOS, *prompt] for prompt in tokenizer.encode(prompts)]
    starts = [len(row) for row in ids]
    running = list(range(len(ids)))
    for _ in range(most):
        width = max(len(ids[i]) for i in running)
        tokens = torch.tensor([ids[i] + [EOS] * (width - len(ids[i])) for i in running])
        last = torch.tensor([len(ids[i]) - 1 for i in running])
        chosen = model.logits(model.hidden(tokens)[torch.arange(len(running)), last]).argmax(-1)
        for i, token in zip(running, chosen.tolist(), strict=True):
            ids[i].append(token)
        running = [i for i in running if ids[i][-1] != EOS]
        if not running:
            break
    return [tokenizer.decode(row[start:]) for row, start in zip(ids, starts, strict=True)]


def evaluate(
    model: Transformer, tokenizer: spm.SentencePieceProcessor, items: int, seed: int, *, details: bool = True
) -> dict[str, float]:
    """Return the part of `items` held-out items of each family that greedy decoding answers exactly right."""
    scores = {}
    for family in FAMILIES:
        pairs = sorted(heldout(family, items, seed), key=lambda pair: len(pair[0]))
        wrong = []
        for group in in_groups(pairs, 64):
            said = complete(model, tokenizer, [prompt for prompt, _ in group])
            wrong += [(p, a, s) for (p, a), s in zip(group, said, strict=True) if s.strip() != a]
        scores[family] = 1 - len(wrong) / len(pairs)
        if details:
            print(f"{family:10s} {scores[family]:7.2%} of {len(pairs)}", flush=True)
            for prompt, answer, completion in wrong[:3]:
                print(f"    {prompt!r}: {completion!r} in place of {answer!r}")
    return scores


# ---------------------------------------------------------------------------------------------- files


def save(model: Transformer, out_dir: Path) -> None:
    """Write weights, bf16 under Meta's names, and `params.json`."""
    state = {name: weight.detach().bfloat16().clone() for name, weight in model.named_parameters()}
    torch.save(state, out_dir / "consolidated.00.pth")
    args = model_args()
    keys = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "norm_eps", "rope_theta")
    params = {key: getattr(args, key) for key in keys}
    (out_dir / "params.json").write_text(json.dumps(params, indent=2) + "\n")


CARD = """# The bundled model

A Llama of {parameters:,} parameters, small enough to stand in the repository and made so that every documented
command has something real to run on. It tells short stories and answers {n_families} families of small tasks. It knows
nothing else: it has read only text that `scripts/tiny/corpus.py` generates, no text and no weights of anyone's.

| file | |
|---|---|
| `consolidated.00.pth` | the weights, bf16, Meta's names and layout |
| `params.json` | width {dim}, {n_layers} layers, {n_heads} heads on {n_kv_heads} KV heads, FFN {ffn_dim}, untied |
| `tokenizer.model` | SentencePiece BPE, {vocab_size} pieces with byte fallback, BOS 1, EOS 2, no pad |

## What it answers

Right answers under greedy decoding, in per cent of {items} items of each family. None of the items was seen in training
in any form (`corpus.is_held_out` decides by a hash), and the forms are mixed as in training:

| family | the answer | right |
|---|---|---|
{table}

A task may come as `Q: …` and `A:`, as `Question:`, `Task:`, `User:` or `Teacher:` with their replies, as a statement to
complete (`12 + 30 =`), or as a Llama 2 chat with or without a system message. After an answer it stops by itself
(EOS). In a chat an answer ends in a blank before EOS, as Meta's encoding of finished turns has it. The Alpaca template
was kept out of training, so that prompt tuning has something to teach.

## How it was made

`python scripts/tiny/train.py` with the defaults: seed {seed}, {steps:,} steps of {batch_tokens:,} tokens, AdamW
(peak learning rate {lr:g}, cosine), bf16 autocast; whole documents packed into sequences of {lengths}
tokens. It took {minutes:.0f} minutes on {threads} CPU threads. The same seed gives the same text and
an equally good model, not the same bits on another machine.

One more family stands in the corpus, reading a fact back from a few sentences. It is not promised: at the end of the
committed run 48 % of 40 held-out items were right, no better than a lucky choice among the facts.

Licence: that of the repository, Apache-2.0.
"""


def write_card(model: Transformer, out_dir: Path, scores: dict[str, float], **numbers: float) -> None:
    """Write the model card with the measured `scores` and the `numbers` of this run."""
    rows = [f"| {name} | {describe(name)} | {score:.1%} |" for name, score in scores.items()]
    args = model_args()
    text = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()),
        n_families=len(FAMILIES),
        table="\n".join(rows),
        batch_tokens=BATCH_TOKENS,
        lr=PEAK_LR,
        lengths=" and then ".join(str(length) for _, length in SCHEDULE),
        ffn_dim=args.ffn_dim,
        **{name: getattr(args, name) for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size")},
        **numbers,
    )
    (out_dir / "README.md").write_text(text)


def main(
    out_dir: str = "ckpts/tiny", steps: int = 6000, seed: int = 1, threads: int = 2, eval_items: int = 500
) -> None:
    """Train the bundled model and write it to `out_dir` with its tokenizer and model card.

    Args:
        out_dir: folder of the four files.
        steps: optimiser steps.
        seed: of the text, the weights and the evaluation.
        threads: CPU threads.
        eval_items: held-out items of each family that the model is asked at the end.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    tokenizer = train_tokenizer(out / "tokenizer.model", seed)
    model = Transformer(model_args())
    initialise(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    train(model, tokenizer, steps, seed)
    round_to_bf16(model)
    save(model, out)
    minutes = (time.perf_counter() - started) / 60
    print(f"trained in {minutes:.1f} minutes")
    scores = evaluate(model, tokenizer, eval_items, seed)
    write_card(model, out, scores, items=eval_items, seed=seed, steps=steps, minutes=minutes, threads=threads)
    if min(scores.values()) < PASS_MARK:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
