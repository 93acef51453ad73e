"""Open any checkpoint as named tensors of one whole model, of which any part can be read.

Meta's shards are laid end to end, whatever their number; Hugging Face's names and row order become
Meta's. What is open is only headers: bytes are read when a part is asked for.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

from llama.checkpoint.files import StoredTensor, read_header
from llama.checkpoint.rows import SourceTensor, may_be
from llama.checkpoint.scratch import geometry_of
from llama.checkpoint.table import Spec, is_ignored, specs
from llama.checkpoint.tie import is_tied
from llama.config import ModelArgs, read_json
from llama.errors import CheckpointError, QuantizationError
from llama.quantization.scheme import EMBEDDING, Scheme

SHARD_NAME = re.compile(r"^((?:fs_)?consolidated)\.(\d{2,})\.pth$")
HF_NAMES = ("model.safetensors", "pytorch_model.bin")
# A folder that is still being written, or was left behind by a run that was killed.
PARTIAL = ".partial"
SINGLE_SUFFIXES = (".pth", ".pt", ".bin")
MOST_NAMED = 20  # tensors listed in one message


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: its geometry, its format and its tensors by Meta's names.

    Args:
        path: the folder, or the single file.
        format: "meta", "hf" or "single".
        args: the geometry; `vocab_size` is that of the tensors.
        tensors: every tensor of the model; without "output.weight" when the file has none.
        n_shards: files that the tensors were cut into.
        adapter: name of what its tensors are read with, where that is not the files alone.
        scheme: which tensors are integers with scales; None for a checkpoint of numbers alone.
    """

    path: Path
    format: str
    args: ModelArgs
    tensors: Mapping[str, SourceTensor]
    n_shards: int
    adapter: str | None = None
    scheme: Scheme | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the model's numbers are stored in; integers are none."""
        name = "layers.0.feed_forward.w1.weight" if self.scheme is None else "norm.weight"
        return self.tensors[name].dtype

    def held_args(self, rows: slice | None = None, unsaid: bool = False) -> ModelArgs:
        """The geometry of a model that holds these tensors, its `tied` as `is_tied` answers; arguments as there."""
        return dataclasses.replace(self.args, tied=is_tied(self.args, self.tensors, self.scheme, rows, unsaid))

    def require_numbers(self, purpose: str) -> None:
        """Refuse a quantized checkpoint where the weights themselves are needed.

        Raises:
            QuantizationError: which says what for.
        """
        if self.scheme is not None:
            raise QuantizationError(
                f"{self.path} is quantized ({self.scheme.words()}), and {purpose} would need the weights as they "
                "were: start from the original checkpoint"
            )


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint folder: Meta's `consolidated.NN.pth`, `fs_consolidated.NN.pth`, or Hugging Face's.

    A path to a file is that of LLMs-from-scratch's single `.pth`.

    Raises:
        CheckpointError: when it is missing, empty, damaged or incomplete, or when its tensors are not
            those that its parameters announce; one message names all of them.
    """
    folder = Path(path)
    if not folder.exists():
        raise CheckpointError(f"no checkpoint at {folder}: there is no such folder")
    if folder.resolve().name.endswith(PARTIAL):
        raise CheckpointError(f"{folder} was not finished: run the command that was writing it again")
    if not folder.is_dir():
        return _open_single(folder)
    shards = _shard_files(folder)
    if shards:
        return _open_meta(folder, shards)
    for name in HF_NAMES:
        if (folder / name).exists() or (folder / f"{name}.index.json").exists():
            return _open_hf(folder, name)
    raise CheckpointError(
        f"{folder} holds no checkpoint: expected consolidated.NN.pth, fs_consolidated.NN.pth or "
        "model.safetensors (with params.json or config.json)"
    )


# -- Meta ------------------------------------------------------------------------------------------


def _shard_files(folder: Path) -> list[Path]:
    """The shards of a folder in order; of two sets, the original one."""
    found: dict[str, dict[int, Path]] = {}
    for file in folder.iterdir():
        match = SHARD_NAME.match(file.name)
        if match:
            found.setdefault(match[1], {})[int(match[2])] = file
    if not found:
        return []
    stem = min(found)  # "consolidated" before "fs_consolidated"
    files = found[stem]
    missing = [number for number in range(max(files)) if number not in files]
    if missing:
        names = ", ".join(f"{stem}.{number:02d}.pth" for number in missing)
        raise CheckpointError(f"{folder} has {len(files)} shards up to number {max(files):02d}, but lacks {names}")
    return [files[number] for number in sorted(files)]


def _open_meta(folder: Path, files: Sequence[Path]) -> Checkpoint:
    if not (folder / "params.json").exists():
        raise CheckpointError(f"{folder} has no params.json: copy it from where the weights came from")
    args = ModelArgs.from_file(folder / "params.json")
    scheme = _stored_scheme(folder / "params.json")
    shards = [read_header(file, is_ignored, integers=scheme is not None) for file in files]
    args = _with_vocab_size(args, shards)
    if scheme is not None:
        args = dataclasses.replace(args, tied=_reads_as_tied(args, scheme, shards[0]))
        scheme.check(args)
    expected = specs(args, scheme)
    problems = _Problems()
    for file, shard in zip(files, shards, strict=True):
        where = f" in {file.name}" if len(files) > 1 else ""
        problems.missing += [name + where for name in expected if name not in shard and not _may_lack(name, args)]
        problems.unexpected += [name + where for name in shard if name not in expected]
    tensors = {}
    for name, spec in expected.items():
        pieces = [shard[name] for shard in shards if name in shard]
        if len(pieces) == len(shards):
            tensor = _join(spec, pieces)
            problems.check_shape(spec, tensor)
            tensors[name] = tensor
    problems.raise_if_any(folder, len(files))
    return Checkpoint(folder, "meta", args, tensors, len(files), scheme=scheme)


def _stored_scheme(path: Path) -> Scheme | None:
    """The scheme of the integers in the files, from params.json."""
    content = read_json(path).get("quantization")
    try:
        return None if content is None else Scheme.from_json(content)
    except QuantizationError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _reads_as_tied(args: ModelArgs, scheme: Scheme, shard: Mapping[str, StoredTensor]) -> bool:
    """Return whether the embedding is stored in the form that a tied one has; no values are compared."""
    spec = specs(args)[EMBEDDING]
    return is_tied(args, {EMBEDDING: SourceTensor(spec, (shard[EMBEDDING],))} if EMBEDDING in shard else {}, scheme)


def _may_lack(name: str, args: ModelArgs) -> bool:
    return name.startswith("output.") and args.tied


def _with_vocab_size(args: ModelArgs, shards: Sequence[Mapping[str, StoredTensor]]) -> ModelArgs:
    """Where params leave the vocabulary open (-1), the output layer's rows decide."""
    if args.vocab_size != -1:
        return args
    rows = [shard["output.weight"].shape[0] for shard in shards if "output.weight" in shard]
    if len(rows) < len(shards):
        raise CheckpointError("params.json leaves vocab_size open (-1) and output.weight is missing: state it there")
    return args.with_vocab_size(sum(rows))


