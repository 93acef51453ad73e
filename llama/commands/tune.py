"""Fine-tune a model on Alpaca records: `ft_main.py`, `llama-shards tune`."""

from __future__ import annotations

import hashlib
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llama import env
from llama.adapters.adapter import resolve_targets
from llama.adapters.lora import add_lora
from llama.checkpoint.source import Checkpoint
from llama.cli import run
from llama.data.batches import split_eval
from llama.data.examples import Encoded, Example, encode_records
from llama.data.records import digest, read_records
from llama.env import is_speaker, notice
from llama.errors import UsageError
from llama.finetuning.prompt_tuning import SoftPrompt, initial_embeddings
from llama.finetuning.run_folder import RunFolder
from llama.finetuning.settings import TrainSettings, workload
from llama.finetuning.step import Tuning
from llama.finetuning.trainer import Trainer, checkpoint_blocks, compile_blocks
from llama.flags import Given
from llama.model import Transformer
from llama.offload import offload_of
from llama.parallel import groups
from llama.quantization.scheme import Asked
from llama.runtime import BUNDLED_DATA, BUNDLED_MODEL, Opened, RunOptions, model_or_bundled, open_model, shown

# A soft prompt starts from the words that open Alpaca's template.
INIT_TEXT = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
LEARNING_RATES = {"prompt": 0.03, "lora": 0.0003}
# The bundled model is small and has read one kind of text: a prompt that starts from such a text learns fast.
BUNDLED = {
    "batch_size": 16,
    "num_epochs": 5.0,
    "warmup_steps": 20,
    "lr": 0.1,
    "init_text": "Below is an instruction. Answer it. Question: What is 12 + 30? Answer: 42",
}


def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    dataset: str | None = None,
    output_dir: str = "saved",
    resume: bool = False,
    tp: int | None = None,
    given: Given[TrainSettings] = Given(TrainSettings, {}),
    options: RunOptions = RunOptions(),
) -> None:
    """Fine-tune a Llama on Alpaca records, on any number of ranks; the result is an adapter that PEFT loads too.

    Args:
        ckpt_dir: folder of the frozen weights, in any layout; without it, the bundled model.
        tokenizer_path: its tokenizer; by default beside the weights or one folder up.
        dataset: Alpaca records: a .json, .jsonl or .parquet file, a folder, or a name on the Hub.
        output_dir: where checkpoints, logs and the adapter go.
        resume: go on with the run in output_dir from its last checkpoint, at any number of ranks.
        tp: ranks that share one model; the others hold copies and share the batch. By default all.
        dtype: auto, fp32, bf16 or fp16, of the frozen weights; what is trained is fp32.
        offload_layers: layers streamed from main memory, and computed again in the backward; see docs/offload.md.
    """
    started = time.perf_counter()
    with groups.phase("settings"):
        settings = _settings(given, is_bundled=ckpt_dir is None)
        _check_ranks(settings, tp)
        if settings.compile and options.offload_layers:
            raise UsageError("--compile and --offload_layers are given together: choose one")
        ckpt_dir, dataset = _sources(ckpt_dir, dataset)
        folder = RunFolder(Path(output_dir))
    with groups.phase("data"):
        opened = open_model(ckpt_dir, tokenizer_path, options, tp)
        _check_scaling(settings, opened)
        records = read_records(dataset)
        encoded = encode_records(
            records, opened.tokenizer, settings.template, settings.max_seq_len, settings.train_on_prompt
        )
        chosen, aside = split_eval(len(encoded.examples), settings.eval_fraction, settings.seed)
        description = _describe_run(settings, opened, digest(records))
        folder.check(description, resume)
    name = shown(Path(dataset)) if Path(dataset).is_absolute() else dataset
    notice(f"{name}: {encoded.report()}")
    with groups.phase("plan"):
        n_copies = env.world_size() // opened.partition.world_size
        opened.check_fit(workload(settings, n_copies, encoded.examples))
    ranks = groups.start(opened.device, tp)
    if opened.scheme is not None or ranks.world_size > 1:
        ranks = opened.prepare_kernels()  # the kernels widen integers and carry collectives between ranks
    with groups.phase("load"):
        model = opened.load(ranks)
    notice(opened.describe(time.perf_counter() - started))
    tuning = _tuning(settings, opened, model)
    if settings.activation_checkpointing:
        checkpoint_blocks(model)
    if settings.compile:
        compile_blocks(model)
    run = _trainer_class(settings)(
        model, tuning, settings, _of(encoded, chosen), _of(encoded, aside), folder, base_model=str(ckpt_dir)
    )
    with groups.phase("folder"):
        if is_speaker():
            folder.claim(description)
    if resume:
        _resume(run)
    run.run()
    _say_result(run, started, ckpt_dir, tokenizer_path, options)


def _settings(given: Given[TrainSettings], is_bundled: bool) -> TrainSettings:
    """Return the settings of the run, with the defaults that depend on others."""
    if "init_text" in given.values and given.values.get("init") == "random":
        raise UsageError("--init random and --init_text are given together: choose one")
    method = given.values.get("method", TrainSettings.method)
    defaults: dict[str, Any] = {"init_text": INIT_TEXT, "lr": LEARNING_RATES.get(method, TrainSettings.lr)}
    if is_bundled and method == "prompt":
        defaults |= BUNDLED
    return given.make(**defaults)


