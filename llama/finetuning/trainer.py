"""The training loop: optimiser steps, evaluations and checkpoints, from which a killed run goes on."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterator, Sequence

import torch
from torch.utils.checkpoint import checkpoint

from llama.data.batches import Order
from llama.data.examples import Example
from llama.device import peak_memory
from llama.env import is_speaker
from llama.errors import TrainingError
from llama.finetuning.logs import RunLog
from llama.finetuning.run_folder import RunFolder, TrainState
from llama.finetuning.settings import TrainSettings
from llama.finetuning.step import Stepper, StepResult, Tuning, check_same_batch
from llama.model import Transformer
from llama.offload import is_offloaded
from llama.parallel import groups

# Steps after which ranks compare the batch that they are about to learn from.
DIGEST_STEPS = 100
MOMENTS = ("exp_avg", "exp_avg_sq")


class Trainer:
    """A training run on one model. Every rank makes the same calls.

    Args:
        model: this rank's shard, frozen.
        tuning: the method, which holds the trained tensors.
        settings: of the run.
        examples, eval_examples: to learn from and to evaluate on.
        folder: the run's folder, to which everything is written.
        base_model: name of the base model, for the adapter's files.
    """

    def __init__(
        self,
        model: Transformer,
        tuning: Tuning,
        settings: TrainSettings,
        examples: Sequence[Example],
        eval_examples: Sequence[Example],
        folder: RunFolder,
        base_model: str | None = None,
    ) -> None:
        self.model, self.tuning, self.settings, self.folder = model, tuning, settings, folder
        self.examples, self.eval_examples, self.base_model = examples, eval_examples, base_model
        self.order = Order(len(examples), settings.batch_size, settings.seed, settings.gradient_accumulation_steps)
        self.n_steps = settings.n_steps(self.order.steps_per_epoch)
        self.optimizer = make_optimizer(tuning, settings)
        self.stepper = Stepper(model, tuning, self.optimizer, settings.max_grad_norm)
        self.n_done = self.n_saved = 0
        self.best: tuple[float, int] | None = None

    # -- the loop ----------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end of the run, and write the adapter to the run's folder.

        The result is the adapter of the lowest eval loss where examples were set aside, else the last one.

        Raises:
            TrainingError: for a loss that is not finite; the state before that step is saved.
            CheckpointError: for a checkpoint that cannot be written; the one before it is kept.
        """
        with self._log() as log:
            try:
                self.take_steps(log)
            except TrainingError as error:
                self._rescue()
                kept = f"{self.folder.folder(self.n_saved)} is kept" if self.n_saved else "no checkpoint was due before"
                raise TrainingError(f"{error}; {kept}") from None
        self._finish()

    def _rescue(self) -> None:
        """Save the state before a failed step, unless its weights are not finite; no earlier checkpoint is dropped."""
        weights = [tensor.whole(tensor.parameter) for tensor in self.tuning.trained]
        if self.n_done > self.n_saved and all(bool(weight.isfinite().all()) for weight in weights):
            self.save(keep=self.settings.save_total_limit + 1)

    def take_steps(self, log: RunLog | None) -> None:
        """Take the steps that are left, and call `step_done` after each."""
        while self.n_done < self.n_steps:
            started = time.perf_counter()
            lr = self.settings.learning_rate(self.n_done, self.n_steps)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            result = self.stepper.run(self.n_done, self.batches(self.n_done))
            self.step_done(log, result, lr, time.perf_counter() - started)

    def batches(self, step: int) -> list[list[Example]]:
        """Return the batches of a step, the same on every process; processes compare them now and then."""
        batches = [[self.examples[i] for i in batch] for batch in self.order.step_batches(step)]
        if step % DIGEST_STEPS == 0:
            check_same_batch(batches, step)
        return batches

    def step_done(self, log: RunLog | None, result: StepResult, lr: float, seconds: float) -> None:
        """Log a step; evaluate and save where that is due."""
        if log is not None:
            log.step(self._line(self.n_done, result, lr, seconds))
        self.n_done += 1
        last = self.n_done == self.n_steps
        if self.eval_examples and (last or self.n_done % self.settings.eval_steps == 0):
            self._evaluate(log)
        if last or self.n_done % self.settings.save_steps == 0:
            self.save()

    def _line(self, step: int, result: StepResult, lr: float, seconds: float) -> dict[str, float]:
        return {
            "step": step + 1,
            "epoch": round((step + 1) / self.order.steps_per_epoch, 4),
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens": result.n_tokens,
            "seconds": seconds,
            "memory": peak_memory(self.model.ranks.device),
        }

    def _evaluate(self, log: RunLog | None) -> None:
        size = self.settings.batch_size
        # By length, so that examples of a batch have similar lengths.
        examples = sorted(self.eval_examples, key=lambda example: len(example.tokens))
        loss = self.stepper.evaluate(examples[start : start + size] for start in range(0, len(examples), size))
        if not math.isfinite(loss):
            raise TrainingError(f"the eval loss is no finite number after step {self.n_done}: lower --lr")
        if log is not None:
            log.evaluation(self.n_done, loss)
        if self.best is None or loss < self.best[0]:
            self.best = (loss, self.n_done)
            adapter = self.tuning.adapter(self.base_model)
            with groups.phase("best"):
                if is_speaker():
                    self.folder.save_best(adapter, self.model.args)

    @contextlib.contextmanager
    def _log(self) -> Iterator[RunLog | None]:
        """Open the log on the speaking rank, None on others; it is closed, and the losses drawn, whatever happens."""
        log = None
        with groups.phase("log"):
            if is_speaker():
                log = RunLog(self.folder.path, self.n_done, self.n_steps)
        try:
            yield log
        finally:
            if log is not None:
                log.close()

    def _finish(self) -> None:
        adapter = self.tuning.adapter(self.base_model)
        with groups.phase("result"):
            if is_speaker():
                self.folder.save_result(adapter, self.model.args, use_best=self.best is not None)

    # -- state -------------------------------------------------------------------------------------

    def save(self, keep: int | None = None) -> None:
        """Write a checkpoint, and drop all but the newest `keep`, by default as set; a collective call."""
        state, adapter = self._state(), self.tuning.adapter(self.base_model)
        with groups.phase("checkpoint"):
            if is_speaker():
                self.folder.save(state, adapter, self.model.args, keep or self.settings.save_total_limit)
        self.n_saved = self.n_done

    def _state(self) -> TrainState:
        tensors = {}
        for tensor in self.tuning.trained:
            tensors[f"weights/{tensor.name}"] = tensor.whole(tensor.parameter).cpu()
            moments = self.optimizer.state.get(tensor.parameter, {})
            for moment in MOMENTS:
                if moment in moments:
                    tensors[f"{moment}/{tensor.name}"] = tensor.whole(moments[moment]).cpu()
        n_updates = max((int(state["step"]) for state in self.optimizer.state.values()), default=0)
        scale = self.stepper.scale
        return TrainState(self.n_done, tensors, n_updates, (scale.value, scale.n_good), self.best)

    @torch.no_grad()
    def restore(self, state: TrainState) -> None:
        """Go on from a checkpoint, whatever the number of ranks that wrote it.

        Raises:
            TrainingError: when the checkpoint is of another run.
        """
        wanted = {f"weights/{tensor.name}" for tensor in self.tuning.trained}
        if wanted - state.tensors.keys():
            raise TrainingError(f"the checkpoint lacks {min(wanted - state.tensors.keys())}: it is of another run")
        for tensor in self.tuning.trained:
            parameter = tensor.parameter
            parameter.copy_(tensor.part(state.tensors[f"weights/{tensor.name}"]))
            if state.n_updates:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(state.n_updates)),
                    **{
                        m: tensor.part(state.tensors[f"{m}/{tensor.name}"]).clone().to(parameter.device)
                        for m in MOMENTS
                    },
                }
        self.stepper.scale.value, self.stepper.scale.n_good = state.scale
        self.n_done = self.n_saved = state.step
        self.best = state.best


# -- optimiser, checkpointing, compiling -----------------------------------------------------------


def make_optimizer(tuning: Tuning, settings: TrainSettings) -> torch.optim.AdamW:
    """Return AdamW (arXiv:1711.05101) over the trained tensors."""
    parameters = [tensor.parameter for tensor in tuning.trained]
    return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)


def checkpoint_blocks(model: Transformer) -> None:
    """Keep only each block's input for the backward, which computes the block again (arXiv:1604.06174).

    The price is a second forward pass and its collectives. Offloaded blocks are recomputed anyway and left as they are.
    """
    for block in model.layers:
        if is_offloaded(block):
            continue
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(model: Transformer) -> None:
    """Compile each block's FFN and norms; one graph serves every length and every layer.

    Attention is not compiled: its number of stretches changes from step to step.
    """
    for block in model.layers:
        for name in ("feed_forward", "attention_norm", "ffn_norm"):
            block.get_submodule(name).compile(dynamic=True)
