"""Layer offloading: frozen layers stay in host memory and are streamed to the device ahead of use.

An offloaded layer's tensors lie end to end in one piece of host memory, pinned where there is CUDA. Two buffers on the
device, each as large as such a piece, alternate: while the running layer uses one, the next offloaded layer is copied
into the other. With gradient, a layer keeps only its input and is computed again in the backward (arXiv:1604.06174);
the layers are then streamed a second time, in reverse order.

On a CUDA card copies run on a stream of their own; elsewhere each copy is done at once, with the same bookkeeping.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llama.copies import Copies, HostMemory, Overlap, StreamedCopies
from llama.errors import UsageError
from llama.model import Transformer

N_BUFFERS = 2
# Bytes: every tensor of a layer begins at a multiple of `ALIGNMENT`, as torch's own allocations on a card do.
ALIGNMENT = 512


def check_offload(n_offloaded: int, n_layers: int) -> None:
    """Refuse to offload more layers than a model has, or fewer than none.

    Raises:
        UsageError: naming both numbers.
    """
    if not 0 <= n_offloaded <= n_layers:
        raise UsageError(f"--offload_layers {n_offloaded}: the model has {n_layers} layers, give 0 to {n_layers}")


def spread(n_offloaded: int, n_layers: int) -> tuple[int, ...]:
    """Return which layers are offloaded: as far apart as possible, so that a copy has the time of the layers between.

    The distance from the last offloaded layer to the first one of the next pass counts too.
    """
    return tuple((2 * i + 1) * n_layers // (2 * n_offloaded) for i in range(n_offloaded))


def piece_bytes(sizes: Iterable[int]) -> int:
    """Return the bytes of an offloaded layer whose tensors have these sizes: each is padded to `ALIGNMENT`."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def offload_blocks(model: Transformer, n_offloaded: int, device: torch.device | None = None) -> None:
    """Move frozen layers of a model to host memory, from where each is streamed when it runs.

    Trainable parameters stay where they are. Layers still on "meta" get host memory that is not filled yet, so that a
    model larger than its card can be loaded.

    Args:
        model: this rank's shard, frozen; LoRA may be added before or after.
        n_offloaded: number of layers to offload.
        device: where the layers are computed; None for the device of `model.ranks`.

    Raises:
        UsageError: for more layers than the model has, or fewer than none.
        DeviceError: when the system refuses to pin that much memory.
    """
    check_offload(n_offloaded, len(model.layers))
    if n_offloaded:
        blocks = [model.layers[place] for place in spread(n_offloaded, len(model.layers))]
        _offloads[model] = Offload(blocks, device or model.ranks.device)


def offload_of(model: Transformer) -> Offload | None:
    """Return the `Offload` that streams the model's layers; None where all layers are on their device."""
    return _offloads.get(model)


def is_offloaded(block: nn.Module) -> bool:
    """Return whether a block is streamed, in which case it recomputes itself in the backward."""
    return isinstance(block.forward, _Streamed)


