"""The same run under `transformers.Trainer`: the same model, data, optimiser and files, another loop.

Under torchrun, Trainer treats every rank as a copy of the model and feeds each rank different examples; our ranks
share one model. So Trainer is constructed while torchrun's environment variables are hidden. Each rank then runs a
Trainer for a single process, and all ranks compute the same batches.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers import Trainer as TransformersTrainer
from transformers.utils import logging as hf_logging

from llama.env import notice
from llama.finetuning.logs import RunLog
from llama.finetuning.step import Stepper, StepResult, n_targets
from llama.finetuning.trainer import Trainer
from llama.parallel.trained import gradient_norm

_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


class HfTrainer(Trainer):
    """A run whose steps `transformers.Trainer` takes; for soft prompts, without copies of the model."""

    def take_steps(self, log: RunLog | None) -> None:
        """See `Trainer.take_steps`."""
        if self.n_done == self.n_steps:  # Trainer reads max_steps=0 as no limit
            return
        notice("transformers' Trainer takes the steps")
        hf_logging.set_verbosity_error()  # Trainer would warn of process groups that it did not start
        with _hidden(_TORCHRUN):
            loop = _Loop(self, log)
        loop.train()


@contextlib.contextmanager
def _hidden(names: tuple[str, ...]) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


class _Tuned(nn.Module):
    """The model as Trainer sees it: the trained tensors alone, on the devices that they have."""

    def __init__(self, stepper: Stepper) -> None:
        super().__init__()
        self.stepper = stepper
        self.trained = nn.ParameterList(tensor.parameter for tensor in stepper.tuning.trained)

    def to(self, *args: Any, **kwargs: Any) -> _Tuned:
        """Do nothing: the device is chosen already."""
        return self

    def train(self, mode: bool = True) -> _Tuned:
        self.stepper.model.train(mode)
        return super().train(mode)


class _Loop(TransformersTrainer):
    """A Trainer of whole optimiser steps: an item of its data is the number of a step."""

    def __init__(self, run: Trainer, log: RunLog | None) -> None:
        settings, first = run.settings, run.n_done
        self.run_, self.started, self.lr = run, time.perf_counter(), 0.0
        arguments = TrainingArguments(
            output_dir=str(run.folder.path),
            max_steps=run.n_steps - first,
            per_device_train_batch_size=1,
            max_grad_norm=settings.max_grad_norm,
            seed=settings.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=True,  # Trainer moves nothing to a device: see _Tuned.to
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            run.optimizer, lambda step: settings.learning_rate(first + step, run.n_steps) / settings.lr
        )
        super().__init__(
            model=_Tuned(run.stepper),
            args=arguments,
            optimizers=(run.optimizer, schedule),
            callbacks=[_StepReporter(self, log)],
        )
        self.remove_callback(PrinterCallback)  # this callback prints on every rank

    def get_train_dataloader(self) -> DataLoader:
        """Return the numbers of the steps that are left, in order."""
        steps = range(self.run_.n_done, self.run_.n_steps)
        return DataLoader(steps, batch_size=1, collate_fn=lambda step: {"step": step[0]})  # type: ignore[arg-type]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Accumulate the gradients of a step's batches; return the mean loss over its learnt tokens, in nats."""
        self.started, self.lr = time.perf_counter(), self.run_.optimizer.param_groups[0]["lr"]
        model.train()
        batches, stepper = self.run_.batches(inputs["step"]), self.run_.stepper
        factor = 1 / n_targets(example for batch in batches for example in batch)
        total = torch.zeros((), dtype=torch.float64)
        for micro, batch in enumerate(batches):
            stepper.tuning.begin_pass(inputs["step"], micro)
            loss = stepper.loss(batch, factor)
            loss.backward()
            total += loss.detach().double().cpu()
        norm = gradient_norm(stepper.tuning.trained, stepper.model.ranks)
        self.result = StepResult(float(total), norm, sum(len(e.tokens) for batch in batches for e in batch))
        stepper.check(self.result, inputs["step"])
        return total


class _StepReporter(TrainerCallback):
    """A callback that reports each step to the run, which logs, evaluates and saves."""

    def __init__(self, loop: _Loop, log: RunLog | None) -> None:
        self.loop, self.log = loop, log

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report a step that is done."""
        seconds = time.perf_counter() - self.loop.started
        self.loop.run_.step_done(self.log, self.loop.result, self.loop.lr, seconds)
