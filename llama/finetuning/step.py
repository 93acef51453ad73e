"""One optimiser step: the loss of a batch, its gradient on every rank, one update.

The ranks of one model compute the same examples. Copies of the model each compute a share of the batch, and sum the
gradients of the trained tensors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llama.adapters.adapter import Adapter
from llama.data.batches import shard
from llama.data.examples import Example
from llama.device import sum_dtype
from llama.errors import TrainingError
from llama.finetuning.loss import cross_entropy
from llama.finetuning.packing import Packed, pack
from llama.model import Transformer
from llama.parallel import store
from llama.parallel.collectives import all_reduce
from llama.parallel.groups import Ranks
from llama.parallel.trained import Trained, clip, gradient_norm, sum_gradients

# float16's smallest normal number is 6e-5: gradients are scaled up before they meet it (arXiv:1710.03740).
FIRST_SCALE, GROWTH_STEPS = 2.0**16, 2000


class Tuning(Protocol):
    """A method of fine-tuning: `SoftPrompt` or `Lora`."""

    trained: list[Trained]

    @property
    def n_virtual(self) -> int:
        """Number of virtual tokens before every text."""

    def embeddings(self) -> Tensor | None:
        """Return the virtual tokens' embeddings, [n_virtual, dim] float32 with gradient; None where there are none."""

    def begin_pass(self, step: int, micro: int) -> None:
        """Set the dropout seed of the next forward and backward pass: micro-batch `micro` of optimiser step `step`."""

    def see(self, rows: Tensor) -> None:
        """Set the keys of the next pass's rows, [N] int64, from which each row's dropout follows; see `Packed.keys`."""

    def adapter(self, base_model: str | None = None) -> Adapter:
        """Return the trained tensors, whole, as an adapter; a collective call."""


@dataclass
class LossScale:
    """The loss scale, which keeps gradients in float16 from underflowing; 1 for other dtypes.

    Args:
        value: the factor.
        n_good: steps since the factor last changed.
        is_dynamic: whether the factor changes at all.
    """

    value: float = 1.0
    n_good: int = 0
    is_dynamic: bool = False

    @classmethod
    def create(cls, dtype: torch.dtype) -> LossScale:
        """Return the scale that a model computing in `dtype` starts with."""
        return cls(FIRST_SCALE, 0, True) if dtype == torch.float16 else cls()

    def update(self, overflowed: bool) -> None:
        """Halve the scale after an overflow, double it after many steps without one."""
        if not self.is_dynamic:
            return
        self.n_good = 0 if overflowed else self.n_good + 1
        if overflowed:
            self.value /= 2
        elif self.n_good == GROWTH_STEPS:
            self.value, self.n_good = self.value * 2, 0


@dataclass(frozen=True)
class StepResult:
    """Loss, gradient norm and size of one step.

    Args:
        loss: mean over the batch's learnt tokens, in nats.
        grad_norm: norm of the whole gradient, before clipping.
        n_tokens: tokens of the batch's examples, without virtual tokens, over all copies of the model.
        skipped: whether float16 overflowed, so that nothing was updated.
    """

    loss: float
    grad_norm: float
    n_tokens: int
    skipped: bool = False