class Offload:
    """The offloaded layers of a model, their host memory and the buffers on the device.

    Args:
        blocks: in the order in which a forward pass runs them; their frozen tensors have the same shapes.
        device: where the blocks are computed.

    Attributes:
        homes: host memory of each layer.
        buffers: memory on the device, from which layers run.
        copies: the copies from homes to buffers.
    """

    def __init__(self, blocks: list[nn.Module], device: torch.device) -> None:
        self.homes = [_Home(block, device) for block in blocks]
        self.buffers = [_Buffer(self.homes[0], device) for _ in range(min(N_BUFFERS, len(blocks)))]
        self.copies = StreamedCopies(device) if device.type == "cuda" else Copies()
        self._latest = self.buffers[0]  # the buffer acquired last
        self._backward = False
        for place, block in enumerate(blocks):
            block.forward = _Streamed(self, place, block.forward)

    @property
    def host_bytes(self) -> int:
        """Bytes of all layers in host memory."""
        return sum(home.memory.nbytes for home in self.homes)

    def measured(self) -> Overlap:
        """Wait for all copies; return their bytes, and the seconds that they took and were waited for."""
        self.copies.synchronize()
        return self.copies.overlap

    def words(self) -> str:
        """Return a line such as "12 layers offloaded: 3.61 GB copied in 0.24 s, waited for 0.01 s (96% hidden)"."""
        seen, n_layers = self.measured(), len(self.homes)
        return (
            f"{n_layers} layer{'' if n_layers == 1 else 's'} offloaded: {seen.n_bytes / 1e9:.2f} GB copied "
            f"in {seen.copying:.2f} s, waited for {seen.waiting:.2f} s ({seen.hidden:.0%} hidden)"
        )

    def run(self, place: int, forward: Callable[..., Tensor], args: tuple[Any, ...]) -> Tensor:
        """Run the layer at `place` with its tensors on the device."""
        if not torch.is_grad_enabled():
            return self._through(place, forward, args)
        return checkpoint(
            self._through, place, forward, args, use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), self._backwards()),
        )  # fmt: skip

    def _through(self, place: int, forward: Callable[..., Tensor], args: tuple[Any, ...]) -> Tensor:
        with self.homes[place].replaced(self._acquire(place).parameters):
            return forward(*args)

    @contextlib.contextmanager
    def _backwards(self) -> Iterator[None]:
        """Mark a layer's recomputation in the backward, during which layers follow in reverse order."""
        self._backward = True
        try:
            yield
        finally:
            self._backward = False

    def _acquire(self, place: int) -> _Buffer:
        """Return the buffer that holds a layer's tensors, and begin to copy the next layer into the other buffer.

        The other buffer is free: everything that reads it has been issued, its layer's backward included. A layer is
        recomputed only once the whole gradient of its output is there, which has passed every later layer's matrices;
        and a forward pass begins after the backward of the pass before.
        """
        buffer = self._holder(place)
        if buffer is None:
            buffer = self._load(place)
        self.copies.wait(buffer.copy)
        self._latest = buffer
        ahead = self._next(place)
        if ahead is not None and self._holder(ahead) is None:
            self._load(ahead)
        return buffer

    def _next(self, place: int) -> int | None:
        """Return the offloaded layer that runs after this one; None where the buffers hold that layer already."""
        if self._backward:
            return place - 1 if place else None
        if place + 1 < len(self.homes):
            return place + 1
        # With gradient, the backward begins with the layers that have just run; without, the next pass begins at 0.
        return None if torch.is_grad_enabled() else 0

    def _holder(self, place: int) -> _Buffer | None:
        return next((buffer for buffer in self.buffers if buffer.holds == place), None)

    def _load(self, place: int) -> _Buffer:
        """Begin to copy a layer into the buffer that was not acquired last."""
        buffer = next((buffer for buffer in self.buffers if buffer is not self._latest), self._latest)
        buffer.holds = place
        buffer.copy = self.copies.start(buffer.memory, self.homes[place].memory)
        return buffer


# Each model's `Offload`, by weak keys: an entry here must not keep its model alive.
_offloads: weakref.WeakKeyDictionary[Transformer, Offload] = weakref.WeakKeyDictionary()


class _Streamed:
    """The replacement of a block's forward: runs the block through its `Offload`."""

    def __init__(self, offload: Offload, place: int, forward: Callable[..., Tensor]) -> None:
        self.offload, self.place, self.forward = offload, place, forward

    def __call__(self, *args: Any) -> Tensor:
        return self.offload.run(self.place, self.forward, args)


class _Home:
    """A layer's place in host memory.

    Args:
        block: the layer, whose frozen parameters move; parameters on "meta" get memory that is not filled yet.
        device: the device to which the layer is copied.

    Attributes:
        memory: the whole layer, [bytes] uint8.
        places: module and name of each parameter.
        parameters: views of `memory`: the layer's parameters while it does not run.
    """

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        self.places = [
            (module, name)
            for module in block.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if not parameter.requires_grad
        ]
        before = [getattr(module, name) for module, name in self.places]
        self._pinned = HostMemory(piece_bytes(parameter.nbytes for parameter in before), device)
        self.memory = self._pinned.content
        self.parameters = parameters_in(self.memory, before)
        for parameter, old in zip(self.parameters, before, strict=True):
            if not old.is_meta:
                parameter.data.copy_(old)
        self._give(self.parameters)

    @contextlib.contextmanager
    def replaced(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Give the layer other parameters while the context is open."""
        self._give(parameters)
        try:
            yield
        finally:
            self._give(self.parameters)

    def _give(self, parameters: list[nn.Parameter]) -> None:
        # Other objects rather than other data in the same ones: autograd keeps the object that it saw.
        for (module, name), parameter in zip(self.places, parameters, strict=True):
            module._parameters[name] = parameter


class _Buffer:
    """Memory on the device for one layer at a time.

    Args:
        like: any of the layers, for the sizes.
        device: where the memory is.

    Attributes:
        holds: the layer whose tensors the buffer holds, or is about to.
        copy: the copy to wait for before the layer runs.
    """

    def __init__(self, like: _Home, device: torch.device) -> None:
        self.memory = torch.empty(like.memory.numel(), dtype=torch.uint8, device=device)
        self.parameters = parameters_in(self.memory, like.parameters)
        self.holds: int | None = None
        self.copy: Any = None


def parameters_in(memory: Tensor, like: Sequence[Tensor]) -> list[nn.Parameter]:
    """Return frozen parameters with the dtypes and shapes of `like`, laid end to end in `memory` [bytes] uint8."""
    parameters, start = [], 0
    for tensor in like:
        content = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        parameters.append(nn.Parameter(content, requires_grad=False))
        start += piece_bytes([tensor.nbytes])
    return parameters
