"""Settings of a training run, checked before anything is loaded, and the work that the plan is told of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from llama.adapters.adapter import resolve_targets
from llama.data.examples import Example
from llama.data.templates import FORMATS
from llama.errors import UsageError
from llama.plan.training import Training

METHODS = ("prompt", "lora")
INITS = ("text", "random")
SCHEDULERS = ("constant", "linear", "cosine")
TRAINERS = ("native", "hf")
# What may differ when a run goes on: it changes where and how fast, not what is computed.
FREE_ON_RESUME = ("save_steps", "save_total_limit", "activation_checkpointing", "compile")


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a training run.

    Args:
        method: prompt (a soft prompt before the text) or lora.
        trainer: native, or hf to have transformers' Trainer drive the same model and data.
        template: how a record becomes a text: alpaca, llama2, llama3 or plain.
        num_virtual_tokens: length of the soft prompt.
        init: text, or random to start from random tokens of the vocabulary.
        init_text: the text that the soft prompt starts from; by default Alpaca's opening words.
        lora_r: rank of the updates.
        lora_alpha: their scale; it is divided by the rank.
        lora_dropout: part of a linear's inputs left out of its update in training.
        lora_targets: linears that are updated, by Meta's or Hugging Face's names, or all.
        use_rslora: divide alpha by the rank's square root.
        batch_size: examples of a batch, over all copies of the model.
        gradient_accumulation_steps: batches of one optimiser step.
        num_epochs: passes over the data.
        max_steps: optimiser steps, in place of num_epochs.
        lr: peak learning rate; by default 0.0003 for lora, and 0.1 for the bundled run.
        lr_scheduler: constant, linear or cosine, after the warm-up.
        warmup_steps: optimiser steps until the peak.
        weight_decay: of AdamW.
        max_grad_norm: longer gradients are shortened to this.
        max_seq_len: tokens of an example; longer ones lose their end.
        train_on_prompt: learn the instruction too, not only the answer.
        eval_fraction: part of the records set aside for evaluation.
        eval_steps: optimiser steps between evaluations.
        save_steps: optimiser steps between checkpoints.
        save_total_limit: checkpoints that are kept.
        seed: of the start, the order of the data and dropout.
        activation_checkpointing: compute activations again instead of keeping them.
        compile: compile the parts of the blocks that it pays for.

    Raises:
        UsageError: for a value that cannot be, naming the flag.
    """

    method: str = "prompt"
    trainer: str = "native"
    template: str = "alpaca"
    num_virtual_tokens: int = 32
    init: str = "text"
    init_text: str | None = None
    lora_r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05
    lora_targets: str = "wq,wv"
    use_rslora: bool = False
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    num_epochs: float = 3.0
    max_steps: int | None = None
    lr: float = 0.03
    lr_scheduler: str = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_seq_len: int = 512
    train_on_prompt: bool = False
    eval_fraction: float = 0.0
    eval_steps: int = 100
    save_steps: int = 100
    save_total_limit: int = 2
    seed: int = 1
    activation_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        self._check_choices()
        for name in (
            "num_virtual_tokens", "lora_r", "batch_size", "gradient_accumulation_steps",
            "eval_steps", "save_steps", "save_total_limit",
        ):  # fmt: skip
            _check(name, getattr(self, name) >= 1, "1 or more", getattr(self, name))
        _check("max_seq_len", self.max_seq_len >= 2, "2 or more", self.max_seq_len)
        _check("max_steps", self.max_steps is None or self.max_steps >= 1, "1 or more", self.max_steps)
        _check("warmup_steps", self.warmup_steps >= 0, "0 or more", self.warmup_steps)
        _check("seed", 0 <= self.seed < 2**63, "from 0 to 2^63 - 1", self.seed)
        for name in ("num_epochs", "lr", "lora_alpha", "max_grad_norm"):
            value = getattr(self, name)
            _check(name, math.isfinite(value) and value > 0, "above 0", value)
        _check(
            "weight_decay", math.isfinite(self.weight_decay) and self.weight_decay >= 0, "0 or more", self.weight_decay
        )
        # AdamW's products of the two must stay numbers of float32.
        for name, most in (("lr", 1e30), ("weight_decay", 1e6)):
            _check(name, getattr(self, name) <= most, f"{most:g} at most", getattr(self, name))
        for name in ("lora_dropout", "eval_fraction"):
            _check(name, 0 <= getattr(self, name) < 1, "from 0 to below 1", getattr(self, name))

        if self.method == "lora":
            resolve_targets(self.lora_targets)
            if self.trainer == "hf":
                raise UsageError("--trainer hf trains soft prompts alone: leave it out for --method lora")

    def _check_choices(self) -> None:
        for name, known in (
            ("method", METHODS), ("trainer", TRAINERS), ("template", tuple(FORMATS)), ("init", INITS),
            ("lr_scheduler", SCHEDULERS),
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in known:
                raise UsageError(f"--{name} takes {', '.join(known[:-1])} or {known[-1]}, not {value!r}")

    def decisive(self) -> dict[str, object]:
        """Return the settings that decide the result, and so must not change when a run goes on."""
        return {name: value for name, value in asdict(self).items() if name not in FREE_ON_RESUME}

    def n_steps(self, steps_per_epoch: int) -> int:
        """Return the optimiser steps of the whole run."""
        by_epochs = max(1, math.ceil(self.num_epochs * steps_per_epoch))
        return by_epochs if self.max_steps is None else self.max_steps

    def learning_rate(self, step: int, n_steps: int) -> float:
        """Return the learning rate of step `step`, counted from 0: a linear warm-up, then constant or down to zero."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, n_steps - self.warmup_steps)
        if self.lr_scheduler == "linear":
            return self.lr * max(0.0, 1 - done)
        if self.lr_scheduler == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.lr


def _check(name: str, good: bool, range_: str, value: object) -> None:
    if not good:
        raise UsageError(f"--{name} must be {range_}, is {value}")


def workload(settings: TrainSettings, copies: int = 1, examples: Sequence[Example] = ()) -> Training:
    """Return the work that `llama.plan.advice.check_fit` is asked about before a model is loaded to be tuned.

    Args:
        settings: of the run.
        copies: of the model, which share every batch out.
        examples: of the run; the longest of them make the largest batch. Without them every example is taken
            to have `max_seq_len` tokens.

    Raises:
        UsageError: for a LoRA target that is no linear.
    """
    share = -(-settings.batch_size // copies)
    lengths = sorted((len(example.tokens) for example in examples), reverse=True)[:share]
    is_lora = settings.method == "lora"
    return Training(
        share,
        settings.max_seq_len,
        method=settings.method,
        n_virtual=0 if is_lora else settings.num_virtual_tokens,
        lora_r=settings.lora_r,
        lora_targets=resolve_targets(settings.lora_targets) if is_lora else (),
        lora_dropout=is_lora and settings.lora_dropout > 0,
        checkpointing=settings.activation_checkpointing,
        copies=copies,
        lengths=tuple(lengths),
    )
