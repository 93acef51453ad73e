"""Checkpoints as GGUF files, for llama.cpp and the programs that are built on it.

GGUF's Llama is Meta's layout under other names: no rows are permuted. Tensors go from file to file in
pieces. The `gguf` package knows the format and the quantized blocks; the tests load the files in llama.cpp.
Keys and types: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from llama.chat import chat_format
from llama.checkpoint.folders import check_space, partial_file
from llama.checkpoint.params import context_length
from llama.checkpoint.rows import SourceTensor, row_chunks
from llama.checkpoint.source import Checkpoint
from llama.checkpoint.table import Spec
from llama.config import ModelArgs
from llama.env import is_speaker, notice
from llama.errors import CheckpointError, LlamaError, TokenizerError
from llama.export import soft_tokens, templates
from llama.rope import rope_frequencies
from llama.tokenizer import Tokenizer
from llama.tokenizer.vocabulary import UNUSED_SCORE, Kind, Vocabulary

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
# Neighbours of a row that share a scale.
BLOCK = 32
# llama.cpp's names for ways to cut text into words.
PATTERNS = {"llama3": "llama-bpe", "gpt2": "gpt-2"}
FAMILIES = {"spm": "llama", "bpe": "gpt2"}


def export_gguf(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    output: str | Path,
    type_name: str,
    chat: str = "auto",
    context: int | None = None,
    force: bool = False,
    prompt: Tensor | None = None,
) -> Path:
    """Write model and tokenizer as a GGUF file, with an Ollama Modelfile beside it.

    Args:
        checkpoint: from `open_checkpoint`.
        tokenizer: its tokenizer.
        output: the file; it appears under this name once it is whole.
        type_name: one of `TYPES`, for the matrices; vectors are always float32.
        chat: chat template to carry along: "auto", "llama2", "llama3", "alpaca", "plain" or "none".
        context: tokens that the model was made for; None for `llama.checkpoint.params.context_length`.
        force: replace a file that exists.
        prompt: a soft prompt, [n_virtual_tokens, dim]; it becomes tokens, which the template puts in front of
            BOS.

    Returns:
        The file written.

    Raises:
        LlamaError: with nothing left behind.
    """
    library = _library()
    target = Path(output)
    _check_target(target, type_name, force)
    texts = templates.templates(chat_format("auto", tokenizer).name if chat == "auto" else chat)
    checkpoint.require_numbers("a GGUF file")
    args = checkpoint.held_args()
    vocabulary = _padded(tokenizer.vocabulary(), args.vocab_size)
    opening = ""
    if prompt is not None:
        checkpoint = soft_tokens.add_rows(checkpoint, prompt, soft_tokens.never_said(vocabulary))
        vocabulary, args = soft_tokens.add_tokens(vocabulary, len(prompt)), checkpoint.args
        opening = "".join(soft_tokens.token_names(len(prompt)))
    planned = _plan(checkpoint, args, type_name)
    check_space(target, sum(plan.nbytes for plan in planned), "choose a smaller --type, another place")
    for remark in vocabulary.remarks:
        notice(f"note: {remark}")
    with partial_file(target) as partial:
        writer = library.GGUFWriter(partial, "llama")
        try:
            _add_geometry(writer, args, checkpoint, context or context_length(checkpoint))
            _add_file_type(writer, type_name)
            # The opening holds BOS, which llama.cpp must not add in front of it.
            _add_vocabulary(writer, vocabulary, tokenizer, add_bos=not opening)
            if texts:
                writer.add_chat_template(opening + texts.jinja)
            _write(writer, planned, _rope_factors(args))
        finally:
            writer.close()
        stops = [name for name, number in tokenizer.special_tokens.items() if number in tokenizer.stop_tokens]
        if opening:
            opening += vocabulary.tokens[tokenizer.bos_id]
        text = templates.modelfile(target.name, texts, stops, opening)
        (target.parent / "Modelfile").write_text(text, encoding="utf-8")
    return target


def _library() -> Any:
    """Return the `gguf` package, an optional dependency."""
    try:
        import gguf
    except ImportError:
        raise LlamaError("the export needs the gguf package: pip install 'llama-shards[gguf]'") from None
    return gguf


# -- files -----------------------------------------------------------------------------------------


def _check_target(target: Path, type_name: str, force: bool) -> None:
    if type_name not in TYPES:
        raise CheckpointError(f"--type is {type_name!r}: use {', '.join(TYPES)}")
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder: name the file to write, such as {target / 'model.gguf'}")
    if target.suffix != ".gguf":
        # With --force, another name could replace somebody's weights.
        raise CheckpointError(f"{target} must end in .gguf: it is the file to write")
    if target.exists() and not force:
        raise CheckpointError(f"{target} exists: add --force to replace it, or choose another name")
    beside = target.parent / "Modelfile"
    if beside.exists() and not templates.is_ours(beside):
        raise CheckpointError(f"{beside} is not of an export: move it away, or write to another folder")


# -- tensors ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Planned:
    """One tensor to write: its source and its type in the file."""

    tensor: SourceTensor
    type_name: str

    @property
    def spec(self) -> Spec:
        return self.tensor.spec

    @property
    def nbytes(self) -> int:
        n_values = torch.Size(self.spec.shape).numel()
        # A block holds a float16 scale and its values in 8 or 4 bits.
        blocks = {"q8_0": 2 + BLOCK, "q4_0": 2 + BLOCK // 2}
        if self.type_name in blocks:
            return n_values // BLOCK * blocks[self.type_name]
        return n_values * (4 if self.type_name == "f32" else 2)


def _plan(checkpoint: Checkpoint, args: ModelArgs, type_name: str) -> list[_Planned]:
    """Return every tensor of the file, without a tied output layer: llama.cpp uses the embedding."""
    planned = [
        _Planned(tensor, _type_of(tensor.spec, args, type_name))
        for name, tensor in checkpoint.tensors.items()
        if not (args.tied and name == "output.weight")
    ]
    fallen = [plan.spec.gguf_name for plan in planned if plan.type_name == "f16" != type_name]
    if fallen:
        notice(
            f"{len(fallen)} tensors stay f16, since {type_name} needs rows of a multiple of {BLOCK}: "
            f"{', '.join(fallen[:3])}{' ...' if len(fallen) > 3 else ''}"
        )
    return planned


def _type_of(spec: Spec, args: ModelArgs, type_name: str) -> str:
    """Return the type of a tensor, much as llama.cpp's own quantizer decides.

    Vectors stay float32: llama.cpp has no other norms. The output layer, or the embedding where the two are tied,
    suffers most from 4 bits: llama.cpp gives it 6, and we give it 8, since the `gguf` package has no blocks of 6.
    """
    if len(spec.shape) == 1:
        return "f32"
    if type_name in ("q8_0", "q4_0") and spec.shape[-1] % BLOCK:
        return "f16"
    is_output = spec.name == "output.weight" or (args.tied and spec.name == "tok_embeddings.weight")
    return "q8_0" if is_output and type_name == "q4_0" else type_name


def _write(writer: Any, planned: Sequence[_Planned], rope_factors: Tensor | None) -> None:
    """Announce every tensor, then fill the file in the same order."""
    types = _library().GGMLQuantizationType
    if rope_factors is not None:
        writer.add_tensor_info(
            "rope_freqs.weight", rope_factors.shape, rope_factors.numpy().dtype, rope_factors.nbytes, types.F32
        )
    for plan in planned:
        # The element type only matters to the package where it says "bytes".
        kind = types[plan.type_name.upper()]
        writer.add_tensor_info(plan.spec.gguf_name, plan.spec.shape, _FLOAT, plan.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    if rope_factors is not None:
        file.write(rope_factors.numpy().tobytes())
        writer.write_padding(file, rope_factors.nbytes)
    total = sum(plan.nbytes for plan in planned)
    with tqdm(total=total, unit="B", unit_scale=True, desc="exporting", disable=not is_speaker()) as bar:
        for plan in planned:
            _write_tensor(plan, file, bar)
            writer.write_padding(file, plan.nbytes)
    file.flush()
    os.fsync(file.fileno())


_FLOAT = torch.zeros(0).numpy().dtype
_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


def _write_tensor(plan: _Planned, file: BinaryIO, bar: tqdm[Any]) -> None:
    """Convert one tensor, some rows at a time."""
    dtype = _DTYPES.get(plan.type_name, torch.float32)
    for _, rows in row_chunks(plan.tensor, dtype):
        if not torch.isfinite(rows).all():
            raise CheckpointError(
                f"{plan.spec.name} has values that {str(dtype).removeprefix('torch.')} cannot hold: "
                "use --type bf16 or f32, if they are finite at all"
            )
        data = _encode(rows, plan.type_name)
        file.write(data)
        bar.update(len(data))


def _encode(rows: Tensor, type_name: str) -> bytes:
    """Return rows as the bytes of the file."""
    if type_name not in ("q8_0", "q4_0"):
        return rows.view(-1).view(torch.uint8).numpy().tobytes()
    library = _library()
    blocks = library.quants.quantize(rows.numpy(), library.GGMLQuantizationType[type_name.upper()])
    return blocks.tobytes()


def _rope_factors(args: ModelArgs) -> Tensor | None:
    """Return the factor by which Llama 3.1's scaling slows each frequency, a tensor [D/2] of the file."""
    if args.rope_scaling is None or args.rope_scaling.kind != "llama3":
        return None
    return rope_frequencies(dataclasses.replace(args, rope_scaling=None)) / rope_frequencies(args)


