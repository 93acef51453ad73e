"""Small models with random weights, written as the checkpoints that people have.

Oracles are not ours: models come from transformers, and the way to Meta's layout is written here
from the published conversion, apart from `llama.checkpoint.table`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llama.model import Transformer
from llama.parallel.collectives import gather_last

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Short, so that tests reach positions past it.
    "original_max_position_embeddings": 64,
}
# Geometries as of each generation, small: 1 without groups, 2 with groups (70B), 3 with another base,
# 3.1 with scaled RoPE, 3.2 tied.
GENERATIONS: dict[str, dict[str, Any]] = {
    "1": {"num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    "2": {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
    "3": {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 500000.0},
    "3.1": {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "scaling": LLAMA3_ROPE},
    "3.2": {
        "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "scaling": {**LLAMA3_ROPE, "factor": 32.0}, "tie_word_embeddings": True,
    },
}  # fmt: skip
DIM, N_LAYERS, N_HEADS, VOCAB = 64, 2, 8, 320


def gather_logits(model: Transformer, logits: Tensor) -> Tensor:
    """The whole vocabulary's logits on every rank: [..., V'] to [..., vocab_size]; no gradient."""
    return gather_last(logits, model.partition.vocab, model.ranks)


def hf_model(generation: str, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A tiny random Llama of one generation, in float32."""
    options = {**GENERATIONS[generation], **changes}
    scaling = options.pop("scaling", {"rope_type": "default"})
    theta = options.pop("rope_theta")
    config = LlamaConfig(
        **{
            "hidden_size": DIM, "num_hidden_layers": N_LAYERS, "num_attention_heads": N_HEADS,
            "intermediate_size": 176, "vocab_size": VOCAB, "max_position_embeddings": 512,
            "rope_parameters": {**scaling, "rope_theta": theta}, "attn_implementation": "eager",
            "bos_token_id": 1, "eos_token_id": 2, **options,
        }
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Weights large enough that logits differ between tokens by whole nats.
            parameter.copy_(torch.randn_like(parameter) * (0.1 if "norm" in name else 0.15))
            if "norm" in name:
                parameter.add_(1.0)
    return model


def meta_state(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """The model's weights under Meta's names and in Meta's row order."""
    config, weights = model.config, model.state_dict()

    def interleave(weight: Tensor) -> Tensor:
        head = config.head_dim
        return weight.reshape(-1, 2, head // 2, config.hidden_size).transpose(1, 2).reshape(weight.shape)

    state = {
        "tok_embeddings.weight": weights["model.embed_tokens.weight"],
        "norm.weight": weights["model.norm.weight"],
        "output.weight": weights["lm_head.weight"],
    }
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        state |= {
            f"{ours}.attention.wq.weight": interleave(weights[f"{theirs}.self_attn.q_proj.weight"]),
            f"{ours}.attention.wk.weight": interleave(weights[f"{theirs}.self_attn.k_proj.weight"]),
            f"{ours}.attention.wv.weight": weights[f"{theirs}.self_attn.v_proj.weight"],
            f"{ours}.attention.wo.weight": weights[f"{theirs}.self_attn.o_proj.weight"],
            f"{ours}.feed_forward.w1.weight": weights[f"{theirs}.mlp.gate_proj.weight"],
            f"{ours}.feed_forward.w2.weight": weights[f"{theirs}.mlp.down_proj.weight"],
            f"{ours}.feed_forward.w3.weight": weights[f"{theirs}.mlp.up_proj.weight"],
            f"{ours}.attention_norm.weight": weights[f"{theirs}.input_layernorm.weight"],
            f"{ours}.ffn_norm.weight": weights[f"{theirs}.post_attention_layernorm.weight"],
        }
    return {name: weight.clone() for name, weight in state.items()}


def meta_params(model: LlamaForCausalLM) -> dict[str, Any]:
    """`params.json` for the model, as Meta writes it (with our explicit `rope_scaling`)."""
    config = model.config
    rope = dict(config.rope_parameters)
    params = {
        "dim": config.hidden_size, "n_layers": config.num_hidden_layers, "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads, "vocab_size": config.vocab_size,
        "multiple_of": config.intermediate_size, "norm_eps": config.rms_norm_eps, "rope_theta": rope["rope_theta"],
    }  # fmt: skip
    if rope["rope_type"] != "default":
        params["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return params


ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
COLUMNS = ("wo", "w2")


def cut_dim(name: str, embedding_dim: int) -> int | None:
    """The dimension along which Meta's shards cut a tensor."""
    part = name.split(".")[-2]
    if part == "tok_embeddings":
        return embedding_dim
    return 0 if part in ROWS else 1 if part in COLUMNS else None


def write_meta(
    folder: Path,
    model: LlamaForCausalLM,
    n_shards: int = 1,
    embedding_dim: int = 0,
    stem: str = "consolidated",
    dtype: torch.dtype = torch.float32,
    views: bool = False,
    **params: Any,
) -> Path:
    """Write `n_shards` equal shards; with `views`, as the original fork did: views that drag their storage along."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: weight.to(dtype) for name, weight in meta_state(model).items()}
    for shard in range(n_shards):
        part = {}
        for name, weight in state.items():
            dim = cut_dim(name, embedding_dim)
            piece = weight if dim is None else weight.chunk(n_shards, dim)[shard]
            part[name] = piece if views else piece.clone(memory_format=torch.contiguous_format)
        torch.save(part, folder / f"{stem}.{shard:02d}.pth")
    (folder / "params.json").write_text(json.dumps(meta_params(model) | params))
    return folder


def write_hf(folder: Path, model: LlamaForCausalLM, shard_size: str = "5GB") -> Path:
    """Write safetensors as transformers does, in one file or, with a small `shard_size`, indexed ones."""
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def sentencepiece_model(folder: Path, vocab_size: int = VOCAB) -> Path:
    """Train a small SentencePiece BPE model of exactly `vocab_size` pieces: bos 1, eos 2, byte fallback."""
    import sentencepiece

    path = folder / "tokenizer.model"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        words = [f"w{a}{b} the quick brown fox number {a * b}" for a in range(30) for b in range(30)]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words), model_prefix=str(folder / "tokenizer"), vocab_size=vocab_size,
            model_type="bpe", byte_fallback=True, minloglevel=2, normalization_rule_name="identity",
        )  # fmt: skip
    return path


def sp_twin(proto: bytes) -> Any:
    """The tokenizer.json of a SentencePiece BPE model, built as Hugging Face's converter builds Llama's."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    sp = sentencepiece.SentencePieceProcessor(model_proto=proto)
    vocab = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    merges = []
    for piece, rank in vocab.items():
        if sp.is_byte(rank) or sp.is_control(rank) or sp.is_unknown(rank):
            continue
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = sorted((vocab[a], vocab[b], a, b) for a, b in halves if a in vocab and b in vocab)
        merges += [(rank, a, b) for _, _, a, b in known]
    core = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(a, b) for _, a, b in sorted(merges, key=lambda merge: merge[0])],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    # Hugging Face files add BOS by themselves; ours must not get it twice.
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return core
