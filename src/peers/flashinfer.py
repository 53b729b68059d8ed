"""FlashInfer's chain_speculative_sampling: probabilities, CUDA only."""

from __future__ import annotations

import itertools

import torch

from src.contract import SamplerOutput
from src.peers.adapter import Adapter, find, refuse_one_hot, want_cuda

_BUFFERS = 512  # more than the calls whose results are looked at together
_PARAMETERS = ("draft_probs", "draft_token_ids", "target_probs", "generator", "seed", "offset")


def load(device: str) -> Adapter:
    """As its documentation calls it: outputs allocated and seed taken from the generator, on the
    host, at each call. Raises SamplerUnavailable."""
    return _adapter(device, preallocated=False)


def load_preallocated(device: str) -> Adapter:
    """The counts preallocated, seed and offset given: what a caller who knows it well does. The
    counts are zeroed at each call, because FlashInfer adds to them. Raises SamplerUnavailable."""
    return _adapter(device, preallocated=True)


def _adapter(device: str, preallocated: bool) -> Adapter:
    sample = find(
        "flashinfer-python",
        "0.6",
        "0.7.2",
        "flashinfer.sampling",
        "chain_speculative_sampling",
        _PARAMETERS,
    )
    want_cuda("flashinfer", device)

    def prepare(draft_token_ids, draft_probs, target_probs):
        refuse_one_hot(draft_probs, "FlashInfer")
        batch_size, spec_length = draft_token_ids.shape
        # Its kernel reads contiguous float32 and int32.
        arguments = (
            draft_probs.float().contiguous(),
            draft_token_ids.int().contiguous(),
            target_probs.float().contiguous(),
        )
        ids, dtype = draft_token_ids, draft_token_ids.dtype
        # A pair of buffers a call: what a call returned is left alone by those after it.
        pairs = torch.zeros((_BUFFERS, 2, batch_size), dtype=torch.int32, device=ids.device)
        buffers = itertools.cycle(pairs.unbind())
        offset = 0

        def call():
            token_ids, _, emitted = sample(*arguments)
            return SamplerOutput(token_ids.to(dtype), emitted)

        def call_preallocated():
            nonlocal offset
            counts = next(buffers)
            counts.zero_()
            token_ids, _, emitted = sample(*arguments, *counts, seed=0, offset=offset)
            offset += 2 * (spec_length + 1)  # a call draws at most 2K + 1 numbers a row
            return SamplerOutput(token_ids.to(dtype), emitted)

        return call_preallocated if preallocated else call

    return Adapter(prepare)
