"""Inputs that look like decoding, from a seed."""

from __future__ import annotations

import torch


def make_case(batch_size, spec_length, vocab_size, *, dtype=torch.float32, scale=4.0, seed=0):
    """Arguments of rejection_sample as a dict: peaked rows (scale 4) or nearly flat ones (0.1),
    drafts drawn from q, uniforms on the contract's 24-bit grid."""
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch_size, spec_length + 1, vocab_size, generator=g)
    noise = torch.randn(batch_size, spec_length, vocab_size, generator=g)
    target = logits.softmax(-1).to(dtype)
    draft = (logits[:, :spec_length] + noise).softmax(-1).to(dtype)
    ids = torch.zeros(batch_size, spec_length, dtype=torch.int64)
    if batch_size and spec_length:
        flat = draft.float().reshape(-1, vocab_size)
        ids = torch.multinomial(flat, 1, generator=g).reshape(batch_size, spec_length)
    return {
        "draft_token_ids": ids,
        "draft_probs": draft,
        "target_probs": target,
        "uniforms": torch.rand(batch_size, spec_length + 1, generator=g),
    }
