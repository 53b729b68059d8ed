"""Rejection sampling in vectorized PyTorch: no Python loop over rows or positions, no host
synchronisation, and of each row's K+1 distributions only the one that is drawn from is reduced."""

from __future__ import annotations

import functools

import torch

from src.contract import (
    MAX_WEIGHT,
    PLACEHOLDER_TOKEN_ID,
    SamplerOutput,
    validate,
    validate_verification,
)
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
    verification: str = "token",
) -> SamplerOutput:
    """Arguments, result, errors and source as in src.baseline.rejection_sampler.

    verification: "token", or "block" for Sun et al. 2024, arXiv:2403.10444, algorithm 2: never
    fewer tokens on average, with the same distribution.
    """
    return _checked(
        sample_probabilities,
        draft_token_ids,
        draft_probs,
        target_probs,
        num_draft_tokens,
        verification,
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
    verification: str = "token",
) -> SamplerOutput:
    """rejection_sample with its arithmetic under torch.compile (checks and uniforms outside)."""
    return _checked(
        _compiled(),
        draft_token_ids,
        draft_probs,
        target_probs,
        num_draft_tokens,
        verification,
        uniforms=uniforms,
        seeds=seeds,
        offsets=offsets,
        generator=generator,
    )


def _checked(
    sample, draft_token_ids, draft_probs, target_probs, num_draft_tokens, verification, **randomness
) -> SamplerOutput:
    validate_verification(verification)
    shape = validate(
        draft_token_ids,
        draft_probs,
        target_probs,
        num_draft_tokens=num_draft_tokens,
        **randomness,
    )
    u = row_uniforms(shape, target_probs.device, **randomness)
    arguments = (draft_token_ids, draft_probs, target_probs, num_draft_tokens, u, verification)
    return SamplerOutput(*sample(*arguments))


@functools.cache
def _compiled():
    return torch.compile(sample_probabilities)


def sample_probabilities(
    draft_token_ids,
    draft_probs,
    target_probs,
    num_draft_tokens,
    uniforms,
    verification="token",
    within=None,
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

    in_vocab = (ids >= 0) & (ids < vocab_size) & (columns[:-1] < lengths[:, None])
    index = ids.clamp(0, vocab_size - 1)[..., None]
    p_x = target_probs[:, :spec_length].gather(-1, index).squeeze(-1).double()
    q_x = torch.ones_like(p_x)
    if draft_probs is not None:
        q_x = draft_probs.gather(-1, index).squeeze(-1).double()
    scale = None
    if verification == "block":
        residuals = _draft_residuals(ids, draft_probs, target_probs)
        num_accepted, scale = _verify_block(p_x, q_x, in_vocab, lengths, residuals, uniforms)
    else:
        if within is None:
            # float64 makes u * q exact, so that p >= q > 0 is accepted even for denormals.
            within = uniforms[:, :spec_length].double() * q_x < p_x
        num_accepted = (within & in_vocab).long().cumprod(1).sum(1)

    p = target_probs[rows, num_accepted].float()
    target = _weights(p)
    weights = target
    if spec_length:
        rejected_at = num_accepted.clamp(max=spec_length - 1)
        if draft_probs is not None:
            q = draft_probs[rows, rejected_at].float()
        else:
            vocabulary = torch.arange(vocab_size, device=p.device)
            q = (vocabulary == ids.gather(1, rejected_at[:, None])).float()
        if scale is not None:
            p = p.double() * scale[:, None]
        residual = _weights(p - q).float()
        use_residual = (num_accepted < lengths) & (residual.amax(-1) > 0)
        weights = torch.where(use_residual[:, None], residual, target)
    # Under torch.compile the drawing is a graph of its own: fused with the rows' gathering, its
    # split scan over few long rows fails to compile in torch 2.11 (a no-op outside of compile).
    torch._dynamo.graph_break()
    drawn = draw_weighted(weights, uniforms[:, spec_length])

    last = num_accepted[:, None]
    padded = torch.nn.functional.pad(ids, (0, 1), value=PLACEHOLDER_TOKEN_ID)
    token_ids = torch.where(columns < last, padded, PLACEHOLDER_TOKEN_ID)
    token_ids = torch.where(columns == last, drawn[:, None], token_ids)
    return token_ids.to(draft_token_ids.dtype), num_accepted.to(torch.int32)


def _verify_block(p_x, q_x, in_vocab, lengths, residuals, uniforms):
    """oracle._verify_block for all rows: num_accepted [B], and reach at it [B] float64."""
    spec_length = p_x.shape[1]
    # log reach[i] = min(log reach[i - 1] + step, 0): a walk that is held at 0, which is the free
    # walk less its highest point so far.
    # A q that is not positive, NaN among them, lets the prefix through, as inf / inf does.
    ratios = torch.where(q_x > 0, p_x / q_x, torch.inf).nan_to_num(torch.inf).clamp(max=1e100)
    steps = torch.where(in_vocab & (p_x > 0), ratios.log(), -torch.inf)
    walk = torch.nn.functional.pad(steps.cumsum(1), (1, 0))
    reach = (walk - walk.cummax(1).values).exp()  # [B, K+1]
    left = residuals(reach)  # [B, K], of the prefixes of length 0 to K-1
    share = torch.where(reach[:, :-1] < 1, left / (left + 1 - reach[:, :-1]), 1.0)
    passes = torch.cat([share, reach[:, -1:]], dim=1)
    columns = torch.arange(spec_length + 1, device=p_x.device)
    passes = torch.where(columns == lengths[:, None], reach, passes)
    # A prefix that the target gives nothing never passes, even beside a residual of negative q.
    passes = torch.where(reach > 0, passes, 0.0)
    accepted = (uniforms[:, :spec_length] < passes[:, 1:]) & (columns[1:] <= lengths[:, None])
    num_accepted = (accepted * columns[1:]).amax(1) if spec_length else torch.zeros_like(lengths)
    return num_accepted, reach.gather(1, num_accepted[:, None]).squeeze(1)


def _draft_residuals(ids, draft_probs, target_probs):
    """A function of reach [B, K+1] float64: each position's sum(max(reach[i] p - q, 0)), [B, K]."""
    spec_length, vocab_size = ids.shape[1], target_probs.shape[2]

    def residuals(reach):
        p = target_probs[:, :spec_length].double() * reach[:, :-1, None]
        if draft_probs is not None:
            return _weights(p - draft_probs).sum(-1)
        vocabulary = torch.arange(vocab_size, device=ids.device)
        return _weights(p - (vocabulary == ids[..., None]).double()).sum(-1)

    return residuals


def draw_weighted(weights, uniforms):
    """[B] int64 by inverse CDF from weights [B, V], uniforms [B]; 0 where nothing has weight."""
    # Edges only where there is weight: whatever a parallel scan rounds to, no other index is drawn.
    edges = torch.where(weights > 0, weights.double().cumsum(-1), 0.0)
    cutoff = uniforms.double() * edges.amax(-1)
    # Not of uint8: under torch.compile torch 2.11 then counts the indices in 8 bits too.
    return (edges > cutoff[:, None]).to(torch.int32).argmax(-1)


def _weights(values: torch.Tensor) -> torch.Tensor:
    # NaN weighs nothing, +inf MAX_WEIGHT; clamp alone would keep NaN.
    return torch.where(values > 0, values, 0.0).clamp(max=MAX_WEIGHT)
