"""Time for memory, and compiling for speed: changes to how the frozen blocks are run, not to what they compute."""

from __future__ import annotations

import functools

from torch.utils.checkpoint import checkpoint

from llama.model import Transformer
from llama.offload import is_offloaded


def checkpoint_blocks(model: Transformer) -> None:
    """Keep only each block's input for the backward, and compute the rest of it again there (arXiv:1604.06174).

    Costs a second forward pass and its collectives. Blocks that are offloaded do so by themselves.
    """
    for block in model.layers:
        if is_offloaded(block):
            continue
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(model: Transformer) -> None:
    """Compile each block's FFN and norms, of which one graph serves every length and every layer.

    Attention is left as it is: how many groups of examples it sees changes from step to step.
    """
    for block in model.layers:
        for name in ("feed_forward", "attention_norm", "ffn_norm"):
            block.get_submodule(name).compile(dynamic=True)
