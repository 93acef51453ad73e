"""Sampling of the next token, on logits that are cut across ranks.

Each rank contributes its best candidates to one all-gather, and rank 0's choice is broadcast. The whole vocabulary is
gathered only when the candidates do not cover the nucleus.

The noise is a function of seed, prompt, position and token alone (the Gumbel-max trick with a counter instead of a
generator), so a seed gives the same text in any batch and at any world size.

Shape legend: B rows, V' this rank's part of the vocabulary, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.errors import LlamaError
from llama.noise import GOLDEN, mix, noise_key, shift_right
from llama.parallel.collectives import all_gather, broadcast
from llama.parallel.groups import Ranks

# Candidates per rank for a nucleus without top_k, in the first round and in the second.
NUCLEUS_CANDIDATES = (64, 1024)


@dataclass(frozen=True)
class Sampling:
    """Choice of tokens.

    Args:
        temperature: divides the logits; 0 is greedy.
        top_p: keep the most probable tokens until their probabilities sum to this (arXiv:1904.09751).
        top_k: keep this many tokens, before top_p.
        seed: of the sampling; the same text at any number of ranks.

    Raises:
        LlamaError: for a value out of range, named.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise LlamaError(f"temperature must be 0 (greedy) or a positive number, is {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise LlamaError(f"top_p must lie above 0 and at most at 1, is {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise LlamaError(f"top_k must be at least 1, is {self.top_k}; leave it out for no limit")

    @property
    def greedy(self) -> bool:
        """True where the most probable token is chosen, without noise."""
        return self.temperature == 0

    @property
    def restricted(self) -> bool:
        """True where only a part of the vocabulary may be drawn."""
        return not self.greedy and (self.top_p < 1 or self.top_k is not None)


@dataclass(frozen=True)
class Batch:
    """The sampling parameters of one step's rows, as tensors of [B] on the model's device."""

    temperature: Tensor  # 1 where greedy
    top_p: Tensor
    top_k: Tensor  # the largest integer where there is no limit
    noisy: Tensor  # whether the row draws, rather than being greedy
    restricted: Tensor
    keys: Tensor  # int64, of seed, prompt and position
    n_candidates: tuple[int | None, ...]  # candidates per rank in each round; None for the whole vocabulary
    all_greedy: bool
    any_free: bool  # whether a row may draw from the whole vocabulary

    @classmethod
    def create(cls, rows: Sequence[tuple[Sampling, int, int]], device: torch.device) -> Batch:
        """Return the batch of rows given as (sampling, prompt index, position of the token to choose)."""
        ways = [way for way, _, _ in rows]
        nucleus = any(way.restricted and way.top_k is None for way in ways)
        top_k = max((way.top_k for way in ways if way.restricted and way.top_k), default=1)
        counts: tuple[int | None, ...] = (top_k,)
        if nucleus:
            counts = (*(max(count, top_k) for count in NUCLEUS_CANDIDATES), None)
        return cls(
            temperature=_column([1.0 if way.greedy else way.temperature for way in ways], torch.float32, device),
            top_p=_column([way.top_p for way in ways], torch.float32, device),
            top_k=_column([way.top_k or 2**31 - 1 for way in ways], torch.int64, device),
            noisy=_column([not way.greedy for way in ways], torch.bool, device),
            restricted=_column([way.restricted for way in ways], torch.bool, device),
            keys=_column([noise_key(way.seed, index, at) for way, index, at in rows], torch.int64, device),
            n_candidates=counts,
            all_greedy=all(way.greedy for way in ways),
            any_free=any(not way.greedy and not way.restricted for way in ways),
        )


def _column(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


# -- noise -----------------------------------------------------------------------------------------


def gumbel(keys: Tensor, ids: Tensor) -> Tensor:
    """Return standard Gumbel noise of each token: keys [B], ids [B, C] or [C] int64 to [B, C] float32."""
    x = mix(keys.unsqueeze(-1) + ids * GOLDEN)
    # In (0, 1), with full relative precision near 0, where the largest noise comes from.
    uniform = (shift_right(x, 11).to(torch.float32) + 0.5) * 2.0**-53
    return -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24)))


# -- choosing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidates:
    """The best tokens of all ranks, best first: [B, C], and the softmax denominators: [B]."""

    scores: Tensor
    logits: Tensor
    ids: Tensor
    log_norm: Tensor  # of the raw logits
    log_norm_scaled: Tensor  # of the drawable logits over temperature


