"""pass@k, maj@k and their intervals, against computations that share nothing with ours."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import pytest

from bridge_engine.evaluation.scores import (
    Z95,
    drawn_interval,
    mean,
    mean_interval,
    paired_difference,
    pass_at_k,
    tango_interval,
    voted,
    wilson_interval,
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
    low, high, by = drawn_interval(values, seed=0)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert (low, high) == (pytest.approx(0.3 - half, abs=0.01), pytest.approx(0.3 + half, abs=0.01))
    assert drawn_interval(values, seed=0) == (low, high, by) != drawn_interval(values, seed=1)
    assert drawn_interval([], seed=0) == (0.0, 1.0, "bootstrap")


@pytest.mark.parametrize("n", [1, 2, 40, 313, 1000])
def test_what_is_drawn_for_a_seed_is_the_same_for_ever(n: int) -> None:
    """To the last bit what plain Python draws, so that no recorded interval moves."""
    rng = random.Random(n)
    values = [rng.randint(0, 3) / 3 for _ in range(n)]
    drawn = random.Random("7/bootstrap")
    means = sorted(mean(drawn.choices(values, k=n)) for _ in range(2000))
    assert drawn_interval(values, seed=7) == (means[50], means[1949], "bootstrap")


def test_problems_are_drawn_once_for_all_scores_of_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison has an interval for each of its scores, and is made within a request."""
    seeded = []

    class Seen(random.Random):
        def __init__(self, seed: str) -> None:
            seeded.append(seed)
            super().__init__(seed)

    monkeypatch.setattr(random, "Random", Seen)
    for k in range(2, 8):
        drawn_interval([i / k for i in range(k)] * (840 // k), seed=991)
    assert seeded == ["991/bootstrap"]


@pytest.mark.parametrize("share", [0.3, 0.004, 0.999])
def test_many_problems_have_the_interval_that_drawing_them_would_give(share: float) -> None:
    """Against the exact quantiles of what the bootstrap draws: a binomial number of right ones."""
    n = 5_000
    right = round(share * n)
    chances = (
        math.exp(
            math.log(math.comb(n, count))
            + count * math.log(share)
            + (n - count) * math.log(1 - share)
        )
        for count in range(n + 1)
    )
    below = list(itertools.accumulate(chances))
    low, high, by = drawn_interval([1.0] * right + [0.0] * (n - right), seed=0)
    assert by == "normal"
    for bound, tail in ((low, 0.025), (high, 0.975)):
        exact = next(count for count, chance in enumerate(below) if chance >= tail)
        assert bound * n == pytest.approx(exact, abs=1.0)  # a count, which is whole
    assert drawn_interval([0.5] * n, seed=0) == (0.5, 0.5, "normal")
    assert drawn_interval([1.0] * 2 + [0.0] * n, seed=0)[0] == 0.0  # never below the lowest


def test_wilson_interval_matches_published_values():
    # Newcombe 1998, table I, method 3 (score): 81/263 and 0/20
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(0, 64)[0] == 0.0
    assert wilson_interval(64, 64)[1] == 1.0
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_an_interval_is_wilsons_where_each_problem_counts_0_or_1_and_bootstrapped_else() -> None:
    whole = [1.0] * 30 + [0.0] * 70
    assert mean_interval(whole, seed=0) == (*wilson_interval(30, 100), "wilson")
    parts = [i / 10 for i in range(11)]
    assert mean_interval(parts * 9, seed=0) == drawn_interval(parts * 9, seed=0)
    assert mean_interval(parts * 99, seed=0) == drawn_interval(parts * 99, seed=0)
    assert [mean_interval(parts * n, seed=0)[2] for n in (9, 99)] == ["bootstrap", "normal"]
    assert mean_interval([], seed=0) == (0.0, 1.0, "wilson")


@pytest.mark.parametrize("n", [1, 5, 30, 400, 5_000])
@pytest.mark.parametrize("value", [0.0, 0.25, 0.5, 1.0])
def test_problems_that_all_went_alike_leave_the_score_uncertain(value: float, n: int) -> None:
    low, high, by = mean_interval([value] * n, seed=0)
    assert by == "wilson"
    assert low <= value <= high
    wide = high - low
    if value in (0.0, 1.0):  # the rule of three, for two sides: 3.7 problems of n
        assert 3 / (n + 4) < wide < 4 / n
    else:
        assert wide == pytest.approx(2 * Z95 * math.sqrt(value * (1 - value) / (n + 4)), rel=0.5)
    assert (low, high) == wilson_interval(value * n, n)


def test_intervals_of_few_problems_hold_the_truth_as_often_as_they_say() -> None:
    """20 problems with 3 samples each, every one right with the same chance: nearly 95 times of
    100, and also where most draws have all problems alike."""
    rng = random.Random(0)
    for chance in (0.02, 0.2, 0.5, 0.98):
        held = 0
        for _ in range(200):
            values = [sum(rng.random() < chance for _ in range(3)) / 3 for _ in range(20)]
            low, high, _by = mean_interval(values, seed=0)
            held += low <= chance <= high
        assert held / 200 > 0.85, chance


def test_runs_on_the_same_problems_are_compared_problem_by_problem() -> None:
    """Two runs that differ on few problems differ for sure, though each by itself is uncertain."""
    theirs = [float(i % 2) for i in range(200)]
    ours = [1.0 if i < 24 else v for i, v in enumerate(theirs)]
    apart, low, high, by = paired_difference(ours, theirs, seed=0)
    assert (apart, by) == (pytest.approx(mean(ours) - mean(theirs)), "tango")
    assert 0 < low < apart < high
    alone_low, alone_high, _ = mean_interval(ours, seed=0)
    assert high - low < (alone_high - alone_low) / 2
    several = [v * 0.75 for v in ours]
    apart, low, high, by = paired_difference(several, theirs, seed=0)
    assert (by, low < apart < high) == ("bootstrap", True)
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference(ours, theirs[1:], seed=0)


@pytest.mark.parametrize(
    ("better", "worse", "n"),
    [(12, 2, 50), (5, 0, 30), (0, 7, 9), (3, 3, 40), (0, 0, 20), (8, 0, 8)],
)
def test_tangos_interval_ends_where_the_score_test_would_reject(
    better: int, worse: int, n: int
) -> None:
    """The score statistic at its bounds, with the likelihood maximised by trying."""

    def likelihood(p: float, difference: float) -> float:
        chances = (p + difference, p, 1 - 2 * p - difference)
        if any(c < 0 or (c == 0 and k) for c, k in zip(chances, counts, strict=True)):
            return -math.inf
        return sum(k * math.log(c) for c, k in zip(chances, counts, strict=True) if k)

    counts = (better, worse, n - better - worse)
    low, high = tango_interval(better, worse, n)
    assert -1 <= low <= (better - worse) / n <= high <= 1
    for bound in (low, high):
        if abs(bound) == 1:  # every problem went that way
            assert abs(better - worse) == n
            continue
        tried = [max(0.0, -bound) + i / 40_000 for i in range(40_001)]
        p = max(tried, key=lambda p: likelihood(p, bound))
        spread = math.sqrt(n * (2 * p + bound - bound**2))
        assert abs(better - worse - n * bound) / spread == pytest.approx(Z95, rel=2e-3)
    assert tango_interval(worse, better, n) == pytest.approx((-high, -low))


@pytest.mark.parametrize("n", [1, 20, 5_000])
def test_runs_that_no_problem_tells_apart_may_still_differ(n: int) -> None:
    same = [0.5] * n
    apart, low, high, by = paired_difference(same, same, seed=0)
    assert (apart, by) == (0.0, "tango")
    assert (low, high) == pytest.approx((-(Z95**2) / (n + Z95**2), Z95**2 / (n + Z95**2)))
    apart, low, high, by = paired_difference([2 / 3, 1 / 3] * n, [1 / 3, 0.0] * n, seed=0)
    assert (apart, by) == (pytest.approx(1 / 3), "tango")
    assert low < apart - 1 / (4 * math.sqrt(n) + 4) < apart < high
    assert paired_difference([], [], seed=0) == (0.0, -1.0, 1.0, "tango")