def _sources(ckpt_dir: str | None, dataset: str | None) -> tuple[str, str]:
    """Return the model and the records: both as given, or both bundled."""
    if (ckpt_dir is None) != (dataset is None):
        missing = "--dataset" if dataset is None else "--ckpt_dir"
        raise UsageError(f"{missing} must be given too; without both, the bundled model learns the bundled records")
    if ckpt_dir is None or dataset is None:
        return model_or_bundled(ckpt_dir), str(BUNDLED_DATA)
    return ckpt_dir, dataset


def _describe_run(settings: TrainSettings, opened: Opened, records: str) -> dict[str, Any]:
    """Return everything that must be the same for a run to be resumed."""
    args = opened.checkpoint.args
    return {
        **settings.decisive(),
        "dtype": str(opened.dtype).removeprefix("torch."),
        "data": records,
        "model": {"dim": args.dim, "n_layers": args.n_layers, "n_heads": args.n_heads, "vocab_size": args.vocab_size},
        "weights": _fingerprint(opened.checkpoint),
        "quantization": None if opened.scheme is None else opened.scheme.to_json(),
    }


def _fingerprint(checkpoint: Checkpoint) -> str:
    """Return a hash of a model's smallest tensor: it tells models of one geometry apart, in any layout."""
    tensor = checkpoint.tensors["norm.weight"]
    values = torch.empty(tensor.spec.shape)
    tensor.read_into(tuple(slice(0, size) for size in tensor.spec.shape), values)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]


def _of(encoded: Encoded, indices: Sequence[int]) -> list[Example]:
    return [encoded.examples[i] for i in indices]


def _tuning(settings: TrainSettings, opened: Opened, model: Transformer) -> Tuning:
    """Make the soft prompt or LoRA that will be trained, in its initial state; a collective call."""
    if settings.method == "lora":
        targets = resolve_targets(settings.lora_targets)
        return add_lora(
            model, settings.lora_r, settings.lora_alpha, targets, settings.lora_dropout, settings.use_rslora,
            settings.seed,
        )  # fmt: skip
    text = None if settings.init == "random" else settings.init_text
    start = initial_embeddings(model, opened.tokenizer, settings.num_virtual_tokens, text, settings.seed)
    return SoftPrompt(model, start, text)


def _check_ranks(settings: TrainSettings, tp: int | None) -> None:
    n_processes = env.world_size()
    size = n_processes if tp is None else tp
    if size < 1 or n_processes % size:
        raise UsageError(f"--tp {size} does not divide the {n_processes} processes: choose a number that does")
    if settings.trainer == "hf" and size < n_processes:
        raise UsageError(f"--trainer hf trains one copy of the model, not {n_processes // size}: leave --tp out")


def _check_scaling(settings: TrainSettings, opened: Opened) -> None:
    if settings.trainer == "hf" and opened.dtype == torch.float16:
        raise UsageError("--trainer hf has no loss scaling, which fp16 needs: use --dtype bf16 or fp32")


def _trainer_class(settings: TrainSettings) -> type[Trainer]:
    if settings.trainer == "native":
        return Trainer
    from llama.finetuning.hf_trainer import HfTrainer  # transformers takes seconds to import

    return HfTrainer


def _resume(run: Trainer) -> None:
    """Resume the run from its last checkpoint, if there is one."""
    steps = groups.broadcast_object(run.folder.checkpoints())
    if not steps:
        notice(f"{run.folder.path} holds no checkpoint yet: the run starts anew")
        return
    with groups.phase("resume"):
        run.restore(run.folder.load(steps[-1]))
    notice(f"going on from {run.folder.folder(steps[-1])}: {run.n_done} of {run.n_steps} steps are done")


def _say_result(run: Trainer, started: float, ckpt_dir: str, tokenizer_path: str | None, options: RunOptions) -> None:
    """Print where the adapter is, and the command to try it."""
    minutes, seconds = divmod(round(time.perf_counter() - started), 60)
    best = "" if run.best is None else f" of step {run.best[1]} (eval loss {run.best[0]:.4f})"
    where = shown(run.folder.path.resolve())
    words = [] if Path(ckpt_dir) == BUNDLED_MODEL else ["--ckpt_dir", ckpt_dir]
    words += ["--tuning_ckpt_path", str(where)]
    words += [] if tokenizer_path is None else ["--tokenizer_path", tokenizer_path]
    words += [] if run.settings.template == "alpaca" else ["--template", run.settings.template]
    words += options.quantization.words if isinstance(options.quantization, Asked) else []
    n = env.world_size()
    launcher = "python" if n == 1 else f"torchrun --nproc_per_node {n}"
    if is_speaker():
        offload = offload_of(run.model)
        if offload is not None:
            print(offload.words())
        print(
            f"done: {run.n_steps} steps in {minutes} min {seconds} s; the adapter{best} is in {where}; try it:\n"
            f"{launcher} example_ft.py {shlex.join(words)}"
        )


def start() -> None:
    """Run `main`."""
    run(main)
