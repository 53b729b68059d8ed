"""Rejection sampling by the C++ extension under csrc/: so far its CPU kernel."""

from __future__ import annotations

import functools
import importlib

import torch

from src.contract import SamplerOutput, SamplerUnavailable, validate
from src.randomness import row_uniforms

BUILD_COMMAND = "cd src/cuda/csrc && python setup.py build_ext --inplace"


def require(device: str) -> None:
    """Raises SamplerUnavailable where the extension has no kernels for `device` here."""
    if device == "cuda":
        raise SamplerUnavailable("the extension has no CUDA kernels yet")
    _operator()


@functools.cache
def _operator():
    try:
        importlib.import_module("src.cuda.csrc.fused_rejection_C")
    except ImportError as error:
        raise SamplerUnavailable(
            f"the C++ extension is not built for this Python and torch ({error})", BUILD_COMMAND
        ) from error
    return torch.ops.fused_rejection.rejection_sample.default


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
    """Arguments, result and source as in src.baseline.rejection_sampler, on CPU tensors.

    Raises what contract.validate does, ValueError for tensors on another device, and
    SamplerUnavailable where the extension is missing or was built for another torch.
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
    if target_probs.device.type != "cpu":
        raise ValueError(f"target_probs is on {target_probs.device}; the C++ kernel wants cpu")
    if seeds is None:
        uniforms = row_uniforms(shape, target_probs.device, uniforms, None, None, generator)
    return SamplerOutput(
        *_operator()(
            draft_token_ids, draft_probs, target_probs, num_draft_tokens, uniforms, seeds, offsets
        )
    )
