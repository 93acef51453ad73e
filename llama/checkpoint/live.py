"""A running model as a checkpoint to write: rank 0 asks for pieces of its tensors, and their owners send them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llama import env
from llama.checkpoint.files import Index
from llama.checkpoint.rows import SourceTensor, may_be
from llama.checkpoint.source import Checkpoint
from llama.checkpoint.table import Spec, specs
from llama.checkpoint.tie import source_of
from llama.errors import CheckpointError
from llama.model import Transformer
from llama.parallel import groups
from llama.parallel.collectives import broadcast
from llama.parallel.groups import Ranks
from llama.parallel.partition import Partition


@dataclass(frozen=True, kw_only=True)
class LiveTensor(SourceTensor):
    """A tensor of which every rank holds its part; rank 0 reads it while the others are in `save_live`.

    Args:
        weight: the part of this rank.
        partition, ranks: those of the model.
    """

    weight: Tensor
    partition: Partition
    ranks: Ranks

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model holds it in."""
        return self.weight.dtype

    def read(self, index: Index) -> Iterator[tuple[Index, Tensor]]:
        """See `SourceTensor.read`; of what several ranks hold, the first one's is taken."""
        dim = self.spec.cut_dim
        if dim is None:
            yield tuple(slice(0, run.stop - run.start) for run in index), self.weight[index].detach()
            return
        done, last = index[dim].start, index[dim].stop
        for owner in range(self.ranks.world_size):
            own = self.spec.own(self.partition, owner)[dim]
            start, stop = max(own.start, done), min(own.stop, last)
            if start < stop:
                part = (*index[:dim], slice(start, stop), *index[dim + 1 :])
                where = [slice(0, run.stop - run.start) for run in part]
                where[dim] = slice(start - index[dim].start, stop - index[dim].start)
                yield tuple(where), self._fetch(owner, part)
                done = stop

    def _fetch(self, owner: int, part: Index) -> Tensor:
        """On rank 0: a part of the whole that `owner` holds."""
        if owner == self.ranks.rank:
            return self._own(part)
        groups.broadcast_object((self.spec.name, owner, part))
        return self.send(owner, part)

    def send(self, owner: int, part: Index) -> Tensor:
        """A part of the whole from `owner` to every rank; all of them make this call."""
        if owner == self.ranks.rank:
            values = self._own(part)
        else:
            values = torch.empty([run.stop - run.start for run in part], dtype=self.dtype)
        return broadcast(values.to(self.ranks.device).contiguous(), self.ranks, owner)

    def _own(self, part: Index) -> Tensor:
        first = self.spec.own(self.partition, self.ranks.rank)
        local = (slice(run.start - own.start, run.stop - own.start) for run, own in zip(part, first, strict=True))
        return self.weight[tuple(local)].detach()


def save_live(model: Transformer, origin: Checkpoint, write: Callable[[Checkpoint], object]) -> None:
    """Write a model that is loaded and perhaps tuned, a piece of a tensor at a time; every rank makes this call.

    Args:
        model: of numbers, or of the integers that `origin` holds.
        origin: the checkpoint that it was loaded from: its files say what lies beside the weights.
        write: writes a checkpoint, such as `split_checkpoint` or `convert_checkpoint` with all else filled in. Rank 0
            alone calls it.

    Raises:
        LlamaError: on every rank, where rank 0 meets one; nothing is left behind.
    """
    with groups.phase("live"):
        live = live_checkpoint(model, origin)
    replicas = model.ranks.replicas
    with groups.phase("save"):
        if env.rank() == 0:
            try:
                write(live)
            finally:
                groups.broadcast_object(None)
        elif replicas is None or replicas.rank == 0:
            _serve(live.tensors)


def _serve(tensors: Mapping[str, SourceTensor]) -> None:
    """Take part in what rank 0 reads until it is done."""
    while (asked := groups.broadcast_object()) is not None:
        name, owner, part = asked
        tensor = tensors[name]
        assert isinstance(tensor, LiveTensor)
        tensor.send(owner, part)


def live_checkpoint(model: Transformer, origin: Checkpoint) -> Checkpoint:
    """The model's shards under the names of the checkpoint that it was loaded from.

    Raises:
        CheckpointError: when the two hold their weights in different forms.
    """
    args = dataclasses.replace(origin.args, tied=model.args.tied)
    parameters = dict(model.named_parameters())
    tensors = {}
    for name, spec in specs(args, origin.scheme).items():
        if args.tied and name.startswith("output.") and name not in origin.tensors:
            continue
        weight = parameters.get(source_of(name, parameters))
        if weight is None or not _holds(model, spec, weight):
            raise CheckpointError(
                f"the model does not hold {name} as {origin.path} does: save it where it was loaded without --quantize"
            )
        tensors[name] = LiveTensor(spec=spec, pieces=(), weight=weight, partition=model.partition, ranks=model.ranks)
    return dataclasses.replace(origin, args=args, tensors=tensors)


def _holds(model: Transformer, spec: Spec, weight: Tensor) -> bool:
    """Return whether a parameter is this rank's part of a tensor."""
    own = spec.own(model.partition, model.ranks.rank)
    return may_be(weight.dtype, spec.dtype) and list(weight.shape) == [run.stop - run.start for run in own]
