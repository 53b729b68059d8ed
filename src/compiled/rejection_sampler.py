"""Rejection sampling in vectorized PyTorch: no Python loop over rows or positions, no host
synchronisation, and of each row's K+1 distributions only the one that is drawn from is reduced."""

from __future__ import annotations

import functools

import torch

from src.contract import MAX_WEIGHT, PLACEHOLDER_TOKEN_ID, SamplerOutput, validate
from src.randomness import row_uniforms


def rejection_sample(
    draft_token_ids: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    *,
    num_draft_tokens: torch.Tensor | None = None,
    uniforms: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> SamplerOutput:
    """Arguments, result, errors and source as in src.baseline.rejection_sampler."""
    return _checked(
        sample_probabilities,
        draft_token_ids,
        draft_probs,
        target_probs,
        num_draft_tokens,
        uniforms=uniforms,
        seeds=seeds,
        offsets=offsets,
        generator=generator,
    )


def rejection_sample_compiled(
    draft_token_ids: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    *,
    num_draft_tokens: torch.Tensor | None = None,
    uniforms: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> SamplerOutput:
    """rejection_sample with its arithmetic under torch.compile (checks and uniforms outside)."""
    return _checked(
        _compiled(),
        draft_token_ids,
        draft_probs,
        target_probs,
        num_draft_tokens,
        uniforms=uniforms,
        seeds=seeds,
        offsets=offsets,
        generator=generator,
    )


def _checked(
    sample, draft_token_ids, draft_probs, target_probs, num_draft_tokens, **randomness
) -> SamplerOutput:
    shape = validate(
        draft_token_ids,
        draft_probs,
        target_probs,
        num_draft_tokens=num_draft_tokens,
        **randomness,
    )
    u = row_uniforms(shape, target_probs.device, **randomness)
    return SamplerOutput(*sample(draft_token_ids, draft_probs, target_probs, num_draft_tokens, u))


@functools.cache
def _compiled():
    return torch.compile(sample_probabilities)


def sample_probabilities(
    draft_token_ids, draft_probs, target_probs, num_draft_tokens, uniforms, within=None
):
    """rejection_sample without its checks: token_ids and num_accepted. within: [B, K] bool, the
    predicate u * q < p where the caller knows it better than from rounded probabilities."""
    batch_size, spec_length = draft_token_ids.shape
    vocab_size = target_probs.shape[2]
    rows = torch.arange(batch_size, device=target_probs.device)
    columns = torch.arange(spec_length + 1, device=target_probs.device)
    ids = draft_token_ids.long()

    # A row's drafts end at num_draft_tokens or at its first -1, whichever comes first.
    present = ids != PLACEHOLDER_TOKEN_ID
    if num_draft_tokens is not None:
        present = present & (columns[:-1] < num_draft_tokens[:, None])
    lengths = present.long().cumprod(1).sum(1)

    in_vocab = (ids >= 0) & (ids < vocab_size)
    index = ids.clamp(0, vocab_size - 1)[..., None]
    if within is None:
        p_x = target_probs[:, :spec_length].gather(-1, index).squeeze(-1).double()
        # float64 makes u * q exact, so that p >= q > 0 is accepted even for denormals.
        threshold = uniforms[:, :spec_length].double()
        if draft_probs is not None:
            threshold = threshold * draft_probs.gather(-1, index).squeeze(-1).double()
        within = threshold < p_x
    accept = within & in_vocab & (columns[:-1] < lengths[:, None])
    num_accepted = accept.long().cumprod(1).sum(1)

    p = target_probs[rows, num_accepted].float()
    target = _weights(p)
    weights = target
    if spec_length:
        rejected_at = num_accepted.clamp(max=spec_length - 1)
        if draft_probs is not None:
            residual = _weights(p - draft_probs[rows, rejected_at].float())
        else:
            vocabulary = torch.arange(vocab_size, device=p.device)
            one_hot = vocabulary == ids.gather(1, rejected_at[:, None])
            residual = _weights(p - one_hot.float())
        use_residual = (num_accepted < lengths) & (residual > 0).any(-1)
        weights = torch.where(use_residual[:, None], residual, target)

    drawn = draw_weighted(weights, uniforms[:, spec_length])
    last = num_accepted[:, None]
    padded = torch.nn.functional.pad(ids, (0, 1), value=PLACEHOLDER_TOKEN_ID)
    token_ids = torch.where(columns < last, padded, PLACEHOLDER_TOKEN_ID)
    token_ids = torch.where(columns == last, drawn[:, None], token_ids)
    return token_ids.to(draft_token_ids.dtype), num_accepted.to(torch.int32)


def draw_weighted(weights, uniforms):
    """[B] int64 by inverse CDF from weights [B, V], uniforms [B]; 0 where nothing has weight."""
    # Edges only where there is weight: whatever a parallel scan rounds to, no other index is drawn.
    edges = torch.where(weights > 0, weights.double().cumsum(-1), 0.0)
    cutoff = uniforms.double() * edges.amax(-1)
    return (edges > cutoff[:, None]).to(torch.uint8).argmax(-1)


def _weights(values: torch.Tensor) -> torch.Tensor:
    # NaN weighs nothing, +inf MAX_WEIGHT; clamp alone would keep NaN.
    return torch.where(values > 0, values, 0.0).clamp(max=MAX_WEIGHT)
