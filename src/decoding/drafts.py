"""Where draft tokens come from: a smaller model, or the text so far.

A draft has prefill(tokens [B, Q], graphed=False) and propose(state, spec_length, distribution),
which returns (draft_token_ids [B, K] int64, draft_probs [B, K, V] float32 or None for a one-hot
draft) without reading a tensor on the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch

from src.contract import PLACEHOLDER_TOKEN_ID, SamplerOutput
from src.decoding.cache import CachedModel

# Draws in forced_acceptance's table: a prime, so that no stride of offsets visits a part of it.
_FORCED = 65_537


class ModelDraft:
    """A causal LM drafting token by token from its own cache.

    draw: a sampler of the contract; with no draft tokens it draws from the probabilities it gets.
    """

    def __init__(self, cached: CachedModel, draw: Callable[..., SamplerOutput]):
        self.cached = cached
        self.draw = draw

    def prefill(self, tokens: torch.Tensor, *, graphed: bool = False) -> None:
        self.cached.prefill(tokens, graphed=graphed)

    def propose(self, state, spec_length: int, distribution):
        # After a full acceptance the last draft token is not in this cache yet. Two tokens in the
        # first step write it in every round, where a branch would need the host.
        query, ahead = state.newest, -1
        token_ids, probs = [], []
        for step in range(spec_length):
            logits = self.cached.forward(query, state.start, keep=1, ahead=ahead)
            if distribution.greedy:
                token = distribution.best(logits)[:, -1]
            else:
                q = distribution(logits)
                token = draw_tokens(self.draw, q, state.seeds, state.offsets[step])
                probs.append(q)
            token_ids.append(token)
            query, ahead = token[:, None], step + 1
        return torch.stack(token_ids, 1), torch.cat(probs, 1) if probs else None


class PromptLookupDraft:
    """Proposes what followed the newest tokens the last time they occurred in the row's text.

    The longest match wins, up to max_ngram tokens and at least min_ngram; then the one with more
    text behind it, then the latest. A row without a match drafts nothing (-1).
    Source: github.com/apoorvumang/prompt-lookup-decoding.
    """

    def __init__(self, max_ngram: int = 3, min_ngram: int = 1):
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(
                f"min_ngram is {min_ngram} and max_ngram {max_ngram}; wanted 1 <= min <= max"
            )
        self.max_ngram = max_ngram
        self.min_ngram = min_ngram

    def prefill(self, tokens: torch.Tensor, *, graphed: bool = False) -> None:
        pass

    def propose(self, state, spec_length: int, distribution):
        tokens, last = state.tokens, state.start[:, None]
        ends = torch.arange(tokens.shape[1], device=tokens.device)  # candidate ends of a match
        length = torch.zeros_like(tokens)
        matching = ends < last
        for back in range(self.max_ngram):
            wanted = tokens.gather(1, (last - back).clamp(min=0))
            # roll wraps around at the front; a match that long would start before the text
            matching = matching & (tokens.roll(back, 1) == wanted) & (ends >= back)
            length = length + matching
        follow = (last - ends).clamp(max=spec_length)
        score = (length * (spec_length + 1) + follow) * tokens.shape[1] + ends
        score = torch.where(length >= self.min_ngram, score, -1)
        best, end = score.max(1, keepdim=True)
        index = end + 1 + torch.arange(spec_length, device=tokens.device)
        found = (best >= 0) & (index <= last)
        draft = tokens.gather(1, torch.minimum(index, last))
        return torch.where(found, draft, PLACEHOLDER_TOKEN_ID), None


def draw_tokens(draw: Callable[..., SamplerOutput], probs, seeds, offsets) -> torch.Tensor:
    """[B] int64 tokens drawn from probs [B, 1, V], by uniform `offsets` of each row's stream.

    A sampler without draft tokens draws its bonus token, which is all that this needs.
    """
    nothing = torch.empty((len(probs), 0), dtype=torch.int64, device=probs.device)
    return draw(nothing, None, probs, seeds=seeds, offsets=offsets).token_ids[:, 0]


def forced_acceptance(sample: Callable[..., SamplerOutput], rate: float, device="cpu"):
    """`sample` with its acceptance replaced: each draft token is accepted with probability `rate`.

    For timing a pair whose weights are random: the sampler runs as it would, its verdict is not
    used. Needs seeds and offsets, on `device`. How many tokens are accepted comes from a table,
    which costs a round a few small kernels where drawing it anew would cost hundreds.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"acceptance rate is {rate}; wanted 0 to 1")
    uniforms = np.random.default_rng(0).random(_FORCED)
    with np.errstate(divide="ignore", invalid="ignore"):
        lengths = np.floor(np.log(uniforms) / np.log(rate)) if rate < 1 else np.full(_FORCED, 2**30)

    @functools.cache
    def table(spec_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens accepted, and where each emitted one comes from: draft token 0 to K - 1, K the
        one drawn, K + 1 none."""
        accepted = torch.from_numpy(np.minimum(lengths, spec_length).astype(np.int32))
        columns, last = torch.arange(spec_length + 1), accepted[:, None]
        source = columns.where(columns < last, spec_length + (columns > last).long())
        return accepted.to(device), source.to(device)

    def forced(draft_token_ids, draft_probs, target_probs, *, seeds, offsets):
        real = sample(draft_token_ids, draft_probs, target_probs, seeds=seeds, offsets=offsets)
        accepted, source = table(draft_token_ids.shape[1])
        at = torch.add(offsets, seeds, alpha=7919) % _FORCED
        drawn = real.token_ids.gather(1, real.num_accepted[:, None].long())
        none = torch.full_like(drawn, PLACEHOLDER_TOKEN_ID)
        every = torch.cat((draft_token_ids, drawn, none), 1)
        return SamplerOutput(every.gather(1, source[at]), accepted[at])

    return forced
