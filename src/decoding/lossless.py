"""Is the text that comes out the target's? Figures for greedy and for sampled decoding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch


class Divergence(NamedTuple):
    """position: index of the first new token that differs. margin: by how much the target prefers
    its best next token to its second best there, as a difference of logits."""

    position: int
    margin: float


@torch.no_grad()
def first_divergence(
    model, prompt: Sequence[int], tokens: Sequence[int], others: Sequence[int]
) -> Divergence | None:
    """Where two continuations of a prompt part, or None where one is not other than the other.

    In float32 greedy continuations should not part. In bfloat16 a forward of K + 1 tokens sums in
    another order than one of a single token, so they part where the margin is within rounding.
    """
    pairs = enumerate(zip(tokens, others, strict=False))
    position = next((i for i, (token, other) in pairs if token != other), None)
    if position is None:
        return None
    ids = torch.tensor([[*prompt, *tokens[:position]]], device=model.device)
    best, second = model(ids).logits[0, -1].float().topk(2).values.tolist()
    return Divergence(position, best - second)


def chi_square(tokens: Sequence[int], probs: torch.Tensor) -> float:
    """The p-value of `tokens`, independent draws, under `probs` [V] (any float dtype).

    Outcomes expected fewer than 5 times are counted as one; a token of probability 0 gives 0.
    """
    from scipy import stats

    probs = probs.double() / probs.double().sum()
    counts = Counter(tokens)
    observed = torch.tensor([counts[i] for i in range(len(probs))], dtype=torch.float64)
    expected = probs.cpu() * len(tokens)
    if (observed[expected == 0] > 0).any() or observed.sum() != len(tokens):
        return 0.0
    rare = expected < 5
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    if len(expected) < 2:
        return 1.0
    return float(stats.chisquare(observed.numpy(), expected.numpy()).pvalue)
