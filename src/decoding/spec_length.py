"""How many tokens to draft: what a round yields against what it costs, from measured figures, and
then a trial of the best.

Costs are in plain decoding steps: c a draft step and what its token adds to the verify forward, v a
verify forward of drafts without that, o everything else in a round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

# The longest draft that `candidates` considers.
LONGEST = 16


class Cost(NamedTuple):
    """c, v, o as above."""

    draft: float
    verify: float
    other: float


def survival(accepted: Sequence[int], rounds: int, length: int) -> list[float]:
    """The share of rounds whose first 1, 2, … `length` draft tokens were all accepted.

    accepted: rounds in which that held, for each position measured. Further positions follow by
    the mean acceptance of the measured ones.
    """
    if not rounds:
        return [0.0] * length
    shares = [count / rounds for count in accepted[:length]]
    examined = rounds + sum(accepted[:-1])
    ratio = sum(accepted) / examined if accepted else 0.0
    while len(shares) < length:
        shares.append((shares[-1] if shares else 1.0) * ratio)
    return shares


def expected_speedup(shares: Sequence[float], cost: Cost) -> float:
    """S(K) = E(K) / (K c + v + o) for K = len(shares), E(K) being 1 + the sum of the shares.

    Source: Leviathan et al. 2023, arXiv:2211.17192, theorem 3.8, with measured acceptance.
    """
    return (1 + sum(shares)) / (len(shares) * cost.draft + cost.verify + cost.other)


def candidates(
    accepted: Sequence[int],
    rounds: int,
    cost: Cost,
    *,
    longest: int = LONGEST,
    count: int = 3,
    least: float = 0.95,
) -> list[int]:
    """The K in 1..longest worth a trial: the `count` of the largest expected speedups, the largest
    first, without those below `least`."""
    shares = survival(accepted, rounds, longest)
    speedups = {k: expected_speedup(shares[:k], cost) for k in range(1, longest + 1)}
    best = sorted(speedups, key=lambda k: -speedups[k])[:count]
    return [k for k in best if speedups[k] >= least]


def choose(seconds: Mapping[int, float], *, margin: float = 1.02) -> int:
    """Of the K tried, that of the fewest seconds a token; 0, plain decoding, which was tried too,
    where none is `margin` times as fast."""
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] * margin <= seconds[0] else 0
