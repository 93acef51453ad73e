"""Will it fit? What each rank needs beside what is there: `python scripts/plan.py --ckpt_dir ckpts/7B --nproc 2`.

python scripts/plan.py --model llama-2-70b --nproc 4 --dtype fp16 --memory 8GB,8GB,24GB,24GB
python scripts/plan.py --model llama-2-7b --nproc 4 --dtype bf16 --memory 8GB --train lora --lora_r 8
python scripts/plan.py --model llama-3-8b --device cuda --memory 6GB --quantize int4 --offload_layers 12
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.source import open_checkpoint
from llama.checkpoint.table import n_unique_params
from llama.cli import run
from llama.config import ModelArgs, geometry
from llama.device import DTYPES, choose_device, choose_dtype
from llama.errors import LlamaError, UsageError
from llama.finetuning.settings import METHODS, TrainSettings, workload
from llama.plan.advice import NAMES, Plan, Planner, Setting, change, command, show_bytes, table
from llama.plan.inference import Workload
from llama.plan.memory import given_memory, machine_memory
from llama.quantization.scheme import Asked, Scheme, settle


def described(ckpt_dir: str | None, model: str | None) -> tuple[ModelArgs, torch.dtype, Scheme | None, str]:
    """The geometry, the dtype of its files (Meta's, for a name alone), how they hold integers, and its name.

    Of a checkpoint only headers are read.

    Raises:
        LlamaError: unless one of the two is given.
    """
    if (ckpt_dir is None) == (model is None):
        raise LlamaError("give either --ckpt_dir or --model, such as --model llama-2-7b")
    if model is not None:
        return geometry(model), torch.bfloat16, None, model
    checkpoint = open_checkpoint(str(ckpt_dir))
    return checkpoint.args, checkpoint.dtype, checkpoint.scheme, str(ckpt_dir)


def planned_device(device: str, is_given: bool) -> torch.device:
    """The device; a card need not be here when its memory is given."""
    if device == "cuda" and is_given and not torch.cuda.is_available():
        return torch.device("cuda")
    return choose_device(device)


def planned_dtype(dtype: str, device: torch.device, stored: torch.dtype, n_params: int) -> torch.dtype:
    """As a run would choose it; a card that is not here may have either 16-bit type, of the same size."""
    if dtype == "auto" and device.type == "cuda" and not torch.cuda.is_available():
        return DTYPES["fp16"]
    return choose_dtype(dtype, device, stored, n_params)


def count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"


def heading(plan: Plan, name: str, args: ModelArgs) -> str:
    setting = plan.setting
    integers = "" if setting.scheme is None else f" ({setting.scheme.words()})"
    offloaded = f", {setting.offload_layers} layers offloaded" if setting.offload_layers else ""
    ranks = "1 rank" if setting.n_ranks == 1 else f"{setting.n_ranks} ranks"
    split = f" split {setting.tensor_split}" if setting.tensor_split else ""
    return (
        f"{name}: {count(n_unique_params(args))} parameters in {NAMES[setting.dtype]}{integers} on {ranks}{split}"
        f"{offloaded}, {setting.work.words()} at a time"
    )


def advice(planner: Planner, plan: Plan, ckpt_dir: str, dtype: str, device: str) -> str:
    """What would fit, as commands."""
    settings = planner.advise(plan.setting)
    if not settings:
        return (
            f"does not fit: {show_bytes(plan.excess(plan.worst()))} are lacking on {plan.worst().name}, "
            "and neither fewer bits, more ranks, another split, a smaller batch nor a shorter length would mend it"
        )
    lines = ["does not fit; these would:"]
    for setting in settings:
        lines.append(f"  {change(setting, plan.setting)}:")
        wanted = dtype if setting.dtype == plan.setting.dtype else NAMES[setting.dtype]
        lines.append(f"    {command(setting, ckpt_dir, wanted, device, planner.stored)}")
    return "\n".join(lines)


FOR_METHOD = {"prompt": ("num_virtual_tokens",), "lora": ("lora_r", "lora_targets", "lora_dropout")}
FOR_TRAINING = ("batch_size", "activation_checkpointing")


def planned_work(train: str | None, max_seq_len: int, max_batch_size: int | None, flags: dict[str, Any]) -> Workload:
    """What is run at a time: prompts, or with `train` the batch that the other flags describe.

    Args:
        train: "prompt", "lora" or None.
        max_seq_len: of prompt and completion together, or of an example.
        max_batch_size: prompts at a time; None where it was not given.
        flags: of a training run, by name; None or False where one was not given.

    Raises:
        UsageError: for a flag that has no meaning beside the others.
    """
    given = {name: value for name, value in flags.items() if value is not None and value is not False}
    if train is None:
        if given:
            raise UsageError(f"--{next(iter(given))} is of training: add --train prompt or --train lora")
        return Workload(32 if max_batch_size is None else max_batch_size, max_seq_len)
    if train not in METHODS:
        raise UsageError(f"--train takes {' or '.join(METHODS)}, not {train!r}")
    if max_batch_size is not None:
        raise UsageError("--max_batch_size is of generation: with --train, say --batch_size")
    for name in given:
        if name not in (*FOR_TRAINING, *FOR_METHOD[train]):
            other = next(method for method in METHODS if name in FOR_METHOD[method])
            raise UsageError(f"--{name} is of --train {other}, not of --train {train}")
    return workload(TrainSettings(method=train, max_seq_len=max_seq_len, **given))


def main(
    ckpt_dir: str | None = None,
    model: str | None = None,
    nproc: int = 1,
    max_seq_len: int = 512,
    max_batch_size: int | None = None,
    dtype: str = "auto",
    memory: str | None = None,
    tensor_split: str | None = None,
    device: str = "auto",
    train: str | None = None,
    batch_size: int | None = None,
    num_virtual_tokens: int | None = None,
    lora_r: int | None = None,
    lora_targets: str | None = None,
    lora_dropout: float | None = None,
    activation_checkpointing: bool = False,
    quantize: str | None = None,
    group_size: int | None = None,
    quantize_output: str | None = None,
    quantize_embedding: str | None = None,
    offload_layers: int = 0,
) -> None:
    """Say whether a model fits, before anything is loaded, and if not what would.

    Args:
        ckpt_dir: folder of the weights; only headers are read.
        model: a published model in place of files, such as llama-2-70b.
        nproc: ranks that share the model.
        max_seq_len: tokens of prompt and completion together, or of an example with --train, at most.
        max_batch_size: prompts that run at a time, at most; 32.
        dtype: auto, fp32, bf16 or fp16.
        memory: what each rank has, such as 8GB,8GB,24GB,24GB (1e9 bytes each), or one size for all; by default the
            cards or the main memory of this machine are asked.
        tensor_split: weights of the ranks, such as 3,1.
        device: auto, cpu or cuda; with memory given, cuda needs no card here.
        train: prompt or lora: plan for ft_main.py in place of example.py, with its flags and their defaults below.
        batch_size: examples that a copy of the model takes at a time; accumulating gradients takes no more memory.
        num_virtual_tokens: of the soft prompt.
        lora_r: rank of LoRA's updates.
        lora_targets: linears that LoRA updates, such as wq,wv or all.
        lora_dropout: probability with which LoRA leaves a feature out; above 0 it keeps more.
        activation_checkpointing: keep only what enters each layer and compute the rest again.
        quantize: hold the weights as int8 or int4; by default as the checkpoint holds them.
        group_size: weights that share a scale in int4: 32, 64 or 128; by default 32.
        quantize_output: int8, int4 or none, of the output layer; by default int8.
        quantize_embedding: int8, int4 or none, of an embedding that is not the output layer; by default none.
        offload_layers: layers that stay in main memory and are streamed to the card.
    """
    flags = {
        "batch_size": batch_size, "num_virtual_tokens": num_virtual_tokens, "lora_r": lora_r,
        "lora_targets": lora_targets, "lora_dropout": lora_dropout,
        "activation_checkpointing": activation_checkpointing,
    }  # fmt: skip
    for name, value in {"nproc": nproc, "max_seq_len": max_seq_len, "max_batch_size": max_batch_size}.items():
        if value is not None and value < 1:
            raise LlamaError(f"{name} must be a whole number above 0, is {value}")
    where = planned_device(device, memory is not None)
    there = given_memory(memory, nproc) if memory is not None else machine_memory(where, nproc - 1)
    # Cards that a person names may stand in another machine, of whose main memory nothing is known.
    host = machine_memory(torch.device("cpu")) if memory is None and where.type == "cuda" else None
    work = planned_work(train, max_seq_len, max_batch_size, flags)
    args, file_dtype, stored, name = described(ckpt_dir, model)
    asked = Asked(quantize, group_size, quantize_output, quantize_embedding)
    scheme = settle(asked, stored, Path(name))
    chosen = planned_dtype(dtype, where, file_dtype, n_unique_params(args))
    planner = Planner(args, where.type, there, host, stored)
    plan = planner.plan(Setting(nproc, work, chosen, tensor_split, scheme, offload_layers))
    print(heading(plan, name, args))
    print(table(plan))
    print("fits" if plan.fits() else advice(planner, plan, ckpt_dir or "DIR", dtype, device))


if __name__ == "__main__":
    run(main)
