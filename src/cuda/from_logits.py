"""Verification and sampling from logits by the C++ extension under csrc/."""

from __future__ import annotations

import torch

from src.contract import SampledTokens, SamplerOutput, validate_logits, validate_sample
from src.cuda.fused_sampler import caller, is_block, register_fake, require

__all__ = ["rejection_sample_from_logits", "require", "sample_from_logits"]

_VERIFY_ARGUMENTS = (
    "draft_logits",
    "draft_probs",
    "draft_logsumexp",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "num_draft_tokens",
    "uniforms",
    "seeds",
    "offsets",
    "generator",
)
_SAMPLE_ARGUMENTS = ("temperature", "top_k", "top_p", "min_p", *_VERIFY_ARGUMENTS[-4:])


def _validate_verify(ids, logits, *rest):
    return validate_logits(ids, logits, **dict(zip(_VERIFY_ARGUMENTS, rest[:12], strict=True)))


def _validate_sample(logits, *rest):
    validate_sample(logits, **dict(zip(_SAMPLE_ARGUMENTS, rest, strict=True)))


def _fake_verify(ids, *rest):
    shape = _validate_verify(ids, *rest)
    token_ids = ids.new_empty((shape.batch_size, shape.spec_length + 1))
    return token_ids, ids.new_empty((shape.batch_size,), dtype=torch.int32)


def _fake_sample(logits, *rest):
    _validate_sample(logits, *rest)
    rows = (len(logits),)
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=torch.float64)


_VERIFY = caller("rejection_sample_from_logits", _validate_verify, SamplerOutput)
_SAMPLE = caller("sample_from_logits", _validate_sample, SampledTokens)
register_fake("rejection_sample_from_logits", _fake_verify)
register_fake("sample_from_logits", _fake_sample)


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
    """Arguments, result and errors as in src.compiled.from_logits; no probability is ever written.

    draft_logsumexp saves the pass over draft_logits: only the rejected row of it is read then.
    On CUDA tensors it runs on the current stream without a synchronisation, in graphs and under
    torch.compile. Raises SamplerUnavailable where the extension is missing.
    """
    arguments = (draft_token_ids, target_logits, draft_logits, draft_probs, draft_logsumexp)
    arguments += (temperature, top_k, top_p, min_p, num_draft_tokens)
    arguments += (uniforms, seeds, offsets, generator, is_block(verification))
    return _VERIFY(*arguments)


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
    """Arguments, result and errors as in src.compiled.from_logits.sample_from_logits.

    The logsumexp, given to rejection_sample_from_logits as draft_logsumexp, makes the q verified
    the q sampled from, to the bit.
    """
    return _SAMPLE(logits, temperature, top_k, top_p, min_p, uniforms, seeds, offsets, generator)