def _join(spec: Spec, pieces: Sequence[StoredTensor]) -> SourceTensor:
    """Lay the shards of one tensor end to end along the dimension that was cut."""
    dim = spec.cut_dim
    if dim is None or len(pieces) == 1:
        return SourceTensor(spec, tuple(pieces[:1]))  # every shard holds the same copy
    if spec.name == "tok_embeddings.weight" and all(
        len(piece.shape) == 2 and piece.shape[0] == spec.shape[0] for piece in pieces
    ):
        dim = 1  # Llama 1 and 2 cut the embedding's features, Llama 3 its vocabulary
    return SourceTensor(spec, tuple(pieces), dim)


# -- Hugging Face ----------------------------------------------------------------------------------


def _open_hf(folder: Path, name: str) -> Checkpoint:
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} has no config.json: copy it from where the weights came from")
    args = ModelArgs.from_file(folder / "config.json")
    stored, n_files = _hf_tensors(folder, name)
    expected = specs(args)
    embedding, output = (expected[name].hf_name for name in ("tok_embeddings.weight", "output.weight"))
    if args.tied and embedding not in stored and output in stored:
        stored[embedding] = stored.pop(output)  # safetensors' save_model keeps either name
    tensors = _by_our_names(folder, args, stored, lambda spec: spec.hf_name, n_files)
    return Checkpoint(folder, "hf", args, tensors, n_files)


