"""The engine: continuous batching of prompts over the slots of a KV cache, with prefill and decode steps.

Every row of the running batch occupies a slot and has its own position and length. Rows that finish leave, and waiting
prompts get their slots. The rows in use always fill the first slots, so that a step computes nothing for finished rows.

Shape legend: B rows, T tokens, E dim, V' this rank's part of the vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from llama.cache import PREFILL_TOKENS, KVCache
from llama.errors import LlamaError
from llama.generation.sampling import Batch, Sampling, chosen, sample
from llama.generation.steps import Compile, Steps, choose_mode
from llama.model import Transformer
from llama.parallel.vocab import log_probs_of

FinishReason = Literal["stop", "length"]

# Logits [B, T, V'] that a rank holds at a time while a whole prompt is scored piece by piece.
MAX_SCORED_LOGITS = 16 << 20


@dataclass(frozen=True)
class Request:
    """One prompt and the options of its completion.

    Args:
        index: the prompt's place in the call, by which events name it.
        prompt: token ids, at least one.
        max_new: tokens to generate at most.
        sampling: the choice of tokens.
        stop_tokens: ids that end the text and are not part of it.
        score_prompt: whether to return the log-probabilities of the prompt's own tokens.
        watch: called with each new token; True ends the text after that token.
        noise_index: the prompt's part of the sampling noise's key.
    """

    index: int
    prompt: Sequence[int]
    max_new: int
    sampling: Sampling
    stop_tokens: frozenset[int] = frozenset()
    score_prompt: bool = False
    watch: Callable[[int], bool] | None = None
    noise_index: int = 0


@dataclass(frozen=True)
class Event:
    """Something that happened to one prompt.

    Args:
        index: the prompt.
        token: a new token; None on an event without one.
        log_prob: of the token, in nats.
        finish_reason: set on the prompt's last event.
        prompt_log_probs: of the prompt's tokens, in nats, 0.0 for the first; on the first event, where asked for.
    """

    index: int
    token: int | None = None
    log_prob: float = 0.0
    finish_reason: FinishReason | None = None
    prompt_log_probs: list[float] | None = None


@dataclass
class Stats:
    """Tokens and seconds of a run, of prefill and decode separately."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0


@dataclass
class _Row:
    """A prompt in a slot: `position` is where its newest token will be written."""

    request: Request
    position: int
    token: int
    n_new: int = 0
    finished: bool = False


@dataclass(frozen=True)
class _Step:
    """A decode step that was started; its tokens may not have reached the host yet.

    Args:
        rows: the rows that the step covers.
        packed: the chosen tokens, on the device; see `sampling.chosen`.
    """

    rows: tuple[_Row, ...]
    packed: Tensor

    def tokens_of(self, rows: Sequence[_Row]) -> Tensor:
        """Return the tokens chosen for some of the step's rows, [B, 1] int64."""
        places = {id(row): place for place, row in enumerate(self.rows)}
        order = [places[id(row)] for row in rows]
        tokens = chosen(self.packed)[0].unsqueeze(1)
        return tokens if order == list(range(len(self.rows))) else tokens[order]


