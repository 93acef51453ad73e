"""The engine's forward passes, eager or compiled: a chunk of prompts, and one token for every row.

A compiled decode step is one graph: embedding, blocks, collectives, output layer. On a CPU the numbers of rows and
entries and the cache's own sizes are dynamic, so that one graph serves every request; on CUDA the entries come in few
sizes, each of which is a CUDA graph.

Shape legend: B rows, T tokens, S entries seen, E dim, V' this rank's part of the vocabulary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor

from llama.cache import CacheView, KVCache
from llama.env import notice
from llama.errors import UsageError
from llama.kernels.build import compiler
from llama.model import Transformer

Compile = Literal["auto", "on", "off"]
MODES = ("auto", "on", "off")
# Seconds that compiling a decode step costs, and that each compiled step then saves: measured as docs/speed.md says;
# a card's saving is an estimate.
FIXED_COST, LAYER_COST = 5.0, 1.8
SAVED_PER_LAYER = {"cpu": 0.0004, "cuda": 0.0004}
# Sizes that CUDA graphs are made for.
ENTRY_STEP = 256


def choose_mode(compile: str, is_offloaded: bool = False) -> Compile:
    """Return the mode to run in: "off" with offloaded layers, which cannot be part of a graph.

    Raises:
        UsageError: for an unknown mode, or for "on" with offloaded layers.
    """
    if compile not in MODES:
        raise UsageError(f"compile {compile!r} is not one of {', '.join(MODES)}")
    if not is_offloaded:
        return cast(Compile, compile)
    if compile == "on":
        raise UsageError("--compile on and --offload_layers are given together: leave one out")
    return "off"


def cannot_compile(device: torch.device) -> str | None:
    """Return why torch.compile cannot work on this device; None where it can."""
    if device.type == "cpu":
        return None if compiler() else "there is no C++ compiler (install g++ or clang, or set CXX)"
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    return f"torch.compile is not used on {device.type}"


class Steps:
    """The model's forward passes for the engine, compiled where asked for.

    Args:
        model: this rank's shard.
        mode: "on" compiles decode steps and prefill, "off" nothing; "auto" compiles decode steps once those made and
            those sure to come are so many that the time saved on all of them pays for compiling.

    Attributes:
        n_announced: decode steps made or sure to come so far.
        compiled: whether decode steps are compiled.
    """

    def __init__(self, model: Transformer, mode: Compile = "off") -> None:
        self.model, self.mode = model, choose_mode(mode)
        self.n_announced = 0
        self._decode: Callable[..., Tensor] = self._decode_step
        self._fill: Callable[..., Tensor] = self._fill_step
        self.compiled = self._announced = False
        if mode == "on":
            self._compile(prefill=True)

    def announce(self, n_steps: int) -> None:
        """Count decode steps that are sure to come; "auto" decides by their number."""
        self.n_announced += n_steps
        if self.mode == "auto" and not self.compiled and self._pays():
            self._compile(prefill=False)

    def _pays(self) -> bool:
        n_layers, device = self.model.args.n_layers, self.model.ranks.device
        saved = self.n_announced * n_layers * SAVED_PER_LAYER.get(device.type, 0.0)
        return saved > FIXED_COST + LAYER_COST * n_layers and cannot_compile(device) is None

    def _compile(self, prefill: bool) -> None:
        device = self.model.ranks.device
        reason = cannot_compile(device)
        if reason is not None:
            notice(f"running without torch.compile: {reason}")
            self.mode = "off"
            return
        options = {"triton.cudagraphs": True, "coordinate_descent_tuning": True} if device.type == "cuda" else {}
        self._decode = _Compiled(self._decode_step, options, self._announce)
        if prefill:
            self._fill = _Compiled(self._fill_step, {}, self._announce)
        self.compiled = True

    def _announce(self) -> None:
        """Say once that compiling takes its time."""
        if not self._announced:
            notice("compiling…")
            self._announced = True

    # -- passes ------------------------------------------------------------------------------------

    def fill(self, tokens: Tensor, positions: Tensor, cache: KVCache, first: int, visible: int, fresh: bool) -> Tensor:
        """Run a chunk of prompts: tokens and positions [B, T] to hidden [B, T, E]; see `KVCache.view`."""
        rows = cache.rows(first, first + tokens.shape[0])
        entries = torch.arange(visible, device=tokens.device)
        if self.compiled:
            _mark_dynamic((tokens, 0, 1), (positions, 0, 1), (entries, 0), *((t, 0, 2) for t in (*rows.k, *rows.v)))
        return self._fill(tokens, positions, entries, rows, fresh)

    def decode(self, tokens: Tensor, positions: Tensor, cache: KVCache, visible: int) -> Tensor:
        """Run one token of every row: tokens and positions [B, 1] to logits [B, V'] float32."""
        graphs = self.compiled and tokens.device.type == "cuda"
        if graphs:
            visible = min(cache.length, ENTRY_STEP * -(-visible // ENTRY_STEP))
        entries = torch.arange(visible, device=tokens.device)
        if graphs:
            for tensor in (*cache.k, *cache.v):
                torch._dynamo.mark_static_address(tensor)  # a CUDA graph always writes to the same addresses
        elif self.compiled:
            _mark_dynamic((tokens, 0), (positions, 0), (entries, 0), *((t, 0, 2) for t in (*cache.k, *cache.v)))
        return self._decode(tokens, positions, entries, cache)

    def _fill_step(self, tokens: Tensor, positions: Tensor, entries: Tensor, cache: KVCache, fresh: bool) -> Tensor:
        return self.model.hidden(tokens, positions=positions, cache=CacheView(cache, 0, entries, fresh))

    def _decode_step(self, tokens: Tensor, positions: Tensor, entries: Tensor, cache: KVCache) -> Tensor:
        hidden = self.model.hidden(tokens, positions=positions, cache=CacheView(cache, 0, entries, False))
        return self.model.logits(hidden[:, -1])


def _mark_dynamic(*inputs: Any) -> None:
    """Mark sizes that change from call to call, as (tensor, dimensions...)."""
    for tensor, *dims in inputs:
        for dim in dims:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)


class _Compiled:
    """A pass as one graph, compiled at its first call; run eagerly from then on if compiling fails."""

    def __init__(self, run: Callable[..., Tensor], options: dict[str, Any], announce: Callable[[], None]) -> None:
        self._plain, self._announce = run, announce
        self._run: Callable[..., Tensor] = torch.compile(run, fullgraph=True, options=options)

    def __call__(self, *args: Any) -> Tensor:
        self._announce()
        # Importing the compiler takes seconds: only here, where it is used.
        from torch._dynamo.exc import TorchDynamoException

        try:
            return self._run(*args)
        except TorchDynamoException as error:
            notice(f"running without torch.compile: {str(error).strip().splitlines()[0]}")
            self._run = self._plain
            return self._plain(*args)