def _by_our_names(
    path: Path, args: ModelArgs, stored: Mapping[str, StoredTensor], name_of: Callable[[Spec], str], n_files: int
) -> dict[str, SourceTensor]:
    """Whole tensors under another world's names, in rotate-half row order, by ours."""
    expected = specs(args)
    problems = _Problems()
    known = {name_of(spec) for spec in expected.values()}
    problems.unexpected = [key for key in stored if key not in known]
    tensors = {}
    for spec in expected.values():
        name = name_of(spec)
        if name not in stored:
            if not _may_lack(spec.name, args):
                problems.missing.append(name)
            continue
        tensor = SourceTensor(spec, (stored[name],), head_rows=args.head_dim if spec.permuted else 0)
        problems.check_shape(spec, tensor)
        tensors[spec.name] = tensor
    problems.raise_if_any(path, n_files)
    return tensors


def _hf_tensors(folder: Path, name: str) -> tuple[dict[str, StoredTensor], int]:
    index_path = folder / f"{name}.index.json"
    if (folder / name).exists():
        return read_header(folder / name, is_ignored), 1
    weight_map = read_json(index_path)
    weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index_path} has no weight_map")
    stored: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{index_path} names a file outside its folder: {file}")
        if not (folder / file).exists():
            raise CheckpointError(f"{folder} lacks {file}, which its index names")
        stored.update(read_header(folder / file, is_ignored))
    return stored, len(set(weight_map.values()))


# -- LLMs-from-scratch -----------------------------------------------------------------------------


def _open_single(path: Path) -> Checkpoint:
    if path.suffix not in SINGLE_SUFFIXES:
        raise CheckpointError(
            f"{path} is a file: --ckpt_dir names the folder that holds the checkpoint, or the single .pth of "
            "LLMs-from-scratch"
        )
    stored = read_header(path, is_ignored)
    args = geometry_of(path, stored)
    return Checkpoint(path, "single", args, _by_our_names(path, args, stored, lambda spec: spec.scratch_name, 1), 1)


# -- what all of them share ------------------------------------------------------------------------


class _Problems:
    """The faults of a checkpoint's tensors, told in one error."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.misshapen: list[str] = []
        self.mistyped: list[str] = []

    def check_shape(self, spec: Spec, tensor: SourceTensor) -> None:
        """Note a tensor whose pieces do not add up to the shape, or are not of the dtype, that are announced."""
        found = _joined_shape(tensor)
        if found != spec.shape:
            self.misshapen.append(f"{spec.name} is {_show(found)}, expected {list(spec.shape)}")
        strangers = {piece.dtype for piece in tensor.pieces if not may_be(piece.dtype, spec.dtype)}
        if strangers:
            found_as, wanted = _name(strangers.pop()), "a dtype of numbers" if spec.dtype is None else _name(spec.dtype)
            self.mistyped.append(f"{spec.name} is {found_as}, expected {wanted}")

    def raise_if_any(self, folder: Path, n_files: int) -> None:
        parts = []
        for label, names in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("of another shape than the parameters say", self.misshapen),
            ("of another dtype than the parameters say", self.mistyped),
        ):
            if names:
                more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
                parts.append(f"{len(names)} {label}: {', '.join(names[:MOST_NAMED])}{more}")
        if parts:
            files = "1 file" if n_files == 1 else f"{n_files} files"
            hint = "; is a shard missing, or params.json of another model?" if self.misshapen else ""
            raise CheckpointError(f"{folder} ({files}) does not hold the model it announces: {'; '.join(parts)}{hint}")


def _joined_shape(tensor: SourceTensor) -> tuple[int, ...] | None:
    """The shape of the pieces laid end to end; None when they do not fit together."""
    shapes = [list(piece.shape) for piece in tensor.pieces]
    if any(len(shape) != len(tensor.spec.shape) for shape in shapes):
        return tuple(shapes[0]) if len(shapes) == 1 else None
    others = {tuple(n for dim, n in enumerate(shape) if dim != tensor.dim) for shape in shapes}
    if len(others) != 1:
        return None
    whole = shapes[0]
    whole[tensor.dim] = list(accumulate(shape[tensor.dim] for shape in shapes))[-1]
    return tuple(whole)


def _show(shape: tuple[int, ...] | None) -> str:
    return "in pieces that do not fit together" if shape is None else str(list(shape))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
