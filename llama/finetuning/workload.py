"""A training run as the plan sees it: what is at work at a time, from a run's settings and its examples."""

from __future__ import annotations

from collections.abc import Sequence

from llama.checkpoint.training import Training
from llama.data.examples import Example
from llama.finetuning.settings import TrainSettings
from llama.finetuning.targets import resolve_targets


def workload(settings: TrainSettings, copies: int = 1, examples: Sequence[Example] = ()) -> Training:
    """What `llama.checkpoint.check.check_fit` is asked about before a model is loaded to be tuned.

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
