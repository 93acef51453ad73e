"""Opening of a model, from files to this rank's shard, and the options that all commands share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.load import cut_model, load_model
from llama.checkpoint.source import Checkpoint, open_checkpoint
from llama.checkpoint.table import n_unique_params, rank_params
from llama.device import choose_device, choose_dtype, set_threads
from llama.env import notice
from llama.errors import LlamaError, TokenizerError, UsageError
from llama.kernels import products
from llama.model import Transformer
from llama.offload import check_offload
from llama.parallel import groups
from llama.parallel.groups import Ranks
from llama.parallel.partition import Partition
from llama.plan.advice import check_fit
from llama.plan.inference import Workload
from llama.quantization.scheme import Asked, Scheme, choose_scheme
from llama.sizes import show_count
from llama.tokenizer import Tokenizer, find_tokenizer, load_tokenizer

ROOT = Path(__file__).parent.parent
# Both come with the repository, not with an installed package.
BUNDLED_MODEL, BUNDLED_DATA = ROOT / "ckpts" / "tiny", ROOT / "datasets" / "alpaca_tiny.json"


@dataclass(frozen=True)
class RunOptions:
    """Device, precision and memory of a run.

    As keyword arguments of `Llama.build`, `dtype` and `device` may be torch's own, and `tensor_split` a sequence.

    Args:
        dtype: auto, fp32, bf16 or fp16.
        device: auto, cpu, cuda, cuda:N or mps.
        threads: CPU threads of each rank.
        tensor_split: weights of the ranks, such as 3,1.
        quantization: integers in place of weights; `quantize` and its kin as flags, `quantize` in Python.
        offload_layers: layers that stay in main memory and are streamed to the card.
        no_plan: load without asking first whether the memory suffices.

    Raises:
        LlamaError: when `threads` is not a positive whole number.
    """

    dtype: str | torch.dtype = "auto"
    device: str | torch.device = "auto"
    threads: int | None = None
    tensor_split: str | Sequence[float] | None = None
    quantization: Asked | Scheme = Asked()
    offload_layers: int = 0
    no_plan: bool = False

    def __post_init__(self) -> None:
        if self.threads is not None and (not isinstance(self.threads, int) or self.threads < 1):
            raise LlamaError(f"threads must be a whole number above 0, is {self.threads!r}")

    @classmethod
    def of(cls, quantize: Scheme | Asked | str | None = None, **fields: Any) -> RunOptions:
        """Return the options of keyword arguments.

        Args:
            quantize: "int8" or "int4", or a `Scheme` for every detail; None for what the checkpoint holds.
            fields: the other fields.
        """
        return cls(quantization=quantize if isinstance(quantize, Scheme | Asked) else Asked(quantize), **fields)


@dataclass(frozen=True)
class Opened:
    """A model that is about to be loaded.

    Args:
        checkpoint, tokenizer: open, of the same model.
        partition: the model's cut across the ranks.
        device, dtype: device and dtype to compute in.
        n_threads: CPU threads of this rank.
        scheme: which weights are held as integers; None for none.
        options: options that the model was opened with.
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    partition: Partition
    device: torch.device
    dtype: torch.dtype
    n_threads: int
    scheme: Scheme | None = None
    options: RunOptions = RunOptions()

    def check_fit(self, limits: Workload, expected: Workload | None = None) -> None:
        """Refuse a run that cannot fit into memory, unless `no_plan` is set: see `llama.plan.advice.check_fit`."""
        if self.options.no_plan:
            return
        check_fit(
            self.checkpoint.args, self.device, self.dtype, self.partition.world_size, self.options.tensor_split,
            limits, expected, scheme=self.scheme, stored=self.checkpoint.scheme,
            offload_layers=self.options.offload_layers,
        )  # fmt: skip

    def load(self, ranks: Ranks) -> Transformer:
        """Read this rank's shard: see `load_model`."""
        return load_model(self.checkpoint, self.partition, ranks, self.dtype, self.scheme, self.options.offload_layers)

    def prepare_kernels(self) -> Ranks:
        """Build and load the CPU kernels where the time saved pays for building; return the ranks, which may use them.

        A collective call of the model-parallel group, once the groups are started.
        """
        n_bytes = rank_params(self.partition, 0) * self.dtype.itemsize
        pays = self.device.type == "cpu" and products.worth_building(n_bytes)
        if pays and products.serve(self.dtype, has_integers=self.scheme is not None):
            products.enable()
        return groups.share_memory(pays)

    def describe(self, seconds: float) -> str:
        """Return the line that says what was loaded in how many seconds, and where."""
        checkpoint, size = self.checkpoint, self.partition.world_size
        where = "1 process" if size == 1 else f"{size} ranks"
        copies = groups.current().replicas
        where = where if copies is None else f"{copies.world_size} times {where}"
        files = "1 file" if checkpoint.n_shards == 1 else f"{checkpoint.n_shards} files"
        integers = "" if self.scheme is None else f"{self.scheme.words()}, "
        return (
            f"loaded {shown(checkpoint.path)} ({show_count(n_unique_params(checkpoint.args))} parameters, {files}) "
            f"in {seconds:.1f} s: "
            f"{where} on {self.device.type}, {str(self.dtype).removeprefix('torch.')}, {integers}"
            f"{self.n_threads} thread{'' if self.n_threads == 1 else 's'} each"
        )


