"""Build `cpu.cpp` once for this machine, and load it; a machine without a C++ compiler goes on without.

The library lies in a cache folder under a name that follows from the source, the compiler's flags, torch
and the processor. Nothing here is needed: everything has a way in plain torch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

import torch

from llama.console import notice

SOURCE = Path(__file__).with_name("cpu.cpp")
# Sums may be taken in any order; quotients are exact, and infinities and NaN stay what they are.
ANY_ORDER = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno")
FLAGS = ("-O3", "-march=native", "-fopenmp", *ANY_ORDER, "-std=c++20", "-shared", "-fPIC")


def cache_folder() -> Path:
    """Where built libraries lie: $LLAMA_SHARDS_CACHE, else a folder of the user's cache."""
    own = os.environ.get("LLAMA_SHARDS_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama-shards"


def compiler() -> str | None:
    """The C++ compiler of this machine: $CXX, else what is usual; None where there is none."""
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def can_build() -> bool:
    """Whether this machine has what it takes to build the kernels."""
    return platform.system() != "Windows" and compiler() is not None


@cache
def load_kernels() -> bool:
    """Whether the kernels are there, built now if they were not; says in one line why they are not."""
    if platform.system() == "Windows":
        return False
    tool = compiler()
    if tool is None:
        notice("no C++ compiler found: decoding on the CPU goes on without its own kernels, slower")
        return False
    try:
        torch.ops.load_library(str(_built(tool)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        notice(f"the CPU kernels could not be built, decoding goes on without: {_first_line(reason)}")
        return False
    return True


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if "error" in line), text.strip().split("\n")[0])


def _built(tool: str) -> Path:
    command = [tool, *FLAGS, *_torch_flags()]
    key = hashlib.sha256("\n".join((SOURCE.read_text(), *command, torch.__version__, _processor())).encode())
    target = cache_folder() / f"cpu-{key.hexdigest()[:16]}.so"
    if target.exists():
        return target
    notice("compiling the CPU kernels, once for this machine…")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Several ranks may build at the same time: each its own file, and the last one renamed stays.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / "cpu.so"
        subprocess.run(
            [*command, str(SOURCE), "-o", str(made), *_libraries()], check=True, capture_output=True, text=True
        )
        made.replace(target)
    return target


def _root() -> Path:
    return Path(torch.__file__).parent


def _torch_flags() -> list[str]:
    include = _root() / "include"
    abi = int(torch.compiled_with_cxx11_abi())
    return [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]


def _libraries() -> list[str]:
    return [f"-L{_root() / 'lib'}", "-ltorch_cpu", "-lc10"]


def _processor() -> str:
    """What tells processors apart: -march=native means another one on each."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.processor()} {sysconfig.get_platform()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
