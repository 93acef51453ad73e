"""Any Llama, any checkpoint layout, any number of ranks.

>>> from llama import Llama
>>> llama = Llama.build("ckpts/tiny")
>>> llama.text_completion(["3 + 4 ="], temperature=0)

Public names are resolved when they are asked for (PEP 562): importing `llama` imports no torch.
"""

# ruff: noqa: E402

from llama import env

env.wait_briefly()  # OpenMP reads it when torch is loaded

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama.chat import AlpacaFormat, Llama2Format, Llama3Format
    from llama.config import ModelArgs, RopeScaling
    from llama.errors import LlamaError
    from llama.generation.llama import Llama, StreamedToken
    from llama.model import Transformer
    from llama.parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
    from llama.parallel.partition import Partition
    from llama.runtime import RunOptions
    from llama.tokenizer import Tokenizer, load_tokenizer

__version__ = "0.1.0"

__all__ = [
    "AlpacaFormat",
    "ColumnParallelLinear",
    "Llama",
    "Llama2Format",
    "Llama3Format",
    "LlamaError",
    "ModelArgs",
    "Partition",
    "RopeScaling",
    "RowParallelLinear",
    "RunOptions",
    "StreamedToken",
    "Tokenizer",
    "Transformer",
    "VocabParallelEmbedding",
    "load_tokenizer",
]

_MODULES = {
    "llama.chat": ("AlpacaFormat", "Llama2Format", "Llama3Format"),
    "llama.config": ("ModelArgs", "RopeScaling"),
    "llama.errors": ("LlamaError",),
    "llama.generation.llama": ("Llama", "StreamedToken"),
    "llama.model": ("Transformer",),
    "llama.parallel.layers": ("ColumnParallelLinear", "RowParallelLinear", "VocabParallelEmbedding"),
    "llama.parallel.partition": ("Partition",),
    "llama.runtime": ("RunOptions",),
    "llama.tokenizer": ("Tokenizer", "load_tokenizer"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'llama' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
