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
# From logits, float32 exponentials move both edges: by a relative 2^-24 of each exponent, which is
# at most 88 in absolute value where it matters.
LOGITS_EPSILON = 1e-5


class OracleOutput(NamedTuple):
    """token_ids [B, K+1] int64 and num_accepted [B] int32, as in the contract; per row the weights
    [V] float64 that the last token was drawn from, the uniform that drew it, and how near the
    nearest accept decision was: the least |u q - p| / max(u q, p)."""

    token_ids: np.ndarray
    num_accepted: np.ndarray
    weights: list[np.ndarray]
    recovery_uniforms: list[float]
    accept_margins: list[float]


def rejection_sample(
    draft_token_ids,
    draft_probs,
    target_probs,
    *,
    uniforms,
    num_draft_tokens=None,
    verification="token",
) -> OracleOutput:
    """Arguments as in the contract, on any device and dtype; uniforms [B, K+1] must be given.

    verification "token": Leviathan et al. 2023, algorithm 1; "block": Sun et al. 2024
    (arXiv:2403.10444), algorithm 2, which accepts the longest prefix whose own test passes.
    """
    ids, u = _float64(draft_token_ids).astype(np.int64), _float64(uniforms)
    p = _float64(target_probs)
    q = None if draft_probs is None else _float64(draft_probs)
    batch_size, spec_length = ids.shape
    lengths = [spec_length] * batch_size
    if num_draft_tokens is not None:
        lengths = np.clip(_float64(num_draft_tokens).astype(np.int64), 0, spec_length)
    verify = {"token": _verify_tokens, "block": _verify_block}[verification]

    token_ids = np.full((batch_size, spec_length + 1), PLACEHOLDER_TOKEN_ID, dtype=np.int64)
    num_accepted = np.zeros(batch_size, dtype=np.int32)
    weights: list[np.ndarray] = []
    margins = []
    for b in range(batch_size):
        ended = np.flatnonzero(ids[b] == PLACEHOLDER_TOKEN_ID)
        length = min([lengths[b], *ended[:1]])
        q_b = [
            _draft_row(None if q is None else q[b, k], x, p.shape[2])
            for k, x in enumerate(ids[b, :length])
        ]
        accepted, row, margin = verify(ids[b, :length], q_b, p[b], u[b])
        if not row.sum() > 0:
            row = _weights(p[b, accepted])
        token_ids[b, :accepted] = ids[b, :accepted]
        token_ids[b, accepted] = draw(row, u[b, spec_length])
        num_accepted[b] = accepted
        weights.append(row)
        margins.append(margin)
    recovery = [float(x) for x in u[:, spec_length]]
    return OracleOutput(token_ids, num_accepted, weights, recovery, margins)


def _draft_row(row, token, vocab_size) -> np.ndarray:
    """q of one position: as given, or one-hot at the draft token."""
    if row is not None:
        return row
    return (np.arange(vocab_size) == token).astype(np.float64)


def _at(row: np.ndarray, token: int) -> float:
    return row[token] if 0 <= token < len(row) else np.nan


def _verify_tokens(ids, q, p, u) -> tuple[int, np.ndarray, float]:
    """Accepted drafts, weights of the last token, and the nearest decision's margin, of one row."""
    margin = np.inf
    for k, x in enumerate(ids):
        threshold, p_x = u[k] * _at(q[k], x), _at(p[k], x)
        margin = min(margin, _margin(threshold, p_x))
        if not threshold < p_x:
            return k, _residual(p[k], q[k]), margin
    return len(ids), _weights(p[len(ids)]), margin


def _verify_block(ids, q, p, u) -> tuple[int, np.ndarray, float]:
    """The same. reach[i]: the probability, at most 1, that block verification gives the prefix of
    length i; its test passes with probability reach[i] at the end, before it with the share of
    sum(max(reach[i] p - q, 0)) beside the 1 - reach[i] that is lost."""
    margin, length = np.inf, len(ids)
    reach = [1.0]
    for k, x in enumerate(ids):
        p_x, q_x = _at(p[k], x), _at(q[k], x)
        step = reach[-1] * p_x
        reach.append(0.0 if not step > 0 else 1.0 if not q_x > 0 else min(step / q_x, 1.0))
    for i in range(length, -1, -1):
        row = _residual(reach[i] * p[i], q[i]) if i < length else _weights(p[i])
        passes = reach[i]
        if i < length and 0 < reach[i] < 1:  # at 0 never, even beside a residual of negative q
            passes = row.sum() / (row.sum() + 1 - reach[i])
        if i == 0 or u[i - 1] < passes:
            return i, row, min(margin, _margin(u[i - 1], passes) if i else np.inf)
        margin = min(margin, _margin(u[i - 1], passes))
    raise AssertionError("the empty prefix is always accepted")


