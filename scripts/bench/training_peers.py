"""Prompt-tuning loops for `training.py`: ours, and `transformers.Trainer` with PEFT in several ways; their work."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llama.data.batches import Order
from llama.data.examples import Example
from llama.device import DTYPES, choose_device
from llama.errors import LlamaError
from scripts.bench.peers import Kind, Setup, synchronize

Batches = Sequence[Sequence[Example]]
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class TrainingCase:
    """The work of every loop.

    Args:
        examples: taken in the order of `seed`.
        steps: of a round.
        rounds: counted ones.
    """

    examples: list[Example]
    steps: int
    rounds: int
    seed: int

    def batches(self, batch_size: int, round_number: int) -> list[list[Example]]:
        """Return one batch a step; rounds never share a batch while there are others."""
        order = Order(len(self.examples), batch_size, self.seed)
        steps = range(round_number * self.steps, (round_number + 1) * self.steps)
        return [[self.examples[i] for batch in order.step_batches(step) for i in batch] for step in steps]


@dataclass(frozen=True)
class TrainingSetup(Setup):
    """The way a loop is started.

    Args:
        prompt: [P, E] float32, the first values of the virtual tokens.
        lr: learning rate of AdamW, constant and without weight decay.
        max_seq_len: tokens to which every example is padded where a loop does so.
    """

    prompt: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    lr: float = 3e-3
    max_seq_len: int = 512


@dataclass(frozen=True)
class Steps:
    """Some measured optimiser steps.

    Args:
        seconds: of all steps, on the clock.
        cpu_seconds: of the processor over all threads, waiting ones included.
        losses: of each step, before its update.
    """

    seconds: float
    cpu_seconds: float
    losses: list[float]


class Clock:
    """A clock that starts when it is made, and counts seconds and those of the processor."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        synchronize(device)
        self.started = time.perf_counter(), time.process_time()

    def steps(self, losses: list[float]) -> Steps:
        """Return the steps with these losses, taken since the start."""
        synchronize(self.device)
        return Steps(time.perf_counter() - self.started[0], time.process_time() - self.started[1], losses)


class OurLoop:
    """Our loop."""

    def load(self, setup: TrainingSetup) -> None:
        """Read the weights and freeze them."""
        from llama.checkpoint.load import load_model
        from llama.checkpoint.source import open_checkpoint
        from llama.finetuning.prompt_tuning import SoftPrompt
        from llama.finetuning.step import Stepper
        from llama.parallel import groups
        from llama.parallel.partition import Partition

        checkpoint = open_checkpoint(setup.folder)
        self.device = choose_device(setup.device)
        ranks = groups.start(self.device)
        model = load_model(checkpoint, Partition.create(checkpoint.args, 1), ranks, DTYPES[setup.dtype])
        tuning = SoftPrompt(model, setup.prompt)
        optimizer = torch.optim.AdamW([tuning.parameter], lr=setup.lr, weight_decay=0.0)
        self.stepper = Stepper(model, tuning, optimizer, MAX_GRAD_NORM)

    def run(self, batches: Batches) -> Steps:
        """Take one step a batch."""
        clock = Clock(self.device)
        return clock.steps([self.stepper.run(step, [batch]).loss for step, batch in enumerate(batches)])


