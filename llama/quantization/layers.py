"""Sharded layers with their matrix held as integers, which replace a model's layers by name.

Each holds `weight`, the packed integers, and `scales`. Both are frozen parameters, so that a layer is loaded,
moved and counted like any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llama.kernels.formats import Form
from llama.kernels.products import packed_linear, values
from llama.model import Transformer
from llama.parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from llama.quantization.scheme import EMBEDDING, OUTPUT, Scheme


class _Packed:
    """The common part of the three layers: two parameters in place of one.

    Attributes:
        form: of the matrix.
        weight, scales: of this rank's part, in the format of `llama.kernels.formats`.
    """

    form: Form
    weight: nn.Parameter
    scales: nn.Parameter

    @property
    def sizes(self) -> tuple[int, int]:
        """Rows and columns of this rank's matrix."""
        return self.weight.shape[0], self.weight.shape[1] * self.form.columns_per_byte

    def product(self, x: Tensor) -> Tensor:
        """Return `x W^T`: x [..., K] to [..., N]."""
        return packed_linear(x, self.weight, self.scales)


class QuantizedColumnParallelLinear(_Packed, ColumnParallelLinear):
    """See `ColumnParallelLinear`."""


class QuantizedRowParallelLinear(_Packed, RowParallelLinear):
    """See `RowParallelLinear`."""


class QuantizedVocabParallelEmbedding(_Packed, VocabParallelEmbedding):
    """See `VocabParallelEmbedding`; only the rows asked for are widened, to `dtype`."""

    dtype: torch.dtype

    def lookup(self, local: Tensor) -> Tensor:
        """Return the vectors of ids: [...] int64 to [..., embedding_dim]."""
        rows = local.flatten()
        vectors = values(self.weight[rows], self.scales[rows], self.dtype)
        return vectors.view(*local.shape, -1)


_CLASSES: dict[type[nn.Module], type[Any]] = {
    ColumnParallelLinear: QuantizedColumnParallelLinear,
    RowParallelLinear: QuantizedRowParallelLinear,
    VocabParallelEmbedding: QuantizedVocabParallelEmbedding,
}


def quantize_layers(model: Transformer, scheme: Scheme) -> None:
    """Replace the layers that `scheme` names by quantized ones, their integers uninitialised.

    Args:
        model: on any device; on "meta" nothing is allocated in full precision.

    Raises:
        QuantizationError: when groups do not divide the model's rows.
    """
    scheme.check(model.args)
    for name, layer in list(model.named_modules()):
        form = scheme.form(f"{name}.weight", model.args) if type(layer) in _CLASSES else None
        if form is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _quantized(layer, form))
    if model.args.tied and scheme.form(OUTPUT, model.args) is not None:
        embedding = model.get_submodule(EMBEDDING.removesuffix(".weight"))
        output = model.get_submodule(OUTPUT.removesuffix(".weight"))
        output.weight, output.scales = embedding.weight, embedding.scales


def _quantized(layer: Any, form: Form) -> nn.Module:
    """Return a layer of the same place and cut with integers and scales as parameters."""
    n_rows, n_columns = layer.weight.shape
    form.check_columns(n_columns, "a rank's shard")
    device, dtype = layer.weight.device, layer.weight.dtype
    # Only the parameters and the class differ; the fields are copied.
    quantized = layer.__class__.__new__(_CLASSES[type(layer)])
    nn.Module.__init__(quantized)
    plain = {name: value for name, value in vars(layer).items() if name not in vars(quantized)}
    vars(quantized).update(plain)
    quantized.form, quantized.dtype = form, dtype
    packed = torch.empty(n_rows, n_columns // form.columns_per_byte, dtype=form.dtype, device=device)
    scales = torch.empty(form.scale_shape(n_rows, n_columns), dtype=form.scale_dtype, device=device)
    quantized.weight = nn.Parameter(packed, requires_grad=False)
    quantized.scales = nn.Parameter(scales, requires_grad=False)
    return quantized.train(layer.training)