def _residual(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return _weights(p - q)


def rejection_sample_from_logits(
    draft_token_ids,
    target_logits,
    *,
    uniforms,
    draft_logits=None,
    draft_probs=None,
    num_draft_tokens=None,
    draft_logsumexp=None,
    verification="token",
    **parameters,
) -> OracleOutput:
    """rejection_sample of the distributions that `probabilities` makes of both sides' logits.
    draft_logsumexp only saves a kernel work: it is not read here."""
    q = draft_probs
    if draft_logits is not None:
        q = probabilities(draft_logits, **parameters)
    p = probabilities(target_logits, **parameters)
    options = {"num_draft_tokens": num_draft_tokens, "verification": verification}
    return rejection_sample(draft_token_ids, q, p, uniforms=uniforms, **options)


def sample_from_logits(logits, *, uniforms, **parameters) -> tuple[np.ndarray, np.ndarray]:
    """token_ids [B] int64 and logsumexp [B] float64 of logits [B, V]; uniforms [B]."""
    p = probabilities(_float64(logits)[:, None], **parameters)[:, 0]
    tokens = [draw(row, u) for row, u in zip(p, _float64(uniforms), strict=True)]
    x = _logits(logits)
    t = _rows(parameters.get("temperature"), 1.0, len(x))[:, None]
    scaled = np.where(p > 0, x / np.where(t > 0, t, 1.0), -np.inf)
    top = scaled.max(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        total = np.exp(scaled - np.where(np.isfinite(top), top, 0.0)).sum(-1)
        return np.array(tokens, dtype=np.int64), top[:, 0] + np.log(total)


def probabilities(logits, *, temperature=None, top_k=None, top_p=None, min_p=None) -> np.ndarray:
    """[B, N, V] float64 from logits [B, N, V] and per-request parameters [B], in the order of
    transformers' processors: temperature, top-k, top-p, min-p, each on what the last one left.

    A temperature of 0 or less puts all mass on the first of the largest logits. top_k of 0 or less,
    top_p of 1 or more and min_p of 0 or less do nothing. Equal logits stay or go together. NaN is
    read as -inf; a row of -inf alone has no mass.
    """
    x = _logits(logits)
    batch_size, _, vocab_size = x.shape
    t = _rows(temperature, 1.0, batch_size)
    k, top, least = (
        _rows(values, off, batch_size) for values, off in ((top_k, 0), (top_p, 1), (min_p, 0))
    )
    result = np.zeros_like(x)
    for b, n in np.ndindex(x.shape[:2]):
        row = x[b, n]
        if row.max() == -np.inf:
            continue
        if not t[b] > 0:
            result[b, n, row.argmax()] = 1.0
            continue
        weights = np.exp((row - row.max()) / t[b])
        if 0 < k[b] < vocab_size:
            weights[row < np.sort(row)[-int(k[b])]] = 0.0
        if top[b] < 1:
            order = np.argsort(-row, kind="stable")
            cdf = np.cumsum(weights[order])
            last = np.argmax(cdf >= top[b] * cdf[-1])
            weights[row < row[order[last]]] = 0.0
        weights[weights < least[b] * weights.max()] = 0.0
        result[b, n] = weights / weights.sum()
    return result


def _logits(values) -> np.ndarray:
    x = _float64(values)
    x = np.where(np.isnan(x), -np.inf, x)
    return np.minimum(x, np.finfo(np.float32).max)


def _rows(values, off, batch_size) -> np.ndarray:
    return np.full(batch_size, float(off)) if values is None else _float64(values)


def _margin(left: float, right: float) -> float:
    largest = max(left, right)
    return abs(left - right) / largest if 0 < largest < np.inf else np.inf


def draw(weights: np.ndarray, u: float) -> int:
    """The first index whose cumulative weight exceeds u * total; 0 where nothing has weight."""
    cdf = np.cumsum(weights)
    if cdf[-1] == 0:
        return 0
    return int(np.argmax((cdf > u * cdf[-1]) & (weights > 0)))


def disagreements(token_ids, num_accepted, expected: OracleOutput, epsilon=None) -> list[str]:
    """One line for each row in which a sampler's output is not the oracle's; [] means it agrees.

    epsilon: None for samplers of probabilities, whose accept decisions are exact and whose CDF
    edges may move by CDF_EPSILON; LOGITS_EPSILON for samplers of logits, for both.
    """
    tokens, counts = _float64(token_ids).astype(np.int64), _float64(num_accepted).astype(np.int64)
    problems = []
    for b, want in enumerate(expected.token_ids):
        if epsilon is not None and expected.accept_margins[b] < epsilon:
            continue
        accepted = int(expected.num_accepted[b])
        others = np.arange(len(want)) != accepted
        if counts[b] != accepted or (tokens[b] != want)[others].any():
            problems.append(f"row {b}: {tokens[b].tolist()}; the oracle has {want.tolist()}")
        elif not _within_edge(tokens[b, accepted], want[accepted], b, expected, epsilon):
            problems.append(
                f"row {b}: drew {tokens[b, accepted]}; the oracle drew {want[accepted]}"
            )
    return problems


def _within_edge(token: int, want: int, b: int, expected: OracleOutput, epsilon) -> bool:
    if token == want:
        return True
    weights = expected.weights[b]
    if not 0 <= token < len(weights) or (epsilon is None and not weights[token] > 0):
        return False
    cdf = np.cumsum(weights)
    slack = (CDF_EPSILON if epsilon is None else epsilon) * cdf[-1]
    threshold = expected.recovery_uniforms[b] * cdf[-1]
    return cdf[token] - weights[token] - slack <= threshold <= cdf[token] + slack


def _weights(values: np.ndarray) -> np.ndarray:
    """Negative and NaN values weigh nothing, infinite ones MAX_WEIGHT."""
    return np.where(values > 0, np.minimum(values, MAX_WEIGHT), 0.0)


def _float64(values) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)