@dataclass(frozen=True)
class EngineOptions:
    """Limits and compiling.

    Args:
        max_seq_len: tokens of prompt and completion together, at most.
        max_batch_size: prompts that run at a time, at most.
        compile: on, off, or auto for where it pays.

    Raises:
        LlamaError: for a limit that is no positive number, or another word for `compile`.
    """

    max_seq_len: int = 512
    max_batch_size: int = 32
    compile: str = "auto"

    def __post_init__(self) -> None:
        for name in ("max_seq_len", "max_batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise LlamaError(f"{name} must be a whole number above 0, is {value!r}")
        choose_mode(self.compile)


@dataclass
class Engine:
    """A runner of requests on one model. Every rank runs the same requests and sees the same events.

    Args:
        model: this rank's shard.
        n_drawable: token ids from here on are padding of the vocabulary and never chosen.
        prefix: keys and values that precede every prompt, such as a soft prompt's: a full cache of one slot. Prompts
            get the positions behind the prefix.
        compile: see `Steps`.
        look_ahead: whether to start the next step before the host has the last step's tokens, so that a card never
            waits for the host; None means on a card only. A row that has ended meanwhile has then run one step too
            many, whose token is dropped.
    """

    model: Transformer
    n_drawable: int
    prefix: KVCache | None = None
    compile: Compile = "off"
    look_ahead: bool | None = None
    stats: Stats = field(default_factory=Stats)

    def __post_init__(self) -> None:
        self.steps = Steps(self.model, self.compile)
        if self.look_ahead is None:
            self.look_ahead = self.model.ranks.device.type == "cuda"
        self._ahead: _Step | None = None

    @property
    def n_prefix(self) -> int:
        """Number of positions before every prompt."""
        return 0 if self.prefix is None else self.prefix.length

    def run(self, requests: Sequence[Request], max_batch_size: int) -> Iterator[Event]:
        """Run all requests, at most `max_batch_size` at a time, and yield events as they happen."""
        waiting = deque(requests)
        rows: list[_Row] = []
        n_slots = min(len(waiting), max_batch_size)
        length = max((len(r.prompt) + r.max_new for r in waiting), default=0)
        cache = self.model.new_cache(n_slots, self.n_prefix + length)
        if self.prefix is not None:
            cache.begin_with(self.prefix)
        self.steps.announce(_fewest_steps(waiting, n_slots))
        self._ahead = None
        while waiting or rows:
            if waiting and len(rows) < n_slots:
                admitted = self._next_group(waiting, n_slots - len(rows))
                new = [_Row(r, self.n_prefix + len(r.prompt), r.prompt[-1]) for r in admitted]
                rows += new
                yield from self._prefill(new, cache, len(rows) - len(new))
            else:
                yield from self._decode(rows, cache, more_come=bool(waiting))
            rows = _leave(rows, cache)

    def _next_group(self, waiting: deque[Request], n_free: int) -> list[Request]:
        """Remove and return the requests of the next prefill pass: at least one, within `PREFILL_TOKENS`."""
        group = [waiting.popleft()]
        longest = len(group[0].prompt)
        while waiting and len(group) < n_free:
            longest = max(longest, len(waiting[0].prompt))
            if longest * (len(group) + 1) > PREFILL_TOKENS:
                break
            group.append(waiting.popleft())
        return group

    @torch.inference_mode()
    def _prefill(self, rows: list[_Row], cache: KVCache, first: int) -> list[Event]:
        """Run the prompts of new rows, whose slots start at `first`, and choose each row's first token."""
        started = time.perf_counter()
        device = self.model.ranks.device
        prompts = [row.request.prompt for row in rows]
        n_tokens = max(map(len, prompts))
        # Padding is on the right: its entries lie behind a row's end, where no query sees them.
        padded = [[*prompt, *[0] * (n_tokens - len(prompt))] for prompt in prompts]
        tokens = torch.tensor(padded, device=device)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        hidden = torch.empty(len(rows), self.model.args.dim, device=device, dtype=self.model.norm.weight.dtype)
        scores: list[Tensor] = []
        wants_scores = any(row.request.score_prompt for row in rows)
        for start in range(0, n_tokens, PREFILL_TOKENS):
            stop = min(start + PREFILL_TOKENS, n_tokens)
            begin, end = self.n_prefix + start, self.n_prefix + stop
            positions = torch.arange(begin, end, device=device).expand(len(rows), -1)
            chunk = self.steps.fill(tokens[:, start:stop], positions, cache, first, end, fresh=begin == 0)
            inside = (last >= start) & (last < stop)
            at = (last - start).clamp(0, stop - start - 1)
            hidden = torch.where(inside.unsqueeze(-1), chunk[torch.arange(len(rows), device=device), at], hidden)
            if wants_scores:
                scores.append(self._score(chunk, tokens[:, start + 1 : stop + 1]))
        prompt_log_probs = torch.cat(scores, dim=1).tolist() if wants_scores else None
        chosen = self._choose(rows, hidden) if any(row.request.max_new for row in rows) else None
        self.stats.prefill_tokens += sum(map(len, prompts))
        self.stats.prefill_seconds += time.perf_counter() - started
        return self._first_events(rows, chosen, prompt_log_probs)

    def _first_events(
        self, rows: list[_Row], chosen: list[tuple[int, float]] | None, scores: list[list[float]] | None
    ) -> list[Event]:
        events = []
        for number, row in enumerate(rows):
            request = row.request
            if request.score_prompt and scores is not None:
                own = [0.0, *scores[number][: len(request.prompt) - 1]]
                events.append(Event(request.index, prompt_log_probs=own))
            if not request.max_new or chosen is None:
                row.finished = True
                events.append(Event(request.index, finish_reason="length"))
            else:
                events.append(self._append_token(row, *chosen[number]))
        return events

    def _score(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return each target's log-probability: hidden [B, T, E] and targets [B, T or T - 1] to targets' shape."""
        ranks, cuts = self.model.ranks, self.model.partition.vocab
        hidden = hidden[:, : targets.shape[1]]
        # Pieces have the same size on every rank, so that the ranks make the same collective calls.
        step = max(1, MAX_SCORED_LOGITS // (hidden.shape[0] * max(len(cut) for cut in cuts)))
        scores = [
            log_probs_of(
                self.model.logits(hidden[:, at : at + step]),
                targets[:, at : at + step],
                cuts[ranks.rank],
                ranks,
            )
            for at in range(0, targets.shape[1], step)
        ]
        return torch.cat(scores, dim=1) if scores else torch.empty(targets.shape, device=hidden.device)

    @torch.inference_mode()
    def _decode(self, rows: list[_Row], cache: KVCache, more_come: bool) -> list[Event]:
        """Generate one token for every row."""
        started = time.perf_counter()
        step, self._ahead = self._ahead, None
        if step is None:
            tokens = torch.tensor([[row.token] for row in rows], device=self.model.ranks.device)
            step = self._start_step(rows, tokens, cache)
        # No look-ahead while prompts wait: they get the slots of rows that end in this step.
        if self.look_ahead and not more_come and all(row.n_new + 1 < row.request.max_new for row in rows):
            self._ahead = self._start_step(rows, step.tokens_of(rows), cache)
        found = zip(step.rows, _on_host(step.packed), strict=True)
        # A row may have ended after the step was started.
        events = [self._append_token(row, *pair) for row, pair in found if not row.finished]
        self.stats.decode_tokens += len(events)
        self.stats.decode_seconds += time.perf_counter() - started
        return events

    def _start_step(self, rows: Sequence[_Row], tokens: Tensor, cache: KVCache) -> _Step:
        """Run `tokens` [B, 1] of the rows and choose the next ones, without waiting for the result."""
        positions = torch.tensor([[row.position] for row in rows], device=tokens.device)
        visible = 1 + max(row.position for row in rows)
        logits = self.steps.decode(tokens, positions, cache, visible)
        for row in rows:
            row.position += 1
        return _Step(tuple(rows), self._sample(rows, logits))

    def _choose(self, rows: list[_Row], hidden: Tensor) -> list[tuple[int, float]]:
        """Return the next token of each row and its log-probability, from hidden [B, E]."""
        return _on_host(self._sample(rows, self.model.logits(hidden)))

    def _sample(self, rows: Sequence[_Row], logits: Tensor) -> Tensor:
        """Choose the next token of each row, from logits [B, V']; see `sampling.sample`."""
        ways = [(row.request.sampling, row.request.noise_index, row.position) for row in rows]
        batch = Batch.create(ways, logits.device)
        return sample(logits, batch, self.model.partition.vocab, self.n_drawable, self.model.ranks)

    def _append_token(self, row: _Row, token: int, log_prob: float) -> Event:
        """Append a new token to a row, decide whether the row ends, and return the event."""
        request = row.request
        if token in request.stop_tokens:
            row.finished = True
            return Event(request.index, finish_reason="stop")
        row.token, row.n_new = token, row.n_new + 1
        reason: FinishReason | None = None
        if request.watch is not None and request.watch(token):
            reason = "stop"
        elif row.n_new == request.max_new:
            reason = "length"
        row.finished = reason is not None
        return Event(request.index, token, log_prob, reason)


def _fewest_steps(requests: Sequence[Request], n_slots: int) -> int:
    """Return the least number of decode steps for the requests on `n_slots` slots, if no text ends early."""
    lengths = [max(0, request.max_new - 1) for request in requests]
    return max([0, *lengths, sum(lengths) // max(1, n_slots)])


def _on_host(packed: Tensor) -> list[tuple[int, float]]:
    """Return each row's chosen token and its log-probability."""
    tokens, log_probs = chosen(packed.cpu())
    return list(zip(tokens.tolist(), log_probs.tolist(), strict=True))


def _leave(rows: list[_Row], cache: KVCache) -> list[_Row]:
    """Remove finished rows, and move the last rows into their slots; return the rows that go on."""
    slot = 0
    while slot < len(rows):
        if not rows[slot].finished:
            slot += 1
            continue
        last = rows.pop()
        if slot < len(rows):
            if not last.finished:
                cache.move(len(rows), slot, last.position)
            rows[slot] = last
    return rows
