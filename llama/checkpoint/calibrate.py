"""Calibrate a checkpoint on a text: its integers, a block at a time, with one block's weights in memory.

Shape legend: B sequences, T tokens, E dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.checkpoint.rows import quantized_chunks
from llama.checkpoint.save import Quantized
from llama.checkpoint.source import Checkpoint
from llama.env import notice
from llama.errors import QuantizationError
from llama.kernels.formats import Form, dequantize
from llama.model import Transformer, TransformerBlock
from llama.parallel.groups import Ranks
from llama.parallel.partition import Partition
from llama.quantization.calibration import calibrate_block, calibrated_matrix, inputs_of
from llama.quantization.scheme import EMBEDDING, OUTPUT, Scheme
from llama.rope import rope_frequencies, rope_table
from llama.tokenizer import Tokenizer
from llama.tokenizer.texts import read_text, windows

# Tokens of a sequence, and how many of them a text must have at least and is asked for at most. With fewer the sums
# over the inputs say more of the text than of the model; more cost memory (a block's activations) and gain little.
LENGTH, FEWEST, MOST = 512, 2048, 16384


def read_calibration(path: str | Path, tokenizer: Tokenizer) -> Tensor:
    """A calibration text as sequences that begin with BOS, [B, T] int64: all of it, or evenly drawn from a long one.

    Raises:
        LlamaError: for a file that is missing, not UTF-8, or too short, naming both numbers.
    """
    tokens = tokenizer.encode(read_text(Path(path)), bos=False, eos=False)
    whole = [window for window in windows(tokens, tokenizer.bos_id, LENGTH) if len(window) == LENGTH]
    if len(whole) * LENGTH < FEWEST:
        # BOS of each sequence is a token of it.
        wanted = FEWEST // LENGTH * (LENGTH - 1)
        raise QuantizationError(
            f"{path} has {len(tokens)} tokens, but calibration needs {wanted} at least: give it a longer text"
        )
    n_drawn = min(len(whole), MOST // LENGTH)
    return torch.tensor([whole[number * len(whole) // n_drawn] for number in range(n_drawn)])


def calibrated(
    checkpoint: Checkpoint, scheme: Scheme, sequences: Tensor, device: torch.device | str = "cpu"
) -> Iterator[Quantized]:
    """The checkpoint's matrices as integers whose roundings were chosen on a text: see `llama.quantization.gptq`.

    int4 matrices are calibrated, those of the blocks and an output layer of its own; the embedding and what is int8
    are rounded to the nearest, as is an output layer that is the embedding. One process does all of it; in memory are
    one block in float32, its activations for all sequences, and the sums over one linear's inputs.

    Args:
        checkpoint: of numbers.
        scheme: what is quantized, and how.
        sequences: the text, [B, T] int64, such as `read_calibration` gives.
        device: "cpu" or a CUDA card, for the computation.

    Returns:
        Meta's name of a matrix, its packed integers and scales, on the CPU, as they are asked for: of each matrix that
        `scheme` names, once.

    Raises:
        QuantizationError: where nothing is int4, or groups do not divide the model's rows; and while it runs, where
            the text makes activations that are not finite.
    """
    checkpoint.require_numbers("calibrating it")
    if not scheme.group_size:
        raise QuantizationError("calibration chooses the roundings of int4, and nothing is int4: leave it out")
    scheme.check(checkpoint.args)
    widest = max(checkpoint.args.ffn_dim, checkpoint.args.dim)
    if sequences.numel() < min(widest, MOST):
        notice(f"{sequences.numel()} tokens for rows of {widest} weights: a longer text would calibrate better")
    return _Run(checkpoint, scheme, torch.device(device)).matrices(sequences)


class _Run:
    """One calibration.

    Attributes:
        model: on "meta"; a block has its weights while its turn lasts.
        original, x: the streams of hidden states in the original and in the quantized model, [B, T, E] float32.
    """

    original: Tensor
    x: Tensor

    def __init__(self, checkpoint: Checkpoint, scheme: Scheme, device: torch.device) -> None:
        self.checkpoint, self.scheme, self.device = checkpoint, scheme, device
        args = checkpoint.held_args()
        self.model = Transformer(args, Partition.create(args, 1), Ranks(device=device), device="meta")
        self.model.requires_grad_(False)

    @torch.no_grad()
    def matrices(self, sequences: Tensor) -> Iterator[Quantized]:
        """See `calibrated`."""
        yield from self._embed(sequences)
        positions = torch.arange(sequences.shape[1], device=self.device).expand(len(sequences), -1)
        table = rope_table(rope_frequencies(self.model.args, self.device), positions)
        for layer, block in enumerate(self.model.layers):
            assert isinstance(block, TransformerBlock)
            yield from self._block(f"layers.{layer}.", block, table, positions)
        if not self.model.args.tied:
            yield from self._output()

    def _embed(self, sequences: Tensor) -> Iterator[Quantized]:
        """Begin the streams; an embedding that is quantized, as the quantized model has it."""
        weight = self._read(EMBEDDING)
        self.original = F.embedding(sequences, weight).to(self.device, torch.float32)
        form, self.x = self.scheme.form(EMBEDDING, self.model.args), self.original
        if form is not None:
            packed, scales = self._nearest(EMBEDDING, form)
            yield EMBEDDING, packed, scales
            ids, places = sequences.unique(return_inverse=True)
            self.x = F.embedding(places, dequantize(packed[ids], scales[ids])).to(self.device)

    def _block(
        self, prefix: str, block: TransformerBlock, table: tuple[Tensor, Tensor], positions: Tensor
    ) -> Iterator[Quantized]:
        block.to_empty(device=self.device)
        for name, parameter in block.named_parameters():
            tensor = self.checkpoint.tensors[prefix + name]
            tensor.read_into(tensor.spec.whole, parameter.data)
        packed, self.original, self.x = calibrate_block(
            block, lambda x: block(x, table, positions, None, None), self.original, self.x, self.scheme.linears
        )
        block.to("meta")
        for name, (integers, scales) in packed.items():
            yield f"{prefix}{name}.weight", integers.cpu(), scales.cpu()

    def _output(self) -> Iterator[Quantized]:
        form = self.scheme.form(OUTPUT, self.model.args)
        if form is None:
            return
        norm = self.model.norm.to_empty(device=self.device)
        norm.weight.data.copy_(self._read("norm.weight"))
        inputs = inputs_of(norm(self.x), norm(self.original), form.group_size) if form.group_size else None
        packed, scales = calibrated_matrix(self._read(OUTPUT).to(self.device), form, inputs)
        yield OUTPUT, packed.cpu(), scales.cpu()

    def _read(self, name: str) -> Tensor:
        """A whole tensor in the dtype that it is stored in."""
        tensor = self.checkpoint.tensors[name]
        out = torch.empty(tensor.spec.shape, dtype=tensor.dtype)
        tensor.read_into(tensor.spec.whole, out)
        return out

    def _nearest(self, name: str, form: Form) -> tuple[Tensor, Tensor]:
        """A whole matrix rounded to the nearest."""
        chunks = [(packed, scales) for _, packed, scales in quantized_chunks(self.checkpoint.tensors[name], form)]
        packed, scales = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        return packed, scales
