"""The definition of rejection sampling, in float64 NumPy, written for reading and never timed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from src.contract import MAX_WEIGHT, PLACEHOLDER_TOKEN_ID

# A sampler that sums in float32 may land on the other side of a CDF edge that is nearer to
# u * total than this share of the total. The accept decision has no such allowance: every sampler
# evaluates it exactly, since the product of two float32 is exact in float64.
CDF_EPSILON = 1e-6


class OracleOutput(NamedTuple):
    """token_ids [B, K+1] int64 and num_accepted [B] int32, as in the contract; per row the weights
    [V] float64 that the last token was drawn from, and the uniform that drew it."""

    token_ids: np.ndarray
    num_accepted: np.ndarray
    weights: list[np.ndarray]
    recovery_uniforms: list[float]


def rejection_sample(
    draft_token_ids, draft_probs, target_probs, *, uniforms, num_draft_tokens=None
) -> OracleOutput:
    """Arguments as in the contract, on any device and dtype; uniforms [B, K+1] must be given."""
    ids, u = _float64(draft_token_ids).astype(np.int64), _float64(uniforms)
    p = _float64(target_probs)
    q = None if draft_probs is None else _float64(draft_probs)
    batch_size, spec_length = ids.shape
    vocab_size = p.shape[2]
    lengths = [spec_length] * batch_size
    if num_draft_tokens is not None:
        lengths = np.clip(_float64(num_draft_tokens).astype(np.int64), 0, spec_length)

    token_ids = np.full((batch_size, spec_length + 1), PLACEHOLDER_TOKEN_ID, dtype=np.int64)
    num_accepted = np.zeros(batch_size, dtype=np.int32)
    weights: list[np.ndarray] = []
    for b in range(batch_size):
        accepted, rejected = 0, False
        while accepted < lengths[b] and ids[b, accepted] != PLACEHOLDER_TOKEN_ID:
            x = ids[b, accepted]
            in_vocab = 0 <= x < vocab_size
            q_x = 1.0 if q is None else (q[b, accepted, x] if in_vocab else np.nan)
            if not (in_vocab and u[b, accepted] * q_x < p[b, accepted, x]):
                rejected = True
                break
            token_ids[b, accepted] = x
            accepted += 1
        target = p[b, accepted]
        row = _weights(target)
        if rejected:
            if q is None:
                draft = np.zeros(vocab_size)
                if 0 <= ids[b, accepted] < vocab_size:
                    draft[ids[b, accepted]] = 1.0
            else:
                draft = q[b, accepted]
            with np.errstate(invalid="ignore"):
                residual = _weights(target - draft)
            if residual.sum() > 0:
                row = residual
        token_ids[b, accepted] = draw(row, u[b, spec_length])
        num_accepted[b] = accepted
        weights.append(row)
    return OracleOutput(token_ids, num_accepted, weights, [float(x) for x in u[:, spec_length]])


def draw(weights: np.ndarray, u: float) -> int:
    """The first index whose cumulative weight exceeds u * total; 0 where nothing has weight."""
    cdf = np.cumsum(weights)
    if cdf[-1] == 0:
        return 0
    return int(np.argmax((cdf > u * cdf[-1]) & (weights > 0)))


def disagreements(token_ids, num_accepted, expected: OracleOutput) -> list[str]:
    """One line for each row in which a sampler's output is not the oracle's; [] means it agrees."""
    tokens, counts = _float64(token_ids).astype(np.int64), _float64(num_accepted).astype(np.int64)
    problems = []
    for b, want in enumerate(expected.token_ids):
        accepted = int(expected.num_accepted[b])
        others = np.arange(len(want)) != accepted
        if counts[b] != accepted or (tokens[b] != want)[others].any():
            problems.append(f"row {b}: {tokens[b].tolist()}; the oracle has {want.tolist()}")
        elif not _within_edge(tokens[b, accepted], want[accepted], b, expected):
            problems.append(
                f"row {b}: drew {tokens[b, accepted]}; the oracle drew {want[accepted]}"
            )
    return problems


def _within_edge(token: int, want: int, b: int, expected: OracleOutput) -> bool:
    if token == want:
        return True
    weights = expected.weights[b]
    if not (0 <= token < len(weights) and weights[token] > 0):
        return False
    cdf = np.cumsum(weights)
    slack = CDF_EPSILON * cdf[-1]
    threshold = expected.recovery_uniforms[b] * cdf[-1]
    return cdf[token] - weights[token] - slack <= threshold <= cdf[token] + slack


def _weights(values: np.ndarray) -> np.ndarray:
    """Negative and NaN values weigh nothing, infinite ones MAX_WEIGHT."""
    return np.where(values > 0, np.minimum(values, MAX_WEIGHT), 0.0)


def _float64(values) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)
