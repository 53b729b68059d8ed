"""The operation every sampler implements: names, shapes, result type and argument checks.

Terms follow Leviathan et al. 2023 (arXiv:2211.17192). B = batch size, K = spec length (draft
tokens a row), V = vocab size; p = target probabilities, q = draft probabilities.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

PLACEHOLDER_TOKEN_ID = -1
# Infinite or absurd weights count as this much, so that a sum over a row cannot overflow.
MAX_WEIGHT = 2.0**100

MAX_VOCAB_SIZE = 2**31 - 512  # indices into the vocabulary are 32-bit in the kernels

VERIFICATIONS = ("token", "block")

PROBABILITY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKEN_DTYPES = (torch.int32, torch.int64)


class SamplerOutput(NamedTuple):
    """What a sampler returns.

    token_ids: [B, K+1], dtype of draft_token_ids: accepted drafts, then one recovered or bonus
        token, then PLACEHOLDER_TOKEN_ID.
    num_accepted: [B] int32: accepted draft tokens of each row, 0 to K_b.
    """

    token_ids: torch.Tensor
    num_accepted: torch.Tensor


class SampledTokens(NamedTuple):
    """What sample_from_logits returns: token_ids [B] int64 and logsumexp [B] float64."""

    token_ids: torch.Tensor
    logsumexp: torch.Tensor


class SamplerUnavailable(RuntimeError):
    """A sampler that cannot run here: `reason` says why, `command` what mends it (or None)."""

    def __init__(self, reason: str, command: str | None = None):
        super().__init__(f"{reason}; run: {command}" if command else reason)
        self.reason = reason
        self.command = command


class Shape(NamedTuple):
    batch_size: int
    spec_length: int
    vocab_size: int


def validate(
    draft_token_ids: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    *,
    num_draft_tokens: torch.Tensor | None = None,
    uniforms: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Shape:
    """Checks the arguments of rejection_sample without reading a tensor's values.

    Raises TypeError for a wrong type or dtype and ValueError for a wrong shape, layout, device
    or combination; the message names the argument, what came and what was wanted.
    """
    _check("draft_token_ids", draft_token_ids, TOKEN_DTYPES, ndim=2)
    _check("target_probs", target_probs, PROBABILITY_DTYPES, ndim=3)
    batch_size, spec_length = draft_token_ids.shape
    vocab_size = target_probs.shape[2]
    _check_shape("target_probs", target_probs, (batch_size, spec_length + 1, vocab_size))
    dtype = (target_probs.dtype,)
    _check_together(
        target_probs,
        [
            ("draft_token_ids", draft_token_ids, TOKEN_DTYPES, (batch_size, spec_length)),
            ("draft_probs", draft_probs, dtype, (batch_size, spec_length, vocab_size)),
            ("num_draft_tokens", num_draft_tokens, (torch.int32,), (batch_size,)),
            *_randomness(batch_size, spec_length, uniforms, seeds, offsets),
        ],
    )
    _check_one_source(uniforms, seeds, offsets, generator)
    return Shape(batch_size, spec_length, vocab_size)


def validate_flattened(
    draft_token_ids: torch.Tensor,
    cu_num_draft_tokens: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    bonus_probs: torch.Tensor,
    max_spec_length: int,
    *,
    uniforms: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Shape:
    """validate for the flattened ragged layout of rejection_sample_flattened; K is
    max_spec_length. Raises as validate does."""
    _check("draft_token_ids", draft_token_ids, TOKEN_DTYPES, ndim=1)
    _check("cu_num_draft_tokens", cu_num_draft_tokens, (torch.int32,), ndim=1)
    _check("target_probs", target_probs, PROBABILITY_DTYPES, ndim=2)
    if not isinstance(max_spec_length, int) or max_spec_length < 0:
        raise ValueError(f"max_spec_length is {max_spec_length!r}; wanted an int of 0 or more")
    total, batch_size = len(draft_token_ids), len(cu_num_draft_tokens)
    vocab_size = target_probs.shape[1]
    dtype = (target_probs.dtype,)
    _check_together(
        target_probs,
        [
            ("target_probs", target_probs, dtype, (total, vocab_size)),
            ("draft_token_ids", draft_token_ids, TOKEN_DTYPES, (total,)),
            ("cu_num_draft_tokens", cu_num_draft_tokens, (torch.int32,), (batch_size,)),
            ("draft_probs", draft_probs, dtype, (total, vocab_size)),
            ("bonus_probs", bonus_probs, dtype, (batch_size, vocab_size)),
            *_randomness(batch_size, max_spec_length, uniforms, seeds, offsets),
        ],
    )
    _check_one_source(uniforms, seeds, offsets, generator)
    return Shape(batch_size, max_spec_length, vocab_size)


def validate_logits(
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
) -> Shape:
    """validate for rejection_sample_from_logits; raises as it does."""
    _check("draft_token_ids", draft_token_ids, TOKEN_DTYPES, ndim=2)
    _check("target_logits", target_logits, PROBABILITY_DTYPES, ndim=3)
    batch_size, spec_length = draft_token_ids.shape
    vocab_size = target_logits.shape[2]
    _check_shape("target_logits", target_logits, (batch_size, spec_length + 1, vocab_size))
    dtype, drafts = (target_logits.dtype,), (batch_size, spec_length, vocab_size)
    _check_together(
        target_logits,
        [
            ("draft_token_ids", draft_token_ids, TOKEN_DTYPES, (batch_size, spec_length)),
            ("draft_logits", draft_logits, dtype, drafts),
            ("draft_probs", draft_probs, dtype, drafts),
            ("draft_logsumexp", draft_logsumexp, (torch.float64,), (batch_size, spec_length)),
            *_parameters(batch_size, temperature, top_k, top_p, min_p),
            ("num_draft_tokens", num_draft_tokens, (torch.int32,), (batch_size,)),
            *_randomness(batch_size, spec_length, uniforms, seeds, offsets),
        ],
        name="target_logits",
    )
    if draft_logits is not None and draft_probs is not None:
        raise ValueError("draft_logits and draft_probs were given; wanted one of them or neither")
    if draft_logsumexp is not None and draft_logits is None:
        raise ValueError("draft_logsumexp came without draft_logits; wanted both or neither")
    _check_one_source(uniforms, seeds, offsets, generator)
    return Shape(batch_size, spec_length, vocab_size)


def validate_sample(
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
) -> None:
    """validate for sample_from_logits; raises as it does."""
    _check("logits", logits, PROBABILITY_DTYPES, ndim=2)
    rows = (logits.shape[0],)
    _check_together(
        logits,
        [
            *_parameters(rows[0], temperature, top_k, top_p, min_p),
            ("uniforms", uniforms, (torch.float32,), rows),
            ("seeds", seeds, (torch.int64,), rows),
            ("offsets", offsets, (torch.int64,), rows),
        ],
        name="logits",
    )
    _check_one_source(uniforms, seeds, offsets, generator)


def _parameters(batch_size, temperature, top_k, top_p, min_p):
    return [
        ("temperature", temperature, (torch.float32,), (batch_size,)),
        ("top_k", top_k, (torch.int32,), (batch_size,)),
        ("top_p", top_p, (torch.float32,), (batch_size,)),
        ("min_p", min_p, (torch.float32,), (batch_size,)),
    ]


def _randomness(batch_size, spec_length, uniforms, seeds, offsets):
    return [
        ("uniforms", uniforms, (torch.float32,), (batch_size, spec_length + 1)),
        ("seeds", seeds, (torch.int64,), (batch_size,)),
        ("offsets", offsets, (torch.int64,), (batch_size,)),
    ]


def _check_together(first, rest, name="target_probs") -> None:
    """The tensors of `rest`, as (name, tensor or None, dtypes, shape), against `first`."""
    vocab_size = first.shape[-1]
    if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"{name} has vocab size {vocab_size}; wanted 1 to {MAX_VOCAB_SIZE} tokens")
    given = [entry for entry in rest if entry[1] is not None]
    for argument, tensor, dtypes, shape in given:
        _check(argument, tensor, dtypes, ndim=len(shape))
        _check_shape(argument, tensor, shape)
    for argument, tensor in [(name, first), *(entry[:2] for entry in given)]:
        is_row = argument.endswith(("probs", "logits")) and tensor.numel() and vocab_size > 1
        if is_row and tensor.stride(-1) != 1:
            raise ValueError(
                f"{argument} has stride {tensor.stride(-1)} along the vocabulary; wanted 1: "
                f"call {argument}.contiguous()"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{argument} is on {tensor.device} and {name} on {first.device}; wanted one device"
            )


def _check_one_source(uniforms, seeds, offsets, generator) -> None:
    if (seeds is None) != (offsets is None):
        missing, given = ("seeds", "offsets") if seeds is None else ("offsets", "seeds")
        raise ValueError(f"{given} came without {missing}; wanted both or neither")
    sources = [
        name
        for name, value in (("uniforms", uniforms), ("seeds", seeds), ("generator", generator))
        if value is not None
    ]
    if len(sources) > 1:
        raise ValueError(f"{' and '.join(sources)} were given; wanted one source of randomness")


def validate_verification(verification: str) -> None:
    """Raises ValueError for anything but "token" and "block"."""
    if verification not in VERIFICATIONS:
        raise ValueError(f"verification is {verification!r}; wanted 'token' or 'block'")


def _check(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], ndim: int) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; wanted a torch.Tensor")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} has dtype {tensor.dtype}; wanted {wanted}")
    if tensor.ndim != ndim:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; wanted {ndim} dimensions")


def _check_shape(name: str, tensor: torch.Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != wanted:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; wanted {list(wanted)}")
