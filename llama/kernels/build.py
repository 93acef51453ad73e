"""Build the C++ sources of this folder once for this machine, and load them; without a compiler it goes on without.

The library lies in a cache folder under a name that follows from the sources, the compiler's flags, torch
and the processor. Nothing here is needed: everything has a way in plain torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from llama.env import notice

SOURCE = Path(__file__).with_name("kernels.cpp")
# Sums may be taken in any order; quotients are exact, and infinities and NaN stay what they are.
ANY_ORDER = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno")
WIDE = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
FLAGS = ("-O3", "-march=native", *WIDE, "-fopenmp", *ANY_ORDER, "-std=c++20", "-shared", "-fPIC")


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
    sources = [path.read_text() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    key = hashlib.sha256("\n".join((*sources, *command, torch.__version__, _processor())).encode())
    target = cache_folder() / f"cpu-{key.hexdigest()[:16]}.so"
    if target.exists():
        return target
    notice("compiling the CPU kernels, once for this machine…")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.with_name("build.lock")):
        if not target.exists():
            _compile([*command, str(SOURCE)], target)
    return target


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time: the first of several ranks compiles, and the others wait for what it makes."""
    import fcntl  # not on Windows

    with path.open("w") as file:
        with contextlib.suppress(OSError):  # a folder of several machines may know no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(command: list[str], target: Path) -> None:
    """Beside its place, then renamed, so that nobody finds half a library."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        subprocess.run([*command, "-o", str(made), *_libraries()], check=True, capture_output=True, text=True)
        made.replace(target)


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