class TrainerLoop:
    """`transformers.Trainer` with PEFT's prompt tuning; each batch is padded to its longest example.

    Args:
        autocast: whether the weights stay in float32 and `bf16=True` computes in the setup's dtype; else the frozen
            model is held in this dtype.
        padded: whether every example is padded to `max_seq_len`.
    """

    def __init__(self, autocast: bool = False, padded: bool = False) -> None:
        self.autocast, self.padded = autocast, padded
        self.losses: list[float] = []

    def load(self, setup: TrainingSetup) -> None:
        """Read the weights, and start PEFT's prompt from the setup's."""
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)  # Trainer would start process groups for a world of one
        os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        try:
            import peft
            import transformers
        except ImportError:
            raise LlamaError("Trainer needs transformers and peft: pip install -e '.[hf]'") from None
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self.setup, self.device = setup, choose_device(setup.device)
        self.clock, self.measured = Clock(self.device), Steps(0.0, 0.0, [])
        held = torch.float32 if self.autocast else DTYPES[setup.dtype]
        base: Any = transformers.AutoModelForCausalLM.from_pretrained(
            setup.folder, dtype=held, local_files_only=True, attn_implementation="sdpa"
        )
        base.config.use_cache = False
        options = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(setup.prompt))
        self.model: Any = peft.get_peft_model(base, options)
        with torch.no_grad():
            self.model.prompt_encoder.get_parameter("default.embedding.weight").copy_(setup.prompt)
        self.trainer = self._trainer(transformers)

    def _trainer(self, transformers: Any) -> Any:
        class InOrder(transformers.Trainer):
            """A Trainer that takes the batches as they come."""

            def get_train_dataloader(self) -> Any:
                return torch.utils.data.DataLoader(self.train_dataset, batch_size=None)

        arguments = transformers.TrainingArguments(
            output_dir=os.path.join(self.setup.folder, "unused"), save_strategy="no", report_to=[],
            optim="adamw_torch", learning_rate=self.setup.lr, weight_decay=0.0, lr_scheduler_type="constant",
            max_grad_norm=MAX_GRAD_NORM, logging_steps=1, disable_tqdm=True, remove_unused_columns=False,
            use_cpu=self.device.type == "cpu", bf16=self.autocast, max_steps=1,
        )  # fmt: skip
        trainer = InOrder(model=self.model, args=arguments)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(self._timekeeper(transformers.TrainerCallback))
        return trainer

    def _timekeeper(self, base: Any) -> Any:
        loop = self

        class Timekeeper(base):
            """A clock that starts at the first step of a round, after all that is done once."""

            def on_train_begin(self, *_: Any, **__: Any) -> None:
                loop.losses, loop.clock = [], Clock(loop.device)

            def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
                if "loss" in logs:
                    loop.losses.append(float(logs["loss"]))
                    loop.measured = loop.clock.steps(loop.losses)

        return Timekeeper()

    def run(self, batches: Batches) -> Steps:
        """Take one step a batch; collating counts, as packing does in our loop."""
        self.trainer.train_dataset = _Collated(batches, self.setup.max_seq_len if self.padded else None)
        self.trainer.args.max_steps = len(batches)
        self.trainer.train()
        return self.measured


class AutocastLoop(TrainerLoop):
    """Trainer with `bf16=True`."""

    def __init__(self) -> None:
        super().__init__(autocast=True)


class PaddedLoop(TrainerLoop):
    """Trainer with every example padded to `max_seq_len`."""

    def __init__(self) -> None:
        super().__init__(padded=True)


class PaddedAutocastLoop(TrainerLoop):
    """Trainer with `bf16=True` and every example padded to `max_seq_len`."""

    def __init__(self) -> None:
        super().__init__(autocast=True, padded=True)


class _Collated(torch.utils.data.Dataset):
    """Batches in Trainer's form, with label -100 on the prompt and the padding."""

    def __init__(self, batches: Batches, length: int | None) -> None:
        self.batches, self.length = batches, length

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        batch = self.batches[index]
        length = self.length or max(len(example.tokens) for example in batch)
        shape = len(batch), length
        columns = {"input_ids": torch.zeros(shape, dtype=torch.int64), "attention_mask": torch.zeros(shape).long()}
        columns["labels"] = torch.full(shape, -100)
        for row, example in enumerate(batch):
            n_tokens, n_context = len(example.tokens), example.n_context
            columns["input_ids"][row, :n_tokens] = torch.tensor(example.tokens)
            columns["attention_mask"][row, :n_tokens] = 1
            columns["labels"][row, n_context:n_tokens] = torch.tensor(example.tokens[n_context:])
        return columns


LOOPS = {
    "ours": Kind(OurLoop, "ours"),
    "hf": Kind(TrainerLoop, "Trainer, padded to longest", "transformers"),
    "hf_autocast": Kind(AutocastLoop, "Trainer, padded to longest", "transformers"),
    "hf_padded": Kind(PaddedLoop, "Trainer, padded to {max_seq_len}", "transformers"),
    "hf_padded_autocast": Kind(PaddedAutocastLoop, "Trainer, padded to {max_seq_len}", "transformers"),
}
