"""What running and training have in common before they part: a checkpoint, its tokenizer, where and how to compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llama.checkpoint.load import cut_model, load_model
from llama.checkpoint.source import Checkpoint, open_checkpoint
from llama.device import choose_device, choose_dtype, set_threads
from llama.env import notice
from llama.errors import LlamaError, TokenizerError
from llama.kernels import products
from llama.model import Transformer
from llama.parallel import groups
from llama.parallel.groups import Ranks
from llama.parallel.partition import Partition
from llama.quantization.scheme import Asked, Scheme, settle
from llama.tokenizer import Tokenizer, find_tokenizer, load_tokenizer


@dataclass(frozen=True)
class Opened:
    """A model that is about to be loaded.

    Args:
        checkpoint, tokenizer: open, of one model.
        partition: its cut.
        device, dtype: where and how it is going to be computed.
        n_threads: CPU threads of this rank.
        scheme: which weights are held as integers; None for none.
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    partition: Partition
    device: torch.device
    dtype: torch.dtype
    n_threads: int
    scheme: Scheme | None = None

    def load(self, ranks: Ranks, offload_layers: int = 0) -> Transformer:
        """Read this rank's shard: see `load_model`."""
        return load_model(self.checkpoint, self.partition, ranks, self.dtype, self.scheme, offload_layers)

    def prepare_kernels(self) -> Ranks:
        """Build and load the CPU's own kernels where they gain more than building them takes: the ranks that use them.

        Every rank of the model makes this call, once the groups are started.
        """
        n_bytes = self.partition.rank_params(0) * self.dtype.itemsize
        pays = self.device.type == "cpu" and products.worth_building(n_bytes)
        if pays and products.serve(self.dtype, has_integers=self.scheme is not None):
            products.enable()
        return groups.share_memory(pays)

    def describe(self, seconds: float) -> str:
        """One line for a person: what was loaded in so many seconds, and where."""
        checkpoint, size = self.checkpoint, self.partition.world_size
        where = "1 process" if size == 1 else f"{size} ranks"
        copies = groups.current().replicas
        where = where if copies is None else f"{copies.world_size} times {where}"
        files = "1 file" if checkpoint.n_shards == 1 else f"{checkpoint.n_shards} files"
        integers = "" if self.scheme is None else f"{self.scheme.words()}, "
        return (
            f"loaded {shown(checkpoint.path)} ({_count(checkpoint.args.n_unique_params)} parameters, {files}) "
            f"in {seconds:.1f} s: "
            f"{where} on {self.device.type}, {str(self.dtype).removeprefix('torch.')}, {integers}"
            f"{self.n_threads} thread{'' if self.n_threads == 1 else 's'} each"
        )


def open_model(
    ckpt_dir: str | Path,
    tokenizer_path: str | Path | None = None,
    model_parallel_size: int | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    tensor_split: str | Sequence[float] | None = None,
    threads: int | None = None,
    quantize: Scheme | Asked | str | None = None,
) -> Opened:
    """Open a checkpoint and its tokenizer, and choose how to compute; arguments as in `Llama.build`.

    Raises:
        LlamaError: for anything that cannot be; no other rank is waited for, so call it in a `groups.phase`.
    """
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise LlamaError(f"threads must be a whole number above 0, is {threads!r}")
    chosen_device = choose_device(device)
    n_threads = set_threads(threads)
    checkpoint = open_checkpoint(ckpt_dir)
    tokenizer = load_tokenizer(find_tokenizer(ckpt_dir, tokenizer_path))
    check_vocabulary(tokenizer, checkpoint)
    scheme = settle(quantize, checkpoint.scheme, shown(checkpoint.path))
    if scheme is not None and checkpoint.args.tied and scheme.embedding not in (None, scheme.output):
        notice("the embedding is the output layer, and is held as --quantize_output says, not --quantize_embedding")
    partition = cut_model(checkpoint.args, scheme, groups.model_size(model_parallel_size), tensor_split)
    chosen_dtype = choose_dtype(dtype, chosen_device, checkpoint.dtype, checkpoint.args.n_unique_params)
    return Opened(checkpoint, tokenizer, partition, chosen_device, chosen_dtype, n_threads, scheme)


def check_vocabulary(tokenizer: Tokenizer, checkpoint: Checkpoint) -> None:
    """Whether a tokenizer can serve a model: ids that the model lacks would crash it, so it must not be larger.

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
    """A path as a person would type it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"