class Stepper:
    """A runner of optimiser steps on one model.

    Args:
        model: this rank's shard, frozen.
        tuning: the method, which holds the trained tensors.
        optimizer: over the parameters of `tuning.trained`.
        max_grad_norm: gradients of a larger norm are scaled down to this norm.
        share: whether common beginnings of examples are computed once.
    """

    def __init__(
        self,
        model: Transformer,
        tuning: Tuning,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float,
        share: bool = True,
    ) -> None:
        self.model, self.tuning, self.optimizer, self.share = model, tuning, optimizer, share
        self.max_grad_norm = max_grad_norm
        self.scale = LossScale.create(model.norm.weight.dtype)
        self.replicas = model.ranks.replicas or Ranks()

    def run(self, step: int, batches: Sequence[Sequence[Example]]) -> StepResult:
        """Accumulate the gradients of `batches` and update.

        Args:
            step: number of the step, from 0.
            batches: the micro-batches, whole; each copy of the model computes its share of each.

        Raises:
            TrainingError: when the loss or the gradient is not finite; nothing was updated then.
        """
        self.model.train()
        factor = self.scale.value / n_targets(example for batch in batches for example in batch)
        self.optimizer.zero_grad(set_to_none=True)
        device = self.model.ranks.device
        total = torch.zeros((), dtype=sum_dtype(device), device=device)
        for micro, batch in enumerate(batches):
            if share := self._share(batch):
                self.tuning.begin_pass(step, micro)
                loss = self.loss(share, factor)
                loss.backward()
                total += loss.detach().to(total.dtype)
        loss_value = float(all_reduce(total, self.replicas)) / self.scale.value
        sum_gradients(self.tuning.trained, self.model.ranks, self.replicas)
        norm = gradient_norm(self.tuning.trained, self.model.ranks) / self.scale.value
        n_tokens = sum(len(example.tokens) for batch in batches for example in batch)
        result = StepResult(loss_value, norm, n_tokens, skipped=not math.isfinite(norm))
        self.check(result, step)
        if not result.skipped:
            clip(self.tuning.trained, norm, self.max_grad_norm, scale=self.scale.value)
            self.optimizer.step()
        self.scale.update(result.skipped)  # last: these gradients carry the scale as it was
        return result

    def _share(self, batch: Sequence[Example]) -> list[Example]:
        """Return this copy's share of a batch."""
        lengths = [len(example.tokens) for example in batch]
        return [batch[i] for i in shard(range(len(batch)), self.replicas.rank, self.replicas.world_size, lengths)]

    def loss(self, examples: Sequence[Example], factor: float) -> Tensor:
        """Return the sum of the examples' negative log-probabilities times `factor`: a scalar with gradient."""
        packed = self.pack(examples)
        self.tuning.see(packed.keys)
        hidden = self.model.hidden(embeddings=self._embed(packed), positions=packed.positions, cache=packed)
        supervised = hidden[0].index_select(0, packed.supervised)
        return cross_entropy(self.model, supervised, packed.targets, packed.weights, factor)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Sequence[Example]]) -> float:
        """Return the mean loss per learnt token of all batches, in nats; copies of the model share the batches."""
        self.model.eval()
        # The sum of the losses, and their number of tokens.
        device = self.model.ranks.device
        sums = torch.zeros(2, dtype=sum_dtype(device), device=device)
        for number, batch in enumerate(batches):
            if number % self.replicas.world_size == self.replicas.rank:
                sums += torch.stack((self.loss(batch, 1.0).to(sums.dtype), sums.new_tensor(n_targets(batch))))
        loss, count = all_reduce(sums, self.replicas).tolist()
        return loss / count

    def pack(self, examples: Sequence[Example]) -> Packed:
        """Return the examples packed into one row, on this rank's device."""
        return pack(examples, self.tuning.n_virtual, self.model.ranks.device, self.share)

    def _embed(self, packed: Packed) -> Tensor:
        """Return the embeddings of the soft prompt, where there is one, and of the tokens: [1, N, E]."""
        text = self.model.tok_embeddings(packed.tokens)
        prompt = self.tuning.embeddings()
        return text if prompt is None else torch.cat((prompt.to(text.dtype).unsqueeze(0), text), dim=1)

    def check(self, result: StepResult, step: int) -> None:
        """Refuse a step whose loss or gradient is not finite, unless the loss scale can still be lowered.

        Raises:
            TrainingError: naming the loss or the gradient, and the step.
        """
        if math.isfinite(result.loss) and (math.isfinite(result.grad_norm) or self._may_back_off()):
            return
        what = "loss" if not math.isfinite(result.loss) else "gradient"
        raise TrainingError(
            f"the {what} is no finite number at step {step + 1}: nothing was updated; "
            "lower --lr, or compute in --dtype bf16 or fp32"
        )

    def _may_back_off(self) -> bool:
        return self.scale.is_dynamic and self.scale.value > 1


def n_targets(examples: Iterable[Example]) -> int:
    """Return how many tokens are learnt from the examples."""
    return sum(example.n_learnt for example in examples)


def check_same_batch(batches: Sequence[Sequence[Example]], step: int) -> None:
    """Refuse to go on where processes have different examples; a collective call.

    Ranks of one model that compute different examples train nothing at all.

    Raises:
        TrainingError: naming the first rank that differs from rank 0.
    """
    seen = hashlib.sha256(repr([[example.tokens for example in batch] for batch in batches]).encode()).hexdigest()
    digests = store.exchange(seen)
    strangers = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if strangers:
        raise TrainingError(
            f"rank {strangers[0]} has other examples than rank 0 at step {step + 1}: do all machines read the same "
            "data set and tokenizer?"
        )
