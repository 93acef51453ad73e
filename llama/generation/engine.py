"""Running prompts through the model: slots, prefill, and one decode step for all of them.

The unit is a slot. Every row of the running batch has its own position and length; rows that finish
leave, waiting prompts take their place, and the rows in use always fill the first slots, so a step
computes nothing for rows that are done.

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
from llama.generation.sampling import Batch, Sampling, chosen, sample
from llama.generation.steps import Compile, Steps
from llama.model import Transformer
from llama.parallel.vocab import log_probs_of

FinishReason = Literal["stop", "length"]

# Floats of one piece of logits when a whole prompt is scored.
MAX_SCORED_LOGITS = 16 << 20


@dataclass(frozen=True)
class Request:
    """One prompt and what is wanted of it.

    Args:
        index: place among the prompts of the call, by which events name it.
        prompt: token ids, at least one.
        max_new: tokens to generate at most.
        sampling: how they are chosen.
        stop_tokens: ids that end the text and are not part of it.
        score_prompt: whether the prompt's own log-probabilities are wanted.
        watch: told of each new token; True ends the text after it.
        noise_index: the prompt's part of the noise's key.
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
        token: a new token, or None when only the end is told.
        log_prob: of the token, natural logarithm.
        finish_reason: set on the prompt's last event.
        prompt_log_probs: of the prompt's tokens, the first 0.0; on the first event, when wanted.
    """

    index: int
    token: int | None = None
    log_prob: float = 0.0
    finish_reason: FinishReason | None = None
    prompt_log_probs: list[float] | None = None


@dataclass
class Stats:
    """Tokens and seconds of a run, prefill and decode apart."""

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
    """A decode step that was started; what it chose may not be known here yet.

    Args:
        rows: for which it was started.
        packed: what was chosen for them, on the device; see `sampling.chosen`.
    """

    rows: tuple[_Row, ...]
    packed: Tensor

    def tokens_of(self, rows: Sequence[_Row]) -> Tensor:
        """What was chosen for some of its rows, [B, 1] int64."""
        places = {id(row): place for place, row in enumerate(self.rows)}
        order = [places[id(row)] for row in rows]
        tokens = chosen(self.packed)[0].unsqueeze(1)
        return tokens if order == list(range(len(self.rows))) else tokens[order]


@dataclass
class Engine:
    """Runs requests on one model. Every rank runs the same requests and sees the same events.

    Args:
        model: this rank's shard.
        n_drawable: token ids from here on are padding and never chosen.
        prefix: keys and values of what stands before every prompt, such as a soft prompt: a full cache of
            one slot. Prompts take the positions behind it.
        compile: see `Steps`.
        look_ahead: whether the next step is started before the host has seen what the last one chose, so that a
            card never waits for the host; None for where there is a card. A row that turns out to have ended has
            then made one step too many, whose token is dropped.
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
        """Positions that stand before every prompt."""
        return 0 if self.prefix is None else self.prefix.length

    def run(self, requests: Sequence[Request], max_batch_size: int) -> Iterator[Event]:
        """Run all requests, at most `max_batch_size` at a time; events come as they happen."""
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
        """The next requests that are prefilled in one pass: few enough tokens, at least one request."""
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
        """Run the prompts of new rows, which stand in the slots from `first` on, and choose a token for each."""
        started = time.perf_counter()
        device = self.model.ranks.device
        prompts = [row.request.prompt for row in rows]
        n_tokens = max(map(len, prompts))
        # Padding stands to the right: it is written behind a row's end, where no query looks.
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
        """Log-probability of each next token: hidden [B, T, E], targets [B, T or T - 1] to the latter's shape."""
        ranks, cuts = self.model.ranks, self.model.partition.vocab
        hidden = hidden[:, : targets.shape[1]]
        # Every rank takes pieces of the same size, so that their reductions meet.
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
        """One token for every row."""
        started = time.perf_counter()
        step, self._ahead = self._ahead, None
        if step is None:
            tokens = torch.tensor([[row.token] for row in rows], device=self.model.ranks.device)
            step = self._start_step(rows, tokens, cache)
        # While prompts wait, rows that end make room for them first.
        if self.look_ahead and not more_come and all(row.n_new + 1 < row.request.max_new for row in rows):
            self._ahead = self._start_step(rows, step.tokens_of(rows), cache)
        found = zip(step.rows, _on_host(step.packed), strict=True)
        # A row may have ended after the step was started.
        events = [self._append_token(row, *pair) for row, pair in found if not row.finished]
        self.stats.decode_tokens += len(events)
        self.stats.decode_seconds += time.perf_counter() - started
        return events

    def _start_step(self, rows: Sequence[_Row], tokens: Tensor, cache: KVCache) -> _Step:
        """Run `tokens` [B, 1] of the rows and choose what follows; nothing waits for the result here."""
        positions = torch.tensor([[row.position] for row in rows], device=tokens.device)
        visible = 1 + max(row.position for row in rows)
        logits = self.steps.decode(tokens, positions, cache, visible)
        for row in rows:
            row.position += 1
        return _Step(tuple(rows), self._sample(rows, logits))

    def _choose(self, rows: list[_Row], hidden: Tensor) -> list[tuple[int, float]]:
        """The next token of each row and its log-probability, from hidden [B, E]."""
        return _on_host(self._sample(rows, self.model.logits(hidden)))

    def _sample(self, rows: Sequence[_Row], logits: Tensor) -> Tensor:
        """The next token of each row, from logits [B, V']: see `sampling.sample`."""
        ways = [(row.request.sampling, row.request.noise_index, row.position) for row in rows]
        batch = Batch.create(ways, logits.device)
        return sample(logits, batch, self.model.partition.vocab, self.n_drawable, self.model.ranks)

    def _append_token(self, row: _Row, token: int, log_prob: float) -> Event:
        """Give a row its new token; decide whether it ends there."""
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
    """Decode steps that are needed for so many slots, if no text ends early."""
    lengths = [max(0, request.max_new - 1) for request in requests]
    return max([0, *lengths, sum(lengths) // max(1, n_slots)])


def _on_host(packed: Tensor) -> list[tuple[int, float]]:
    """What was chosen for each row: token and log-probability."""
    tokens, log_probs = chosen(packed.cpu())
    return list(zip(tokens.tolist(), log_probs.tolist(), strict=True))


def _leave(rows: list[_Row], cache: KVCache) -> list[_Row]:
    """The rows that go on, in the first slots: the last ones move into the places of those that left."""
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
