"""Small models and batches for the tests of fine-tuning, and what PEFT makes of them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from peft import PromptTuningConfig, get_peft_model
from support import VOCAB, hf_model, write_meta
from torch import Tensor

from llama.checkpoint.load import load_model
from llama.checkpoint.source import open_checkpoint
from llama.data.examples import Example
from llama.env import is_speaker
from llama.finetuning.run_folder import RunFolder
from llama.model import Transformer
from llama.parallel import groups
from llama.parallel.partition import Partition

# Two templates that open alike, as Alpaca's; then what differs.
OPENING = list(range(10, 30))
TEMPLATES = [[*OPENING, *range(40, 55)], [*OPENING, *range(60, 72)]]


def example(rng: random.Random) -> Example:
    """A template's words, a question and an answer, of tokens that occur in no template."""
    prompt = [1, *TEMPLATES[rng.randrange(2)], *(rng.randrange(100, VOCAB) for _ in range(rng.randrange(1, 12))), 9]
    answer = [rng.randrange(100, VOCAB) for _ in range(rng.randrange(1, 15))]
    return Example((*prompt, *answer, 2), len(prompt))


def batch_of(n: int, seed: int = 0) -> list[Example]:
    """`n` examples that follow from the seed."""
    rng = random.Random(seed)
    return [example(rng) for _ in range(n)]


def sharded(folder: Path, dtype: torch.dtype = torch.float32, tensor_split: str | None = None) -> Transformer:
    """This rank's shard of the checkpoint in `folder`."""
    checkpoint, ranks = open_checkpoint(folder), groups.current()
    return load_model(checkpoint, Partition.create(checkpoint.args, ranks.world_size, tensor_split), ranks, dtype)


def write_model(folder: Path, generation: str = "2") -> Path:
    """A tiny checkpoint whose Hugging Face twin is `hf_model(generation)`."""
    return write_meta(folder, hf_model(generation))


def claimed(out: Path, **description: Any) -> RunFolder:
    """A run's folder, claimed as the command claims it: by one rank, while the others wait."""
    folder = RunFolder(out)
    with groups.phase("folder"):
        if is_speaker():
            folder.claim(description)
    return folder


def peft_twin(generation: str, prompt: Tensor) -> Any:
    """PEFT's prompt tuning over the Hugging Face twin, from the same soft prompt."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prompt.shape[0])
    model = get_peft_model(hf_model(generation), config)
    with torch.no_grad():
        peft_prompt(model).copy_(prompt)
    return model


def peft_prompt(model: Any) -> Tensor:
    """The soft prompt that PEFT trains."""
    return model.prompt_encoder["default"].embedding.weight


def peft_loss(model: Any, examples: list[Example]) -> Tensor:
    """Mean loss over the learnt tokens of a batch, padded as Trainer's collators pad it."""
    width = max(len(one.tokens) for one in examples)
    ids = torch.tensor([[*one.tokens, *[0] * (width - len(one.tokens))] for one in examples])
    mask = torch.tensor([[1] * len(one.tokens) + [0] * (width - len(one.tokens)) for one in examples])
    labels = torch.full_like(ids, -100)
    for row, one in enumerate(examples):
        labels[row, one.n_context : len(one.tokens)] = torch.tensor(one.tokens[one.n_context :])
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss
