"""pass@k, maj@k and their intervals, against computations that share nothing with ours."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest

from bridge_engine.scores import (
    bootstrap_interval,
    interval_of,
    mean,
    paired_difference,
    pass_at_k,
    voted,
)


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_all_draws_that_hold_a_right_one(n: int) -> None:
    """By counting every way of drawing k of n samples."""
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([i < c for i in range(n)], k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)


def test_pass_at_k_is_exact_where_binomials_overflow_floats() -> None:
    for n, c, k in [(4096, 1, 2048), (2000, 3, 1000), (1024, 512, 16), (10_000, 1, 1)]:
        exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
        assert pass_at_k(n, c, k) == pytest.approx(float(exact), rel=1e-12)


def test_what_pass_at_k_cannot_tell_it_does_not_say() -> None:
    assert pass_at_k(4, 2, 8) is None
    assert pass_at_k(0, 0, 1) is None
    with pytest.raises(ValueError, match="0 <= c <= n"):
        pass_at_k(4, 5, 1)


def test_the_majority_is_of_those_that_state_an_answer_and_the_first_of_equals() -> None:
    assert voted(["1", "2", "2", None, None, None]) == 1
    assert voted(["3", "1", "1", "3"]) == 0
    assert voted([None, "7"]) == 1
    assert voted([None, None]) is None


def test_the_bootstrap_agrees_with_the_normal_approximation_and_its_seed() -> None:
    values = [float(i % 10 < 3) for i in range(400)]
    low, high = bootstrap_interval(values, seed=0)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert (low, high) == (pytest.approx(0.3 - half, abs=0.01), pytest.approx(0.3 + half, abs=0.01))
    assert bootstrap_interval(values, seed=0) == (low, high) != bootstrap_interval(values, seed=1)
    assert bootstrap_interval([1.0] * 9, seed=0) == (1.0, 1.0)
    assert bootstrap_interval([], seed=0) == (0.0, 1.0)


@pytest.mark.parametrize("share", [0.3, 0.004, 0.999])
def test_many_problems_have_the_interval_that_drawing_them_would_give(share: float) -> None:
    """Against the exact quantiles of what the bootstrap draws: a binomial number of right ones."""
    n = 5_000
    right = round(share * n)
    assert (interval_of(n), interval_of(500)) == ("normal", "bootstrap")
    chances = (
        math.exp(
            math.log(math.comb(n, count))
            + count * math.log(share)
            + (n - count) * math.log(1 - share)
        )
        for count in range(n + 1)
    )
    below = list(itertools.accumulate(chances))
    low, high = bootstrap_interval([1.0] * right + [0.0] * (n - right), seed=0)
    for bound, tail in ((low, 0.025), (high, 0.975)):
        exact = next(count for count, chance in enumerate(below) if chance >= tail)
        assert bound * n == pytest.approx(exact, abs=1.0)  # a count, which is whole
    assert bootstrap_interval([0.5] * n, seed=0) == (0.5, 0.5)
    assert bootstrap_interval([1.0] * 2 + [0.0] * n, seed=0)[0] == 0.0  # never below the lowest


def test_runs_on_the_same_problems_are_compared_problem_by_problem() -> None:
    """Two runs that differ on few problems differ for sure, though each by itself is uncertain."""
    theirs = [float(i % 2) for i in range(200)]
    ours = [1.0 if i < 24 else v for i, v in enumerate(theirs)]
    apart, (low, high) = paired_difference(ours, theirs, seed=0)
    assert apart == pytest.approx(mean(ours) - mean(theirs))
    assert 0 < low < apart < high
    alone_low, alone_high = bootstrap_interval(ours, seed=0)
    assert high - low < (alone_high - alone_low) / 2
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference(ours, theirs[1:], seed=0)
