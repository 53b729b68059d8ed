"""Verification and sampling from logits in vectorized PyTorch: the filters by one sort, then the
samplers of probabilities."""

from __future__ import annotations

import torch

from src.compiled.rejection_sampler import draw_weighted, sample_probabilities
from src.contract import (
    SampledTokens,
    SamplerOutput,
    Shape,
    validate_logits,
    validate_sample,
    validate_verification,
)
from src.randomness import row_uniforms


def rejection_sample_from_logits(
    draft_token_ids: torch.Tensor,
    target_logits: torch.Tensor,
    *,
    draft_logits: torch.Tensor | None = None,
    draft_probs: torch.Tensor | None = None,
    draft_logsumexp: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    num_draft_tokens: torch.Tensor | None = None,
    uniforms: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    verification: str = "token",
) -> SamplerOutput:
    """rejection_sample of what oracle.probabilities makes of both sides' logits.

    draft_token_ids: [B, K] int32 or int64, as in rejection_sample.
    target_logits: [B, K+1, V] float32, bfloat16 or float16.
    draft_logits: [B, K, V], dtype of target_logits; or
    draft_probs: [B, K, V], dtype of target_logits, taken as they are; or neither: one-hot drafts.
    draft_logsumexp: [B, K] float64, what sample_from_logits returned for the drafts; saves a kernel
        the pass over draft_logits, and is not needed here.
    temperature, top_p, min_p: [B] float32; top_k: [B] int32; of both sides.
    num_draft_tokens, uniforms, seeds, offsets, generator, verification: as in rejection_sample.
    Raises TypeError and ValueError as contract.validate_logits does.
    """
    validate_verification(verification)
    shape = validate_logits(
        draft_token_ids,
        target_logits,
        draft_logits=draft_logits,
        draft_probs=draft_probs,
        draft_logsumexp=draft_logsumexp,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        num_draft_tokens=num_draft_tokens,
        uniforms=uniforms,
        seeds=seeds,
        offsets=offsets,
        generator=generator,
    )
    u = row_uniforms(shape, target_logits.device, uniforms, seeds, offsets, generator)
    parameters = (temperature, top_k, top_p, min_p)
    log_p = log_probabilities(target_logits, *parameters)
    log_q = None
    if draft_probs is not None:
        log_q = draft_probs.float().log()
    elif draft_logits is not None:
        log_q = log_probabilities(draft_logits, *parameters)
    # In log space, since drafts far down the tails underflow on both sides.
    index = draft_token_ids.long().clamp(0, shape.vocab_size - 1)[..., None]
    bound = log_p[:, : shape.spec_length].gather(-1, index).squeeze(-1).double()
    threshold = u[:, : shape.spec_length].double().log()
    if log_q is not None:
        threshold = threshold + log_q.gather(-1, index).squeeze(-1)
    q = None if log_q is None else log_q.exp() if draft_probs is None else draft_probs.float()
    arguments = (draft_token_ids, q, log_p.exp(), num_draft_tokens, u, verification)
    return SamplerOutput(*sample_probabilities(*arguments, within=threshold < bound))


def sample_from_logits(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    uniforms: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> SampledTokens:
    """What a draft step calls: one token a request.

    logits: [B, V] float32, bfloat16 or float16.
    temperature, top_p, min_p: [B] float32; top_k: [B] int32; as in oracle.probabilities.
    uniforms: [B] float32 in [0, 1); or seeds, offsets: [B] int64 (draw offsets[b] of the stream
        seeds[b]); or generator; the default one where nothing is given.
    Returns token_ids [B] int64 and logsumexp [B] float64, the log of the sum of exp(logit /
    temperature) over what the filters left (a greedy row's largest logit; -inf for a row of -inf).
    On a card its last bits depend on the batch size, as those of PyTorch's sums do.
    Raises TypeError and ValueError as contract.validate_sample does.
    """
    validate_sample(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        uniforms=uniforms,
        seeds=seeds,
        offsets=offsets,
        generator=generator,
    )
    shape = Shape(len(logits), 0, logits.shape[1])
    given = None if uniforms is None else uniforms[:, None]
    u = row_uniforms(shape, logits.device, given, seeds, offsets, generator)
    log_p = log_probabilities(logits[:, None], temperature, top_k, top_p, min_p)[:, 0]
    scaled = _finite(logits).double()
    if temperature is not None:
        scaled = scaled / torch.where(temperature > 0, temperature, 1.0)[:, None]
    logsumexp = torch.where(log_p > -torch.inf, scaled, -torch.inf).logsumexp(-1)
    return SampledTokens(draw_weighted(log_p.exp(), u[:, 0]), logsumexp)


def log_probabilities(
    logits: torch.Tensor,
    temperature: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """The logarithms of oracle.probabilities, which defines them: [B, N, V] float32 from logits
    [B, N, V] and parameters [B]."""
    x = _finite(logits)
    vocab_size = x.shape[-1]
    largest, first = x.max(-1, keepdim=True)
    shifted = torch.where(largest > -torch.inf, x - largest, -torch.inf)
    if temperature is not None:
        shifted = shifted / torch.where(temperature > 0, temperature, 1.0)[:, None, None]
    weights = shifted.exp()
    if top_k is not None or top_p is not None:
        ordered, order = x.sort(-1, descending=True)
        threshold = torch.full_like(largest, -torch.inf)
        if top_k is not None:
            k = torch.where((top_k > 0) & (top_k < vocab_size), top_k, vocab_size).long()
            index = (k - 1)[:, None, None].expand(*x.shape[:2], 1)
            threshold = ordered.gather(-1, index)
        if top_p is not None:
            mass = torch.where(ordered >= threshold, weights.gather(-1, order), 0.0).double()
            cdf = mass.cumsum(-1)
            reached = cdf >= top_p[:, None, None].double() * cdf[..., -1:]
            last = ordered.gather(-1, reached.to(torch.uint8).argmax(-1, keepdim=True))
            threshold = torch.where(top_p[:, None, None] < 1, last.maximum(threshold), threshold)
        weights = torch.where(x >= threshold, weights, 0.0)
        shifted = torch.where(x >= threshold, shifted, -torch.inf)
    if min_p is not None:
        shifted = torch.where(weights >= min_p[:, None, None], shifted, -torch.inf)
    if temperature is not None:
        vocabulary = torch.arange(vocab_size, device=x.device)
        greedy = (temperature <= 0)[:, None, None] & (largest > -torch.inf)
        only_first = torch.where(vocabulary == first, 0.0, -torch.inf)
        shifted = torch.where(greedy, only_first, shifted)
    total = shifted.exp().sum(-1, keepdim=True, dtype=torch.float64)
    return torch.where(total > 0, shifted - total.log().float(), -torch.inf)


def _finite(logits: torch.Tensor) -> torch.Tensor:
    x = logits.float()
    return torch.where(x.isnan(), -torch.inf, x).clamp(max=torch.finfo(torch.float32).max)
