"""llama.cpp as the judge of what we export: tools that several tests share."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama import Llama, load_tokenizer
from llama.checkpoint.source import open_checkpoint
from llama.export.gguf import export_gguf

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")

F32 = 0  # ggml's number of the type; llama.cpp's cache is float16 by default
NEAR_TIE = 1e-4
LINES = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Once upon a time there was a small bird that sang in the old garden; 12 and 123 are numbers.",
]


def toy_spm(folder: Path, **options: Any) -> Path:
    """A SentencePiece model with the settings of Llama 2's."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "model_type": "bpe"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 3), model_prefix=str(folder / "tokenizer"), num_threads=1,
        **{"vocab_size": 360, "byte_fallback": True, "minloglevel": 2, **settings, **options},
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    return folder


def quiet_export(folder: Path, output: Path, type_name: str = "f32", **options: Any) -> Path:
    return export_gguf(open_checkpoint(folder), load_tokenizer(folder), output, type_name, **options)


def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Open a file in llama.cpp, on the CPU, with a float32 cache and every position's logits."""
    models = []
    make_params = llama_cpp.llama_cpp.llama_model_default_params

    def plain_kernels() -> Any:
        # llama.cpp's kernels for AMX crash in some virtual machines, on any quantized model.
        params = make_params()
        params.use_extra_bufts = False
        return params

    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", plain_kernels)

    def open_one(path: Path, **options: Any) -> Any:
        settings = {"n_ctx": 256, "logits_all": True, "type_k": F32, "type_v": F32, "flash_attn": False}
        model = llama_cpp.Llama(
            str(path), n_threads=1, n_threads_batch=1, n_gpu_layers=0, verbose=False, **{**settings, **options}
        )
        models.append(model)
        return model

    yield open_one
    for model in models:
        model.close()


def their_greedy(model: Any, prompt: Sequence[int], most: int, n_words: int) -> tuple[list[int], list[float]]:
    """llama.cpp's most likely tokens, and by how much each beat the second."""
    model.reset()
    model.eval(prompt)
    tokens, gaps = [], []
    for _ in range(most):
        logits = model.scores[model.n_tokens - 1][:n_words]  # ours never samples padding
        second, first = np.partition(logits, -2)[-2:]
        tokens.append(int(logits.argmax()))
        gaps.append(float(first - second))
        model.eval([tokens[-1]])
    return tokens, gaps


def their_log_probs(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Log-probability of each token after the first."""
    model.reset()
    model.eval(tokens)
    scores = torch.from_numpy(np.array(model.scores[: len(tokens) - 1])).log_softmax(-1)
    return scores.gather(1, torch.tensor(tokens[1:]).unsqueeze(1)).squeeze(1)


def our_log_probs(llama: Llama, tokens: Sequence[int]) -> torch.Tensor:
    _, scores = llama.generate([tokens], max_gen_len=0, logprobs=True, echo=True)
    assert scores is not None
    return torch.tensor(scores[0][1:])


def assert_same_greedy(llama: Llama, model: Any, prompts: Sequence[Sequence[int]], most: int) -> None:
    """Token by token, up to our end of text or the first near tie, and of most prompts a good part."""
    ours, _ = llama.generate(prompts, max_gen_len=most, temperature=0)
    compared = 0
    for prompt, mine in zip(prompts, ours, strict=True):
        theirs, gaps = their_greedy(model, prompt, most, llama.tokenizer.n_words)
        clear = next((i for i, gap in enumerate(gaps) if gap < NEAR_TIE), most)
        assert mine[:clear] == theirs[: min(len(mine), clear)]
        if len(mine) < clear:
            assert theirs[len(mine)] in llama.tokenizer.stop_tokens
        compared += min(len(mine), clear)
    assert compared >= len(prompts) * most // 4
