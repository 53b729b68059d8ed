"""The Python loop over rows and positions that people write first: clear, correct and slow."""

from __future__ import annotations

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
    """Accepts each draft token with probability min(1, p/q); at the first rejection recovers one
    from max(p - q, 0); after K acceptances draws a bonus token from p.

    draft_token_ids: [B, K] int32 or int64; -1 ends a row early; other ids outside [0, V) are
        never accepted.
    draft_probs: [B, K, V] float32, bfloat16 or float16, or None for a one-hot draft.
    target_probs: [B, K+1, V], dtype of draft_probs. A row without positive mass emits token 0.
    num_draft_tokens: [B] int32, draft tokens of each row, at most K.
    uniforms: [B, K+1] float32 in [0, 1), K accepts and one recovery; or
    seeds, offsets: [B] int64, a Philox4_32_10 stream a row; or
    generator: torch.Generator; the default one where nothing is given.
    Raises TypeError and ValueError as contract.validate does.
    Source: Leviathan et al. 2023, arXiv:2211.17192, algorithm 1.
    """
    shape = validate(
        draft_token_ids,
        draft_probs,
        target_probs,
        num_draft_tokens=num_draft_tokens,
        uniforms=uniforms,
        seeds=seeds,
        offsets=offsets,
        generator=generator,
    )
    u = row_uniforms(shape, target_probs.device, uniforms, seeds, offsets, generator)
    token_ids = draft_token_ids.new_full(
        (shape.batch_size, shape.spec_length + 1), PLACEHOLDER_TOKEN_ID
    )
    num_accepted = torch.zeros(shape.batch_size, dtype=torch.int32, device=target_probs.device)
    for b in range(shape.batch_size):
        length = shape.spec_length
        if num_draft_tokens is not None:
            length = min(max(num_draft_tokens[b].item(), 0), shape.spec_length)
        accepted, weights = 0, None
        while accepted < length:
            x = draft_token_ids[b, accepted].item()
            if x == PLACEHOLDER_TOKEN_ID:
                break
            p = target_probs[b, accepted]
            in_vocab = 0 <= x < shape.vocab_size
            q_x = 1.0 if draft_probs is None or not in_vocab else draft_probs[b, accepted, x].item()
            if not in_vocab or not u[b, accepted].item() * q_x < p[x].item():
                q = draft_probs[b, accepted].float() if draft_probs is not None else None
                weights = _residual(p.float(), q, x if in_vocab else None)
                break
            token_ids[b, accepted] = x
            accepted += 1
        if weights is None or weights.sum().item() == 0:
            weights = _weights(target_probs[b, accepted].float())
        token_ids[b, accepted] = _draw(weights, u[b, shape.spec_length].item())
        num_accepted[b] = accepted
    return SamplerOutput(token_ids, num_accepted)


def _residual(p: torch.Tensor, q: torch.Tensor | None, draft_token: int | None) -> torch.Tensor:
    if q is not None:
        return _weights(p - q)
    residual = p.clone()
    if draft_token is not None:
        residual[draft_token] -= 1
    return _weights(residual)


def _weights(values: torch.Tensor) -> torch.Tensor:
    return values.nan_to_num(nan=0.0, posinf=MAX_WEIGHT).clamp(0, MAX_WEIGHT)


def _draw(weights: torch.Tensor, u: float) -> int:
    cdf = weights.double().cumsum(0)
    if cdf[-1].item() == 0:
        return 0
    return int(((cdf > u * cdf[-1]) & (weights > 0)).to(torch.uint8).argmax().item())
