"""Memory that each rank needs beside the memory that it has: `python scripts/plan.py --ckpt_dir ckpts/7B --nproc 2`.

python scripts/plan.py --model llama-2-70b --nproc 4 --dtype fp16 --memory 8GB,8GB,24GB,24GB
python scripts/plan.py --model llama-2-7b --nproc 4 --dtype bf16 --memory 8GB --train lora --lora_r 8
python scripts/plan.py --model llama-3-8b --device cuda --memory 6GB --quantize int4 --offload_layers 12
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch

from llama.checkpoint.source import open_checkpoint
from llama.checkpoint.table import n_unique_params
from llama.cli import run
from llama.config import ModelArgs, geometry
from llama.device import DTYPES, choose_device, choose_dtype
from llama.errors import LlamaError, UsageError
from llama.finetuning.settings import METHODS, TrainSettings, workload
from llama.flags import Given, Only, Without
from llama.plan.advice import Planner
from llama.plan.inference import Workload
from llama.plan.memory import given_memory, machine_memory
from llama.plan.needs import Plan, Proposal
from llama.plan.words import NAMES, change, command, table
from llama.quantization.scheme import Scheme, choose_scheme
from llama.runtime import RunOptions
from llama.sizes import show_bytes, show_count


def described(ckpt_dir: str | None, model: str | None) -> tuple[ModelArgs, torch.dtype, Scheme | None, str]:
    """Return the geometry, the dtype of the files (Meta's, for a name alone), their scheme, and the model's name.

    Only a checkpoint's headers are read.

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
    """Return the device to plan for; "cuda" needs no card in this machine if its memory is given."""
    if device == "cuda" and is_given and not torch.cuda.is_available():
        return torch.device("cuda")
    return choose_device(device)


def planned_dtype(dtype: str, device: torch.device, stored: torch.dtype, n_params: int) -> torch.dtype:
    """Return the dtype that a run would choose; a card that this machine lacks computes in fp16."""
    if dtype == "auto" and device.type == "cuda" and not torch.cuda.is_available():
        return DTYPES["fp16"]
    return choose_dtype(dtype, device, stored, n_params)


def heading(plan: Plan, name: str, args: ModelArgs) -> str:
    """Return the line above the table: the model, its precision and what is planned."""
    proposal = plan.proposal
    integers = "" if proposal.scheme is None else f" ({proposal.scheme.words()})"
    offloaded = f", {proposal.offload_layers} layers offloaded" if proposal.offload_layers else ""
    ranks = "1 rank" if proposal.n_ranks == 1 else f"{proposal.n_ranks} ranks"
    split = f" split {proposal.tensor_split}" if proposal.tensor_split else ""
    return (
        f"{name}: {show_count(n_unique_params(args))} parameters in {NAMES[proposal.dtype]}{integers} on {ranks}{split}"
        f"{offloaded}, {proposal.work.words()} at a time"
    )


def advice(planner: Planner, plan: Plan, ckpt_dir: str, dtype: str, device: str) -> str:
    """Return commands of runs that would fit."""
    proposals = planner.advise(plan.proposal)
    if not proposals:
        return (
            f"does not fit: {show_bytes(plan.excess(plan.worst()))} are lacking on {plan.worst().name}, "
            "and neither fewer bits, more ranks, another split, a smaller batch nor a shorter length would mend it"
        )
    lines = ["does not fit; these would:"]
    for proposal in proposals:
        lines.append(f"  {change(proposal, plan.proposal)}:")
        wanted = dtype if proposal.dtype == plan.proposal.dtype else NAMES[proposal.dtype]
        lines.append(f"    {command(proposal, ckpt_dir, wanted, device, planner.stored)}")
    return "\n".join(lines)


FOR_METHOD = {"prompt": ("num_virtual_tokens",), "lora": ("lora_r", "lora_targets", "lora_dropout")}
FOR_TRAINING = ("batch_size", "activation_checkpointing")
FLAGS_OF_TRAINING = (*FOR_TRAINING, *FOR_METHOD["prompt"], *FOR_METHOD["lora"])


def planned_work(train: str | None, max_seq_len: int, max_batch_size: int | None, flags: Mapping[str, Any]) -> Workload:
    """Return the work of a run: prompts, or with `train` the batch that the other flags describe.

    Args:
        train: "prompt", "lora" or None.
        max_seq_len: tokens of prompt and completion together, or of an example.
        max_batch_size: prompts at a time; None where it was not given.
        flags: flags of a training run that were typed, by name.

    Raises:
        UsageError: for a flag that has no meaning beside the others.
    """
    given = {name: value for name, value in flags.items() if value is not False}
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
    memory: str | None = None,
    train: str | None = None,
    training: Annotated[Given[TrainSettings], Only(*FLAGS_OF_TRAINING)] = Given(TrainSettings, {}),
    options: Annotated[RunOptions, Without("threads", "no_plan")] = RunOptions(),
) -> None:
    """Say whether a model fits into memory, before anything is loaded, and if not, propose runs that would.

    Args:
        ckpt_dir: folder of the weights; only headers are read.
        model: a published model in place of files, such as llama-2-70b.
        nproc: ranks that share the model.
        max_seq_len: tokens of prompt and completion together, or of an example with --train, at most.
        max_batch_size: prompts that run at a time, at most; 32.
        memory: memory of each rank, such as 8GB,8GB,24GB,24GB (1e9 bytes each), or one size for all; by default the
            cards or the main memory of this machine are asked.
        train: prompt or lora: plan for ft_main.py in place of example.py, with its flags and their defaults below.
        device: auto, cpu, cuda, cuda:N or mps; with memory given, cuda needs no card here.
        batch_size: examples that a copy of the model takes at a time; accumulating gradients takes no more memory.
        lora_dropout: part of a linear's inputs left out of its update; above 0 it keeps more.
    """
    for name, value in {"nproc": nproc, "max_seq_len": max_seq_len, "max_batch_size": max_batch_size}.items():
        if value is not None and value < 1:
            raise LlamaError(f"{name} must be a whole number above 0, is {value}")
    where = planned_device(str(options.device), memory is not None)
    there = given_memory(memory, nproc) if memory is not None else machine_memory(where, nproc - 1)
    # Cards whose memory is given may be in another machine, whose main memory is unknown.
    host = machine_memory(torch.device("cpu")) if memory is None and where.type == "cuda" else None
    work = planned_work(train, max_seq_len, max_batch_size, training.values)
    args, file_dtype, stored, name = described(ckpt_dir, model)
    scheme = choose_scheme(options.quantization, stored, Path(name))
    chosen = planned_dtype(str(options.dtype), where, file_dtype, n_unique_params(args))
    planner = Planner(args, where.type, there, host, stored)
    split = None if options.tensor_split is None else str(options.tensor_split)
    plan = planner.plan(Proposal(nproc, work, chosen, split, scheme, options.offload_layers))
    print(heading(plan, name, args))
    print(table(plan))
    print("fits" if plan.fits() else advice(planner, plan, ckpt_dir or "DIR", str(options.dtype), str(options.device)))


def start() -> None:
    """Run `main`."""
    run(main)
