"""Calibration of one block at a time: the roundings of its linears are chosen by sums over the linears' inputs.

Two streams of hidden states run side by side, the original model's and the quantized one's. Each linear is quantized
as soon as the quantized stream reaches it, so that all later linears are calibrated on the inputs that they will have.

Shape legend: B sequences, T tokens, E dim, N rows, K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llama.kernels.formats import Form, dequantize, quantize
from llama.model import TransformerBlock
from llama.quantization.gptq import Inputs, gptq

Packed = tuple[Tensor, Tensor]
Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]

# The linears of a block that read the same input, in the order in which they are reached.
TOGETHER = (
    ("attention.wq", "attention.wk", "attention.wv"),
    ("attention.wo",),
    ("feed_forward.w1", "feed_forward.w3"),
    ("feed_forward.w2",),
)


def inputs_of(x: Tensor, original: Tensor, group_size: int) -> Inputs:
    """Return the sums over a layer's inputs that GPTQ needs.

    Args:
        x: inputs in the quantized model, [..., K].
        original: inputs in the original model, in the same places, [..., K].
        group_size: columns that share a scale.

    Raises:
        QuantizationError: for inputs that are not finite.
    """
    x, original = x.flatten(0, -2).to(torch.float32), original.flatten(0, -2).to(torch.float32)
    return Inputs.create(x.T @ x, group_size, (original - x).T @ x, len(x))


def calibrated_matrix(rows: Tensor, form: Form, inputs: Inputs | None) -> Packed:
    """Quantize whole rows [N, K]: int4 by GPTQ, int8 to the nearest, which costs next to no accuracy."""
    if form.kind == "int8" or inputs is None:
        return quantize(rows, form)
    return gptq(rows, inputs)


def calibrate_block(
    block: TransformerBlock, run: Callable[[Tensor], Tensor], original: Tensor, x: Tensor, form: Form
) -> tuple[dict[str, Packed], Tensor, Tensor]:
    """Quantize a block's linears; the block's weights become the values of the integers.

    Args:
        block: with its weights in full precision.
        run: the block's forward, [B, T, E] to [B, T, E].
        original, x: the block's inputs in the original and in the quantized model, [B, T, E].
        form: of the linears.

    Returns:
        Packed integers and scales by the linears' names in the block, and the two streams after the block.

    Raises:
        QuantizationError: for activations that are not finite.
    """
    seen: dict[str, Tensor] = {}
    packed: dict[str, Packed] = {}

    def note(names: tuple[str, ...], x: Tensor) -> None:
        seen[names[0]] = x

    def choose(names: tuple[str, ...], x: Tensor) -> None:
        inputs = inputs_of(x, seen.pop(names[0]), form.group_size) if form.group_size else None
        for name in names:
            weight = block.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            packed[name] = calibrated_matrix(weight, form, inputs)
            weight.data.copy_(dequantize(*packed[name]))

    with torch.inference_mode():
        with _before(block, note):
            original = run(original)
        with _before(block, choose):
            x = run(x)
    return packed, original, x


@contextmanager
def _before(block: TransformerBlock, call: Callable[[tuple[str, ...], Tensor], None]) -> Iterator[None]:
    """Call `call(names, input)` whenever linears that share an input are reached, while the context lasts."""
    handles: list[RemovableHandle] = []
    for names in TOGETHER:

        def hook(module: nn.Module, args: tuple[Tensor, ...], names: tuple[str, ...] = names) -> None:
            call(names, args[0])

        handles.append(block.get_submodule(names[0]).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
