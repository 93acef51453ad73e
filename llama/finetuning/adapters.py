"""What fine-tuning makes: a soft prompt or LoRA matrices, whole, apart from any model and any rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class PromptAdapter:
    """A soft prompt (arXiv:2104.08691).

    Args:
        prompt: the virtual tokens' embeddings, [n_virtual_tokens, dim] float32; they stand before BOS.
        init_text: what they were initialised from, if that was a text.
        base_model: name or path of the model that it was trained for.
    """

    prompt: Tensor
    init_text: str | None = None
    base_model: str | None = None


@dataclass(frozen=True)
class LoraAdapter:
    """Low-rank updates of linears (arXiv:2106.09685): W x becomes W x + scaling * B A x.

    Args:
        r: rank of the updates.
        alpha: numerator of the scaling.
        targets: kinds of linears that are updated, by Meta's names ("wq", "w2"), in the order of the layer.
        weights: A [r, in_features] and B [out_features, r], float32, by the linear's name
            ("layers.0.attention.wq"); rows of B in Meta's order.
        dropout: probability with which a feature of x is left out in training.
        use_rslora: whether the scaling is alpha / sqrt(r) (arXiv:2312.03732) in place of alpha / r.
        base_model: name or path of the model that it was trained for.
    """

    r: int
    alpha: float
    targets: tuple[str, ...]
    weights: Mapping[str, tuple[Tensor, Tensor]] = field(repr=False)
    dropout: float = 0.0
    use_rslora: bool = False
    base_model: str | None = None

    @property
    def scaling(self) -> float:
        """The factor of B A x."""
        return self.alpha / (self.r**0.5 if self.use_rslora else self.r)


Adapter = PromptAdapter | LoraAdapter
