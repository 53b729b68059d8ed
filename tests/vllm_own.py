"""vLLM's part of tests.peers_own: its files, how our operator gets into them, what it cannot pass.

Of vLLM 0.33.0. A refused test runs, and must fail by our NotImplementedError.
"""

from __future__ import annotations

import inspect
import os
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import tests
from src.peers import compat

FILES = (
    "tests/v1/sample/test_rejection_sampler.py",
    "tests/v1/spec_decode/test_rejection_sampler_utils.py",
    "tests/v1/worker/test_gpu_rejection_sampler_i64.py",
    "tests/v1/worker/test_gpu_rejection_sampler_chunking.py",
)
V1 = "vllm.v1.sample.rejection_sampler"
V2 = "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils"


def _refused(reason: str) -> pytest.MarkDecorator:
    return pytest.mark.xfail(raises=NotImplementedError, strict=True, reason=reason)


_ELSEWHERE = pytest.mark.skip(reason="of another function than rejection_sample")
_FLY = _refused("FLy keeps drafts that were rejected: not the target's distribution")
_WATERMARK = _refused("a watermark's key draws the last token, in ours the request's stream does")
_MARKS = {
    "sample_recovered_tokens": _ELSEWHERE,
    "entropy_from_logits": _ELSEWHERE,
    "iter_request_chunks": _ELSEWHERE,
    "chunked_scores": _ELSEWHERE,
    "test_fly_": _FLY,
    "chunked_requests_match_full_batch[2-": _FLY,
    "test_synthetic_": _refused("accepts at a set rate: not the target's distribution"),
    "test_watermarked_": _WATERMARK,
    "test_repeated_": _WATERMARK,
}
_TRITON = pytest.mark.skip(reason="vLLM's Triton kernel makes the drafts: wants a card")
_MEMORY = pytest.mark.skip(reason="20 GB and more: wants a card")
_MARKS_ON_THE_CPU = {
    "gumbel_drafted": _TRITON,
    "multiround_rejection_sample_is_unbiased[True-": _TRITON,
    "unproposed_drafts": _TRITON,
    "block_verification_placeholder": _MEMORY,
    "block_verification_accepts": _MEMORY,
    "block_verification_rejection_sample[True-5-": _MEMORY,
    "block_verification_rejection_sample[False-5-": _MEMORY,
}


def marks(device: str) -> dict[str, pytest.MarkDecorator]:
    return {**_MARKS, **_MARKS_ON_THE_CPU} if device == "cpu" else _MARKS


def replacements(device: str) -> dict[str, str]:
    """In the text of the tests: the device, and what keeps them from running without a card, where
    vLLM's function, but not ours, is a Triton kernel."""
    if device != "cpu":
        return {}
    cuda_is_there = "torch.cuda.is_available()"
    return {'"cuda"': '"cpu"', 'pytest.importorskip("triton")': "", cuda_is_there: "True"}


def put_ours(checkout: Path, device: str) -> None:
    """Imports vLLM, as installed or else of the checkout, and puts our operator under every name of
    V1's and of V2's rejection_sample."""
    sys.path.append(str(checkout))
    tests.__path__.append(str(checkout / "tests"))  # its tests import helpers of its `tests`
    if device == "cpu":
        os.environ["VLLM_TARGET_DEVICE"] = "cpu"
    v1, v2 = import_module(V1), import_module(V2)
    if "target_logits" in inspect.signature(v1.rejection_sample).parameters:
        _replace(v1.rejection_sample, compat.vllm_rejection_sample)
    else:
        _replace(v1.rejection_sample, compat.vllm_rejection_sample_from_probs)
    _replace(v2.rejection_sample, compat.vllm_v2_rejection_sample)
    if device == "cpu":
        v1.expand_batch_to_tokens = _expand_batch_to_tokens


def _replace(theirs, ours) -> None:
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("rejection_sample") is theirs:
            module.rejection_sample = ours


def _expand_batch_to_tokens(x, ends, num_tokens, replace_from=0, replace_to=0):
    """Not what is tested: in place of a Triton kernel before the sampler, x[b] for each draft of
    request b."""
    x = torch.where(x == replace_from, replace_to, x)
    return x.repeat_interleave(torch.diff(ends, prepend=ends.new_zeros(1)))