def chosen(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack `sample`'s result: tokens [B] int64 and their log-probabilities [B] float32 at temperature 1."""
    return packed[0].to(torch.int64), packed[1].view(torch.float32)


def sample(logits: Tensor, batch: Batch, cuts: Sequence[range], n_drawable: int, ranks: Ranks) -> Tensor:
    """Choose one token per row.

    Args:
        logits: [B, V'] float32, this rank's part.
        batch: the rows' sampling parameters.
        cuts: ids of every rank's part.
        n_drawable: ids from here on are padding of the vocabulary and never chosen.
        ranks: the ranks that share the model.

    Returns:
        Tokens and log-probabilities for `chosen` to unpack, [2, B] int32, the same on every rank: one tensor, so that
        one transfer brings both to the host.
    """
    own = cuts[ranks.rank]
    ids = torch.arange(own.start, own.stop, device=logits.device)
    drawable = logits if n_drawable >= own.stop else logits.masked_fill(ids >= n_drawable, -torch.inf)
    if batch.all_greedy:
        norm = logits.logsumexp(-1)
        found = _gather_candidates(drawable, drawable, ids, torch.stack((norm, norm)), 1, 1, ranks)
        return _from_rank_0(found.ids[:, 0], found.logits[:, 0] - found.log_norm, ranks)
    scaled = drawable / batch.temperature.unsqueeze(-1)
    norms = torch.stack((logits, scaled)).logsumexp(-1)  # [2, B]
    # Unrestricted rows get their noise here; restricted rows get theirs in `_choose`, among their candidates.
    free = (batch.noisy & ~batch.restricted).unsqueeze(-1)
    scores = torch.where(free, scaled + gumbel(batch.keys, ids), scaled) if batch.any_free else scaled
    widest = max(len(cut) for cut in cuts)
    for count in batch.n_candidates:
        found = _gather_candidates(scores, drawable, ids, norms, count or widest, widest, ranks)
        best, covered = _choose(found, batch)
        if count is None or count >= widest or bool(covered.all()):
            break
    picked = best.unsqueeze(-1)
    tokens = found.ids.gather(-1, picked).squeeze(-1)
    log_probs = found.logits.gather(-1, picked).squeeze(-1) - found.log_norm
    return _from_rank_0(tokens, log_probs, ranks)


def _gather_candidates(
    scores: Tensor, logits: Tensor, ids: Tensor, norms: Tensor, count: int, widest: int, ranks: Ranks
) -> Candidates:
    """Return the best `count` tokens over all ranks, and the softmax denominators, by one all-gather.

    A `count` of `widest`, the largest part of the vocabulary that a rank holds, returns all tokens.
    """
    count = min(count, widest)
    # `max` is several times faster than `topk`.
    best, at = scores.max(-1, keepdim=True) if count == 1 else scores.topk(min(count, scores.shape[-1]))
    columns = torch.stack((best, logits.gather(-1, at), ids[at].to(torch.int32).view(torch.float32)))
    columns = torch.nn.functional.pad(columns, (0, count - columns.shape[-1]), value=-torch.inf)
    packed = torch.cat((columns.permute(1, 0, 2).flatten(1), norms.T), dim=-1)  # [B, 3 C + 2]
    gathered = all_gather(packed, ranks)  # [ranks, B, 3 C + 2]
    log_norm, log_norm_scaled = gathered[..., -2:].logsumexp(0).unbind(-1)
    best, raw, bits = gathered[..., :-2].unflatten(-1, (3, count)).permute(2, 1, 0, 3).flatten(2)
    best, order = best.sort(dim=-1, descending=True, stable=True)
    if count < widest:
        # Behind the first `count`, a rank may hold better tokens that are not among the candidates.
        best, order = best[:, :count], order[:, :count]
    tokens = bits.gather(-1, order).contiguous().view(torch.int32).to(torch.int64)
    return Candidates(best, raw.gather(-1, order), tokens, log_norm, log_norm_scaled)


def _choose(found: Candidates, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the index of each row's choice among its candidates, and whether they cover all it may draw: both [B]."""
    probs = (found.scores - found.log_norm_scaled.unsqueeze(-1)).exp()
    rank = torch.arange(probs.shape[-1], device=probs.device)
    in_top_k = rank < batch.top_k.unsqueeze(-1)
    # top_p is a fraction of the probability that top_k leaves.
    limited = (batch.top_k < 2**31 - 1).unsqueeze(-1)
    probs = torch.where(limited, probs * in_top_k / (probs * in_top_k).sum(-1, keepdim=True), probs)
    before = probs.cumsum(-1) - probs
    kept = in_top_k & (before <= batch.top_p.unsqueeze(-1))
    noise = gumbel(batch.keys, found.ids)
    perturbed = torch.where(kept & found.scores.isfinite(), found.scores + noise, -torch.inf)
    restricted = batch.restricted
    chosen = torch.where(restricted, perturbed.argmax(-1), torch.zeros_like(rank[0]))
    total = (before + probs)[:, -1]
    covered = ~restricted | limited.squeeze(-1) | (total > batch.top_p) | (batch.top_p >= 1)
    return chosen, covered


def _from_rank_0(tokens: Tensor, log_probs: Tensor, ranks: Ranks) -> Tensor:
    """Return rank 0's choice on every rank: cards of different models may round differently."""
    return broadcast(torch.stack((tokens.to(torch.int32), log_probs.contiguous().view(torch.int32))), ranks)
