"""Small models whose rows fall into groups at four ranks, and what their integers stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from support import hf_model, meta_params
from torch import Tensor
from transformers import LlamaForCausalLM

from llama.checkpoint.load import cut_model, load_model
from llama.checkpoint.source import open_checkpoint
from llama.kernels.formats import dequantize, quantize
from llama.model import Transformer
from llama.parallel import groups
from llama.quantization.scheme import Scheme

INT8, INT4 = Scheme.create("int8"), Scheme.create("int4")
EVERYTHING = Scheme.create("int4", 32, "int4", "int4")
MIXED = Scheme.create("int4", 32, "none", "int8")
SCHEMES = {"int8": INT8, "int4": INT4, "everything int4": EVERYTHING, "mixed": MIXED}
CUTS = [(1, None), (2, None), (3, None), (4, None), (2, "3,1")]


def wide_model(generation: str = "2", **changes: Any) -> LlamaForCausalLM:
    """As `hf_model`, with heads of 32 and an FFN of 22 blocks of 32."""
    model = hf_model(generation, **{"hidden_size": 256, "intermediate_size": 704, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(0.5)
    return model


def write_state(folder: Path, model: LlamaForCausalLM, state: dict[str, Tensor], **params: Any) -> Path:
    """One file in Meta's layout with these tensors."""
    folder.mkdir(parents=True)
    torch.save(state, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(meta_params(model) | params))
    return folder


def rounded(state: dict[str, Tensor], scheme: Scheme, tied: bool = False) -> dict[str, Tensor]:
    """The weights that the integers of a model stand for; of a tied one the embedding is held as the output is."""
    found = {}
    for name, weight in state.items():
        part = name.split(".")[-2]
        if part == "output" or (part == "tok_embeddings" and tied):
            form = scheme.output
        elif part == "tok_embeddings":
            form = scheme.embedding
        else:
            form = None if "norm" in part else scheme.linears
        found[name] = weight if form is None else dequantize(*quantize(weight, form))
    return found


def shard(
    folder: Path, scheme: Scheme | None = None, tensor_split: str | None = None, dtype: torch.dtype = torch.float32
) -> Transformer:
    """This rank's part of the checkpoint in `folder`, held as `scheme` says."""
    checkpoint, ranks = open_checkpoint(folder), groups.current()
    scheme = checkpoint.scheme or scheme
    partition = cut_model(checkpoint.args, scheme, ranks.world_size, tensor_split)
    return load_model(checkpoint, partition, ranks, dtype, scheme)


def own_parts(
    folder: Path, scheme: Scheme | None, tensor_split: str | None = None
) -> dict[str, tuple[tuple[slice, ...], Tensor]]:
    """On every rank: what was loaded, each with its place in the whole stored tensor."""
    from llama.checkpoint.table import specs

    model = shard(folder, scheme, tensor_split)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    held = specs(model.args, open_checkpoint(folder).scheme or scheme)
    return {
        name: (held[name].own(model.partition, model.ranks.rank), weight.detach())
        for name, weight in model.named_parameters()
    }


def joined(parts: list[dict[str, tuple[tuple[slice, ...], Tensor]]]) -> dict[str, Tensor]:
    """The whole tensors; where several ranks hold the same part it must be equal."""
    whole = {}
    for name in parts[0]:
        places = [part[name][0] for part in parts]
        shape = [max(place[dim].stop for place in places) for dim in range(len(places[0]))]
        covered = torch.zeros(shape, dtype=torch.bool)
        whole[name] = torch.zeros(shape, dtype=parts[0][name][1].dtype)
        for part in parts:
            place, own = part[name]
            assert torch.equal(whole[name][place][covered[place]], own[covered[place]]), name
            whole[name][place], covered[place] = own, True
        assert covered.all(), name
    return whole


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are bit for bit the same."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )
