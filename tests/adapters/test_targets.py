"""Names of what LoRA updates, in both worlds, and what is said of the others."""

import pytest
from support import hf_model, meta_params, meta_state
from torch import nn

from llama.adapters.adapter import TARGETS, linears, resolve_targets
from llama.config import ModelArgs
from llama.errors import UsageError

ALL = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("wq,wv", ("wq", "wv")),
        ("q_proj,v_proj", ("wq", "wv")),
        (" w2 , wq,q_proj", ("wq", "w2")),  # once each, in the layer's order
        ("gate_proj,down_proj,up_proj", ("w1", "w2", "w3")),
        ("all", ALL),
        ("all-linear", ALL),
        ("wo,all", ALL),
    ],
)
def test_names_of_both_worlds_are_known(text: str, expected: tuple[str, ...]) -> None:
    assert resolve_targets(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wq,wx", r"names 'wx', which matches no linear: it takes wq, wk, wv, wo, w1, w2, w3 \(q_proj, .*did you mean"),
        ("q_prj", r"did you mean q_proj\?"),
        ("attention_norm", "matches no linear"),
        ("", "names '', which matches no linear"),
        ("wq,,wv", "names '', which matches no linear"),
        ("output", "not offered for output, only for the layers' linears"),
        ("lm_head", "not offered for lm_head"),
        ("wq,tok_embeddings", "not offered for tok_embeddings"),
        ("embed_tokens", "not offered for embed_tokens"),
    ],
)
def test_other_names_are_refused_with_those_there_are(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        resolve_targets(text)
    assert "\n" not in str(caught.value)


def test_the_linears_are_those_of_transformers() -> None:
    reference = hf_model("2")
    theirs = [name for name, module in reference.named_modules() if isinstance(module, nn.Linear)]
    assert {name.split(".")[-1] for name in theirs} - {"lm_head"} == set(TARGETS.values())
    found = linears(ModelArgs.from_params(meta_params(reference)))
    state = meta_state(reference)
    assert len(found) == len(theirs) - 1
    assert all(spec.shape == state[f"{name}.weight"].shape for name, spec in found.items())
    assert list(linears(ModelArgs.from_params(meta_params(reference)), ("w2", "wk"))) == [
        "layers.0.attention.wk", "layers.0.feed_forward.w2", "layers.1.attention.wk", "layers.1.feed_forward.w2",
    ]  # fmt: skip
