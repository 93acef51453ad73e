"""Engines that `inference.py` compares: ours, transformers' `generate` in two ways, and llama.cpp."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

import torch

from llama.device import DTYPES, choose_device
from llama.errors import LlamaError
from scripts.bench.llamacpp import LlamaCpp, Numbered
from scripts.bench.peers import Kind, Prompts, Setup, Timing, synchronize


class Ours:
    """Our engine, on any number of ranks."""

    def load(self, setup: Setup) -> None:
        """Open the checkpoint and read this rank's shard, quantized where the setup says so, as `Llama.build` does."""
        from llama.checkpoint.load import cut_model
        from llama.checkpoint.source import open_checkpoint
        from llama.generation.engine import Engine
        from llama.generation.steps import choose_mode
        from llama.parallel import groups
        from llama.runtime import Opened

        checkpoint, device, dtype = open_checkpoint(setup.folder), choose_device(setup.device), DTYPES[setup.dtype]
        vocab_size, mode = checkpoint.args.vocab_size, choose_mode(setup.compile)
        partition = cut_model(checkpoint.args, setup.scheme, setup.world_size, setup.tensor_split)
        opened = Opened(checkpoint, Numbered(vocab_size), partition, device, dtype, setup.threads, setup.scheme)
        ranks = groups.start(device)
        if mode != "off":
            ranks = opened.prepare_kernels()
        if not setup.share_memory:
            ranks = dataclasses.replace(ranks, segment=None)
        self.engine = Engine(opened.load(ranks), vocab_size, compile=mode)

    def run(self, prompts: Prompts, new_tokens: int) -> Timing:
        """Measure one run, as `Peer.run` says; making the cache counts as prefill."""
        from llama.generation.engine import Request, Stats
        from llama.generation.sampling import Sampling

        greedy = Sampling(temperature=0)
        requests = [Request(number, prompt, new_tokens + 1, greedy) for number, prompt in enumerate(prompts)]
        self.engine.stats = Stats()
        tokens: list[list[int]] = [[] for _ in prompts]
        started = time.perf_counter()
        for event in self.engine.run(requests, len(prompts)):
            if event.token is not None:
                tokens[event.index].append(event.token)
        seconds = time.perf_counter() - started
        decode = self.engine.stats.decode_seconds
        return Timing(seconds - decode, decode, tokens)


class HuggingFace:
    """transformers' `generate`, in one process."""

    def load(self, setup: Setup) -> None:
        """Read the weights with `from_pretrained`."""
        os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        try:
            import transformers
        except ImportError:
            raise LlamaError("the Hugging Face peer needs transformers: pip install -e '.[hf]'") from None
        transformers.utils.logging.disable_progress_bar()
        self.device = choose_device(setup.device)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            setup.folder, dtype=DTYPES[setup.dtype], local_files_only=True
        )
        self.model = model.to(self.device).eval()
        # Without end tokens as many tokens come as are asked for, and none is forbidden.
        self.model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)

    def run(self, prompts: Prompts, new_tokens: int) -> Timing:
        """Measure one run, as `Peer.run` says; prefill is the time of one new token, decode what more tokens add."""
        ids = torch.tensor(prompts, device=self.device)
        first, _ = self._generate(ids, 1, new_tokens + 1)
        whole, tokens = self._generate(ids, new_tokens + 1, new_tokens + 1)
        return Timing(first, whole - first, tokens)

    def _generate(self, ids: torch.Tensor, n_new: int, most_new: int) -> tuple[float, list[list[int]]]:
        extras = self._extras(ids.shape[0], ids.shape[1], most_new)
        synchronize(self.device)
        started = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), min_new_tokens=n_new, max_new_tokens=n_new, **extras
            )
        synchronize(self.device)
        return time.perf_counter() - started, out[:, ids.shape[1] :].tolist()

    def _extras(self, batch_size: int, n_prompt: int, most_new: int) -> dict[str, Any]:
        """Return further arguments of `generate`."""
        return {}


class HuggingFaceStatic(HuggingFace):
    """transformers' `generate` with a cache of fixed size, for which it compiles its decode step on a card."""

    cache: Any = None
    shape: tuple[int, int] | None = None

    @torch.inference_mode()
    def _extras(self, batch_size: int, n_prompt: int, most_new: int) -> dict[str, Any]:
        # One cache for all runs: for each new cache the step would be recorded again.
        if self.shape != (batch_size, n_prompt + most_new):
            from transformers import StaticCache

            self.shape = (batch_size, n_prompt + most_new)
            self.cache = StaticCache(config=self.model.config, max_cache_len=n_prompt + most_new)
        else:
            self.cache.reset()
        return {"past_key_values": self.cache}


PEERS = {
    "ours": Kind(Ours, "ours"),
    "ours_bf16": Kind(Ours, "ours bf16"),
    "ours_fp16": Kind(Ours, "ours fp16"),
    "ours_fp32": Kind(Ours, "ours fp32"),
    "ours_int8": Kind(Ours, "ours int8"),
    "ours_int4": Kind(Ours, "ours int4"),
    "hf": Kind(HuggingFace, "Hugging Face generate", "transformers"),
    "hf_static": Kind(HuggingFaceStatic, "HF, static cache", "transformers"),
    "llamacpp_bf16": Kind(LlamaCpp, "llama.cpp bf16", "llama-cpp-python"),
    "llamacpp_f16": Kind(LlamaCpp, "llama.cpp f16", "llama-cpp-python"),
    "llamacpp_f32": Kind(LlamaCpp, "llama.cpp f32", "llama-cpp-python"),
    "llamacpp_q8_0": Kind(LlamaCpp, "llama.cpp q8_0", "llama-cpp-python"),
    "llamacpp_q4_0": Kind(LlamaCpp, "llama.cpp q4_0", "llama-cpp-python"),
}