def model_or_bundled(ckpt_dir: str | None) -> str:
    """Return the checkpoint that was named, or the bundled one.

    Raises:
        UsageError: when neither was named nor is bundled.
    """
    if ckpt_dir is not None:
        return ckpt_dir
    if not BUNDLED_MODEL.is_dir():
        raise UsageError("--ckpt_dir must be given: the bundled model comes with the repository, not with the package")
    return str(BUNDLED_MODEL)


def open_model(
    ckpt_dir: str | Path,
    tokenizer_path: str | Path | None,
    options: RunOptions,
    model_parallel_size: int | None = None,
) -> Opened:
    """Open a checkpoint and its tokenizer, and choose how to compute.

    Args:
        ckpt_dir: anything that `open_checkpoint` reads.
        tokenizer_path: SentencePiece, tiktoken or `tokenizer.json`; None looks beside the weights, then one folder up.
        options: device, dtype and memory; "auto" is decided here.
        model_parallel_size: ranks that share the model; None for all that torchrun started.

    Raises:
        LlamaError: for files or options that cannot be used; call it in a `groups.phase`, since no rank is waited for.
    """
    device = choose_device(options.device)
    n_threads = set_threads(options.threads)
    checkpoint = open_checkpoint(ckpt_dir)
    args = checkpoint.args
    tokenizer = load_tokenizer(find_tokenizer(ckpt_dir, tokenizer_path))
    check_vocabulary(tokenizer, checkpoint)
    scheme = choose_scheme(options.quantization, checkpoint.scheme, shown(checkpoint.path))
    if scheme is not None and args.tied and scheme.embedding not in (None, scheme.output):
        notice("the embedding is the output layer, and is held as --quantize_output says, not --quantize_embedding")
    partition = cut_model(args, scheme, groups.model_size(model_parallel_size), options.tensor_split)
    dtype = choose_dtype(options.dtype, device, checkpoint.dtype, n_unique_params(args))
    check_offload(options.offload_layers, args.n_layers)
    return Opened(checkpoint, tokenizer, partition, device, dtype, n_threads, scheme, options)


def check_vocabulary(tokenizer: Tokenizer, checkpoint: Checkpoint) -> None:
    """Refuse a tokenizer of another model: an id that the model lacks would crash the run.

    Raises:
        TokenizerError: naming both sizes.
    """
    known, rows = tokenizer.n_words, checkpoint.args.vocab_size
    if known > rows:
        raise TokenizerError(
            f"the tokenizer has {known} tokens but the model only {rows}: it belongs to another model, "
            "name its own with --tokenizer_path"
        )
    if 2 * known < rows:
        raise TokenizerError(
            f"the tokenizer has {known} tokens and the model {rows}, more than padding explains: "
            "it belongs to another model, name its own with --tokenizer_path"
        )
    if known < rows:
        notice(f"the tokenizer has {known} tokens, the model {rows}: the {rows - known} ids beyond are never sampled")


def shown(path: Path) -> Path:
    """Return a path as a person would type it: relative to the current folder where it lies below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
