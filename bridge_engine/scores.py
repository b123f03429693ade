"""Scores of many samples a problem: pass@k, avg@k, maj@k, their intervals and paired differences.

Pure functions of counts and answers. A problem's samples that could not be judged are no samples:
they are left out of its n, never counted as wrong.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal

from bridge_engine.evaluate import wilson_interval

__all__ = [
    "Interval",
    "bootstrap_interval",
    "interval_of",
    "mean",
    "paired_difference",
    "pass_at_k",
    "voted",
    "wilson_interval",
]

Interval = Literal["bootstrap", "normal"]
MOST_DRAWN = 1_000
"""Problems above which nothing is drawn: it would take seconds, and the means of so many are nearly
normal."""


def pass_at_k(n: int, c: int, k: int) -> float | None:
    """The unbiased estimate of the chance that one of k samples is right, from n samples of which c
    are: 1 − C(n−c, k)/C(n, k). None for n < k, from which it cannot be told.

    Computed as 1 − Π (1 − k/i) for i from n−c+1 to n, which neither overflows nor cancels. Source:
    Chen et al. 2021 (arXiv 2107.03374). k = 1 is avg@n: c/n.
    """
    if not 0 <= c <= n or k < 1:
        raise ValueError(f"pass@k wants 0 <= c <= n and k >= 1; n={n}, c={c}, k={k}")
    if k > n:
        return None
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def voted(answers: Sequence[str | None]) -> int | None:
    """maj@k: the place of the answer most samples state, the first one stated where several lead;
    None where none states any. `answers` are alike as texts where they are the same answer (see
    `bridge_engine.rewards.normalise.key`); None states nothing and has no vote."""
    votes = Counter(a for a in answers if a is not None)
    if not votes:
        return None
    most = max(votes.values())
    return next(i for i, a in enumerate(answers) if a is not None and votes[a] == most)


def mean(values: Sequence[float]) -> float:
    """The average over problems; 0 for none."""
    return math.fsum(values) / len(values) if values else 0.0


def bootstrap_interval(
    values: Sequence[float], *, seed: int, draws: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean over problems, a function of `seed` alone.

    Problems are drawn, not samples: what a score says of other problems is what is uncertain.
    (0, 1) for no problem at all. Of more than MOST_DRAWN problems it is computed (`interval_of`).
    """
    if not values:
        return 0.0, 1.0
    return _percentiles(values, seed=seed, draws=draws, level=level)


def interval_of(problems: int) -> Interval:
    """How the interval of so many problems comes about: `bootstrap`, or `normal`, which is what the
    bootstrap of many problems tends to, with the skewness of their values heeded."""
    return "bootstrap" if problems <= MOST_DRAWN else "normal"


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], *, seed: int, draws: int = 2000
) -> tuple[float, tuple[float, float]]:
    """(mean difference, its 95 % bootstrap interval) of two runs on the same problems, in order.

    ValueError where they are not as many: only what both were asked can be compared.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"runs on {len(ours)} and {len(theirs)} problems cannot be paired")
    apart = [a - b for a, b in zip(ours, theirs, strict=True)]
    if not apart:
        return 0.0, (-1.0, 1.0)
    return mean(apart), _percentiles(apart, seed=seed, draws=draws, level=0.95)


def _percentiles(
    values: Sequence[float], *, seed: int, draws: int, level: float
) -> tuple[float, float]:
    if interval_of(len(values)) == "normal":
        return _skewed_normal(values, level)
    rng = random.Random(f"{seed}/bootstrap")  # of its own: no global state is touched
    means = sorted(mean(rng.choices(values, k=len(values))) for _ in range(draws))
    tail = (1.0 - level) / 2
    low = means[min(draws - 1, math.floor(tail * draws))]
    high = means[max(0, math.ceil((1.0 - tail) * draws) - 1)]
    return low, high


def _skewed_normal(values: Sequence[float], level: float) -> tuple[float, float]:
    """The quantiles of the bootstrap's means to the order 1/n, by the expansion of Cornish and
    Fisher (1938): mean + σ/√n · (z + (z² − 1) · γ / 6√n), γ the skewness of the values."""
    n, middle = len(values), mean(values)
    apart = [value - middle for value in values]
    spread = math.sqrt(mean([a * a for a in apart]))
    if spread == 0.0:
        return middle, middle
    skewness = mean([a**3 for a in apart]) / spread**3
    z = NormalDist().inv_cdf((1.0 + level) / 2)
    error, shift = spread / math.sqrt(n), (z * z - 1.0) * skewness / (6.0 * math.sqrt(n))
    low, high = middle + error * (shift - z), middle + error * (shift + z)
    return max(low, min(values)), min(high, max(values))
