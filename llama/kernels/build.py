"""The build of this folder's C++ kernels, once for each machine, and their loading.

The library lies in a cache folder, under a hash of the sources, the compiler's flags, torch and the processor. The
kernels are optional: where no compiler is found, everything runs in plain torch.
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
# Sums may be reordered; quotients stay exact, and infinities and NaN are kept.
ANY_ORDER = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno")
WIDE = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
FLAGS = ("-O3", "-march=native", *WIDE, "-fopenmp", *ANY_ORDER, "-std=c++20", "-shared", "-fPIC")


def cache_folder() -> Path:
    """Return the folder of built libraries: $LLAMA_SHARDS_CACHE, else a folder in the user's cache."""
    own = os.environ.get("LLAMA_SHARDS_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama-shards"


def compiler() -> str | None:
    """Return the path of the C++ compiler: $CXX, else g++, clang++ or c++; None where there is none."""
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def can_build() -> bool:
    """Return whether this machine can build the kernels."""
    return platform.system() != "Windows" and compiler() is not None


@cache
def load_kernels() -> bool:
    """Load the kernels, and build them first where that was not done yet; return whether they are loaded.

    Where they cannot be built, one line on stderr says why.
    """
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
    """Hold a lock file: the first of several ranks compiles, and the others wait for the library."""
    import fcntl  # not on Windows

    with path.open("w") as file:
        with contextlib.suppress(OSError):  # a network file system may have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(command: list[str], target: Path) -> None:
    """Compile into a temporary folder, then rename, so that nobody finds half a library."""
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
    """Return a text that tells processors apart, since -march=native compiles for this machine's own."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.processor()} {sysconfig.get_platform()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
