"""Plans and proposals in words: tables, commands to type, and the differences between two proposals."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from llama.device import DTYPES
from llama.plan.memory import Pool
from llama.plan.needs import Plan, Proposal
from llama.quantization.scheme import Asked, Scheme
from llama.sizes import show_bytes

# Of DTYPES' several names for a dtype, the one that messages use.
NAMES = {DTYPES[name]: name for name in ("fp32", "bf16", "fp16")}


def table(plan: Plan) -> str:
    """Return one line a rank: its items, their sum, the memory there, and the verdict."""
    first = plan.ranks[0].items
    on_device, in_host = (tuple(item.name for item in first if item.in_host == where) for where in (False, True))
    rows = [["", *on_device, "total", "memory", *in_host, ""]]
    for rank in plan.ranks:
        own = [pool for pool in plan.pools if rank.rank in pool.ranks]
        device = max((pool for pool in own if not pool.is_host), key=plan.excess)
        shared = f" for {len(device.ranks)} ranks" if len(device.ranks) > 1 else ""
        sizes = {item.name: show_bytes(item.nbytes) for item in rank.items}
        there = [show_bytes(rank.total()), show_bytes(device.nbytes) + shared]
        rows.append(
            [f"rank {rank.rank}", *(sizes[name] for name in on_device), *there, *(sizes[name] for name in in_host),
             _verdict(plan, max(own, key=plan.excess))]
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)) for row in rows]
    return "\n".join(f"{line}  {row[-1]}".rstrip() for line, row in zip(lines, rows, strict=True))


def _verdict(plan: Plan, pool: Pool) -> str:
    excess = plan.excess(pool)
    return "fits" if excess <= 0 else f"lacks {show_bytes(excess)}{' of main memory' * pool.is_host}"


def too_much(plan: Plan, names: Sequence[str] | None = None) -> str:
    """Return the needs of the fullest pool beside its memory, in half a sentence.

    Args:
        plan: which does not fit.
        names: of the items that count; None for all.
    """
    pool = plan.worst(names)
    items = plan.ranks[pool.ranks[0]].items
    needs = [item for item in items if item.in_host == pool.is_host and (names is None or item.name in names)]
    who = f"rank {pool.ranks[0]} needs" if len(pool.ranks) == 1 else f"each of {len(pool.ranks)} ranks needs about"
    what = ", ".join(f"{show_bytes(item.nbytes)} for {item.name}" for item in needs)
    shared = " between them" if len(pool.ranks) > 1 else ""
    return f"{who} {what} ({plan.proposal.work.words()}), but {show_bytes(pool.nbytes)} are there{shared}"


def command(
    proposal: Proposal, ckpt_dir: str, dtype: str = "auto", device: str = "auto", stored: Scheme | None = None
) -> str:
    """Return the command line that runs a proposal.

    Args:
        proposal: the run.
        ckpt_dir, dtype, device: as a person would type them.
        stored: the checkpoint's own scheme, which needs no flag.
    """
    start = "python" if proposal.n_ranks == 1 else f"torchrun --nproc_per_node {proposal.n_ranks}"
    flags = {
        "ckpt_dir": shlex.quote(ckpt_dir),
        **proposal.work.flags(),
        "tensor_split": proposal.tensor_split,
        **(_integer_flags(proposal.scheme) if proposal.scheme != stored else {}),
        "offload_layers": proposal.offload_layers or None,
        "dtype": None if dtype == "auto" else dtype,
        "device": None if device == "auto" else device,
    }
    return " ".join([start, proposal.work.program, *(_flag(*flag) for flag in flags.items() if flag[1] is not None)])


def change(proposal: Proposal, wanted: Proposal) -> str:
    """Return the differences of a proposal from the wanted one in a few words: `4 ranks and --tensor_split 1,3`."""
    parts = []
    if proposal.n_ranks != wanted.n_ranks:
        parts.append(f"{proposal.n_ranks} ranks")
    if proposal.dtype != wanted.dtype:
        parts.append(f"--dtype {NAMES[proposal.dtype]}")
    former = wanted.work.flags()
    parts += [_flag(name, value) for name, value in proposal.work.flags().items() if value != former[name]]
    if proposal.scheme != wanted.scheme:
        flags = _integer_flags(proposal.scheme)
        parts.append(" ".join(_flag(*flag) for flag in flags.items() if flag[1] is not None))
    if proposal.offload_layers != wanted.offload_layers:
        parts.append(_flag("offload_layers", proposal.offload_layers))
    if proposal.tensor_split != wanted.tensor_split:
        parts.append(f"--tensor_split {proposal.tensor_split}" if proposal.tensor_split else "no --tensor_split")
    return " and ".join(parts)


def _integer_flags(scheme: Scheme | None) -> dict[str, object]:
    return {} if scheme is None else vars(Asked.of(scheme))


def _flag(name: str, value: object) -> str:
    return f"--{name}" if value is True else f"--{name} {value}"
