"""The floor of any verifier: a CUDA kernel that only reads the rows that a verification needs."""

from __future__ import annotations

import torch


def needed_rows(
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    num_accepted: torch.Tensor,
    rejected: torch.Tensor,
) -> torch.Tensor:
    """[B, 2] int64: where request b's target row and draft row start, in bytes from their tensors'
    starts; -1 for a draft row that is not needed (`rejected` [B] bool is False, or drafts are
    one-hot). num_accepted: [B], as a sampler returns it."""
    b = torch.arange(len(num_accepted), device=num_accepted.device)
    k = num_accepted.long()
    size = target_probs.element_size()
    target = (b * target_probs.stride(0) + k * target_probs.stride(1)) * size
    draft = torch.full_like(target, -1)
    if draft_probs is not None:
        at = (b * draft_probs.stride(0) + k * draft_probs.stride(1)) * size
        draft = torch.where(rejected, at, draft)
    return torch.stack([target, draft], dim=1)


def rows_of(inputs: dict, output) -> torch.Tensor:
    """needed_rows of a sampler's padded arguments, all of K drafts given, and of its output (or the
    oracle's)."""
    p = inputs["target_probs"]
    accepted = torch.as_tensor(output.num_accepted, device=p.device)
    rejected = accepted < p.shape[1] - 1
    return needed_rows(inputs["draft_probs"], p, accepted, rejected)


def read_rows(
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    rows: torch.Tensor,
    blocks_per_row: int,
) -> torch.Tensor:
    """Reads the rows named by needed_rows, each with `blocks_per_row` blocks of 512 threads.

    draft_probs [B, K, V] or None, target_probs [B, K+1, V]: CUDA tensors. A row's bytes are read in
    16-byte words, so rows that are not 16-byte aligned are refused with a ValueError.
    Returns the words' sums, a float32 a warp: they keep the loads from being optimised away.
    """
    return torch.ops.fused_rejection.read_rows(draft_probs, target_probs, rows, blocks_per_row)
