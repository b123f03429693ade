"""Scores of many samples a problem: pass@k, avg@k, maj@k, their intervals and paired differences.

Pure functions of counts and answers. A problem's samples that could not be judged are no samples:
they are left out of its n, never counted as wrong.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Drawn = Literal["bootstrap", "normal"]
Interval = Literal["wilson", "bootstrap", "normal"]
"""How the interval of a score came about; `normal` is what the bootstrap of very many problems
tends to, with the skewness of their values heeded."""
PairedInterval = Literal["tango", "bootstrap", "normal"]
"""The same of a difference."""
Z95 = 1.959963984540054
"""97.5th percentile of the standard normal."""
MOST_DRAWN = 1_000
"""Problems above which nothing is drawn: the means of so many are nearly normal."""
DRAWS = 2_000
"""How often the problems of a set are drawn."""
TAIL = DRAWS // 40
"""Draws below a 95 % interval, and above it."""
ALIKE = 1e-9
"""Values no further apart are the same: thirds do not add up to the last bit."""


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
    if k == 1:  # exactly
        return c / n
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


def mean_interval(values: Sequence[float], *, seed: int) -> tuple[float, float, Interval]:
    """(low, high, how): the 95 % interval of the mean of one value in 0…1 a problem.

    Where each is 0 or 1 the mean is a share of problems, and the interval Wilson's. Else problems
    are drawn (`drawn_interval`), unless all went alike: drawing what is all the same would call
    the score certain. Wilson's interval of that share is then taken too: it allows for the most
    that values of this mean can vary, variance ≤ μ·(1 − μ) (Bhatia and Davis 2000).
    """
    if _alike(values) or all(value in (0.0, 1.0) for value in values):
        return *wilson_interval(math.fsum(values), len(values)), "wilson"
    return drawn_interval(values, seed=seed)


def wilson_interval(right: float, total: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval for a proportion (95 % by default); (0, 1) where nothing was judged.

    Unlike the normal approximation it stays inside 0…1 and does not collapse at 0 or all right.
    """
    if total == 0:
        return 0.0, 1.0
    share, z2 = right / total, z * z
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    # exact at the ends, where rounding would leave 3e-18 for a bound that is 0
    return (0.0 if right == 0 else centre - half), (1.0 if right == total else centre + half)


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], *, seed: int
) -> tuple[float, float, float, PairedInterval]:
    """(mean difference, low, high, how) of two runs on the same problems, in order; values in 0…1.

    Where each problem went alike in both, or better or worse by 1, the 95 % interval is Tango's,
    which is to such pairs what Wilson's is to one share. Else problems are drawn, unless the
    difference is the same on all of them, which drawing would call certain: then Tango's of so many
    better (or worse) problems as make up that difference.

    ValueError where they are not as many: only what both were asked can be compared.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"runs on {len(ours)} and {len(theirs)} problems cannot be paired")
    apart = [a - b for a, b in zip(ours, theirs, strict=True)]
    if _alike(apart) or all(value in (-1.0, 0.0, 1.0) for value in apart):
        better = math.fsum(value for value in apart if value > 0)
        worse = -math.fsum(value for value in apart if value < 0)
        return mean(apart), *tango_interval(better, worse, len(apart)), "tango"
    return mean(apart), *drawn_interval(apart, seed=seed)


def tango_interval(better: float, worse: float, total: int) -> tuple[float, float]:
    """The 95 % score interval of the difference of two shares of the same `total` problems, of
    which one alone got `better` right and the other alone `worse`; (−1, 1) of none.

    Source: Tango 1998 (Statistics in Medicine 17, 891–908). Where no problem tells the two apart it
    is ± z²/(n + z²), as wide as Wilson's of none in n.
    """
    if total == 0:
        return -1.0, 1.0

    def rejected(difference: float) -> bool:
        """Is this difference further away than the score test allows?"""
        b = (2 * total - better + worse) * difference - better - worse
        c = -worse * difference * (1.0 - difference)
        root = math.sqrt(max(0.0, b * b - 8 * total * c))  # of 0 or more, but for rounding
        likeliest = (root - b) / (4 * total)  # share that got worse
        variance = 2 * likeliest + difference * (1.0 - difference)
        return (better - worse - total * difference) ** 2 > Z95 * Z95 * total * variance

    def bound(end: float) -> float:
        inside, outside = (better - worse) / total, end
        if not rejected(end):
            return end
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
        return inside

    return bound(-1.0), bound(1.0)


def drawn_interval(values: Sequence[float], *, seed: int) -> tuple[float, float, Drawn]:
    """(low, high, how): the 95 % percentile bootstrap interval of the mean over problems, a
    function of `seed` alone; of more than MOST_DRAWN problems what it tends to.

    Problems are drawn, not samples: what a score says of other problems is what is uncertain.
    (0, 1) for no problem at all.
    """
    if not values:
        return 0.0, 1.0, "bootstrap"
    if len(values) > MOST_DRAWN:
        return *_cornish_fisher(values), "normal"
    places = _places(len(values), seed)
    order = np.asarray(values)[places].mean(axis=1).argsort(kind="stable")
    low, high = (  # numpy's sums differ by machine in their last bits, and these do not
        mean([values[place] for place in places[order[rank]]]) for rank in (TAIL, DRAWS - 1 - TAIL)
    )
    return low, high, "bootstrap"


@lru_cache(maxsize=4)
def _places(problems: int, seed: int) -> NDArray[np.uint16]:
    """Which problems each draw is made of, [DRAWS, problems]: the same for all scores of a set.

    They are those of `random.Random(…).choices`, whose generator is RandomState's, in bulk; no
    global state is touched.
    """
    _, (*key, position), _ = random.Random(f"{seed}/bootstrap").getstate()
    rng = np.random.RandomState()
    rng.set_state({"bit_generator": "MT19937", "state": {"key": key, "pos": position}})
    places = (rng.random_sample((DRAWS, problems)) * problems).astype(np.uint16)
    places.flags.writeable = False  # it is shared
    return places


def _alike(values: Sequence[float]) -> bool:
    return not values or max(values) - min(values) <= ALIKE


def _cornish_fisher(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % quantiles of the bootstrap's means to the order 1/n, by the expansion of Cornish and
    Fisher (1938): mean + σ/√n · (z + (z² − 1) · γ / 6√n), γ the skewness of the values."""
    n, middle = len(values), mean(values)
    apart = [value - middle for value in values]
    spread = math.sqrt(mean([a * a for a in apart]))
    if spread == 0.0:
        return middle, middle
    skewness = mean([a**3 for a in apart]) / spread**3
    error, shift = spread / math.sqrt(n), (Z95 * Z95 - 1.0) * skewness / (6.0 * math.sqrt(n))
    low, high = middle + error * (shift - Z95), middle + error * (shift + Z95)
    return max(low, min(values)), min(high, max(values))
