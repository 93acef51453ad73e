"""Any Llama, any checkpoint layout, any number of ranks.

>>> from llama import Llama
>>> llama = Llama.build("ckpts/tiny")
>>> llama.text_completion(["3 + 4 ="], temperature=0)
"""

# ruff: noqa: E402

from llama import env

env.wait_briefly()  # OpenMP reads it when torch is loaded

from llama.chat import AlpacaFormat, Llama2Format, Llama3Format
from llama.config import ModelArgs, RopeScaling
from llama.errors import LlamaError
from llama.generation.llama import Llama, StreamedToken
from llama.model import Transformer
from llama.parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from llama.parallel.partition import Partition
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
    "StreamedToken",
    "Tokenizer",
    "Transformer",
    "VocabParallelEmbedding",
    "load_tokenizer",
]
