"""PEFT's LoRA on a small model, as the oracle of ours; the way to our layout is written here, apart from llama/."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from support import hf_model
from torch import Tensor, nn

from llama.adapters.adapter import LoraAdapter

if TYPE_CHECKING:
    from peft import PeftModel

NAMES = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}  # fmt: skip
ALL = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


def peft_model(generation: str = "2", r: int = 4, alpha: float = 6.0, **options: Any) -> PeftModel:
    """A tiny Llama with a LoRA on all seven linears, A and B random, in float32."""
    from peft import LoraConfig, get_peft_model  # takes seconds, and ranks that import this file need none of it

    targets = [name.split(".")[1] for name in NAMES]
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM", **options)
    model = get_peft_model(hf_model(generation), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, half in halves(model):
            half.copy_(torch.randn(half.shape, generator=generator) * 0.2)
    return model.eval()


def halves(model: PeftModel) -> list[tuple[str, nn.Parameter]]:
    """A and B of every linear under our names ("layers.0.attention.wq.lora_A"), as PEFT orders them."""
    found = []
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            _, _, layer, part, linear, half = name.removeprefix("base_model.model.").split(".")[:6]
            found.append((f"layers.{layer}.{NAMES[f'{part}.{linear}']}.{half}", parameter))
    return found


def in_our_order(model: PeftModel, name: str, values: Tensor) -> Tensor:
    """B of q and k with the two halves of each RoPE pair side by side; everything else as it is."""
    if not name.endswith(("wq.lora_B", "wk.lora_B")):
        return values.clone()
    return values.unflatten(0, (-1, 2, model.config.head_dim // 2)).transpose(1, 2).flatten(0, 2).clone()


def as_ours(model: PeftModel) -> LoraAdapter:
    """The same LoRA as ours."""
    config = model.peft_config["default"]
    whole = {name: in_our_order(model, name, half.detach()) for name, half in halves(model)}
    linears = dict.fromkeys(name.removesuffix(".lora_A").removesuffix(".lora_B") for name in whole)
    weights = {name: (whole[f"{name}.lora_A"], whole[f"{name}.lora_B"]) for name in linears}
    return LoraAdapter(config.r, config.lora_alpha, ALL, weights, config.lora_dropout, config.use_rslora)


def gradients(model: PeftModel) -> dict[str, Tensor]:
    """Of every A and B, in our order."""
    return {name: in_our_order(model, name, half.grad) for name, half in halves(model) if half.grad is not None}