# -- metadata --------------------------------------------------------------------------------------


def _add_geometry(writer: Any, args: ModelArgs, checkpoint: Checkpoint, context: int) -> None:
    writer.add_type("model")
    writer.add_name(checkpoint.path.resolve().name)
    writer.add_context_length(context)
    writer.add_embedding_length(args.dim)
    writer.add_block_count(args.n_layers)
    writer.add_feed_forward_length(args.ffn_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.n_kv_heads)
    writer.add_key_length(args.head_dim)
    writer.add_value_length(args.head_dim)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_vocab_size(args.vocab_size)
    writer.add_rope_dimension_count(args.head_dim)
    writer.add_rope_freq_base(args.rope_theta)
    if args.rope_scaling is not None and args.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(_library().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(args.rope_scaling.factor)


def _add_file_type(writer: Any, type_name: str) -> None:
    library = _library()
    prefix = "ALL_" if type_name == "f32" else "MOSTLY_"
    writer.add_file_type(library.LlamaFileType[prefix + type_name.upper()])
    if type_name in ("q8_0", "q4_0"):
        writer.add_quantization_version(library.GGML_QUANT_VERSION)


def _padded(vocabulary: Vocabulary, n_rows: int) -> Vocabulary:
    """Return the vocabulary with one token for every row of the embedding.

    Raises:
        TokenizerError: for more tokens than there are rows, or less than half as many.
    """
    known = len(vocabulary.tokens)
    if not known <= n_rows <= 2 * known:
        raise TokenizerError(f"the tokenizer has {known} tokens, the model {n_rows}: it belongs to another model")
    filler = [f"[PAD{number}]" for number in range(known, n_rows)]
    return dataclasses.replace(
        vocabulary,
        tokens=[*vocabulary.tokens, *filler],
        kinds=[*vocabulary.kinds, *[Kind.UNUSED] * len(filler)],
        scores=[*vocabulary.scores, *[UNUSED_SCORE] * len(filler)] if vocabulary.scores else (),
    )


def _add_vocabulary(writer: Any, vocabulary: Vocabulary, tokenizer: Tokenizer, add_bos: bool) -> None:
    writer.add_tokenizer_model(FAMILIES[vocabulary.family])
    writer.add_tokenizer_pre(PATTERNS.get(vocabulary.pattern, "default"))
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.family == "spm":
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types([int(kind) for kind in vocabulary.kinds])
    if vocabulary.family == "bpe":
        writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    for number, add in ((vocabulary.unk_id, writer.add_unk_token_id), (tokenizer.pad_id, writer.add_pad_token_id)):
        if number >= 0:
            add(number)
    for name, add in (("<|eot_id|>", writer.add_eot_token_id), ("<|eom_id|>", writer.add_eom_token_id)):
        if name in tokenizer.special_tokens:
            add(tokenizer.special_tokens[name])
    writer.add_add_bos_token(add_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.space_prefix)
