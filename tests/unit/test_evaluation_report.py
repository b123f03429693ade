"""From judged answers to scores: what votes alike, what is counted where, what is not told."""

from __future__ import annotations

import pytest

from bridge_engine.data.example import Example
from bridge_engine.evaluation.answers import Answer, Judged
from bridge_engine.evaluation.comparison import difference
from bridge_engine.evaluation.report import SetScores, problem_scores, set_scores
from bridge_engine.rewards import Verdict

RIGHT, WRONG = Verdict(True, "equal", True), Verdict(False, "other_value", True)
UNJUDGED = Verdict(None, "timeout", False)


def judged(*answers: tuple[str | None, Verdict], name: str = "a", kind: str = "k") -> Judged:
    """A problem with answers that state these."""
    return Judged(
        Example(id=name, problem="p", answer="1/2", kind=kind),
        [Answer("…", 1, False) for _ in answers],
        [verdict for _, verdict in answers],
        [stated for stated, _ in answers],
    )


def scores(*problems: Judged, pass_at: list[int] | None = None) -> SetScores:
    return set_scores(problems, samples=len(problems[0].answers), pass_at=pass_at, seed=0)


@pytest.mark.parametrize(
    "alike",
    [
        (r"\frac{1}{2}", r"\dfrac12", "1/2"),
        ("0.5", r"\tfrac 1 2", "½"),
        (r"\left( 3, \dfrac{\pi}{2} \right)", r"(3,\frac \pi 2)", r"\big(3, \frac{\pi}{2}\big)"),
    ],
)
def test_answers_that_differ_in_their_writing_alone_vote_together(alike: tuple[str, ...]) -> None:
    others = [("3", WRONG), ("3", WRONG)]
    found = scores(judged(*others, *((text, RIGHT) for text in alike)))
    assert found.scores["maj@5"].value == 1.0


def test_answers_too_long_to_be_taken_apart_here_vote_as_they_stand() -> None:
    long = r"\frac{1}{2}+" * 200
    apart = [(long + "1", RIGHT), (long + " 1", RIGHT), (long + "  1", RIGHT)]
    found = scores(judged(("3", WRONG), ("3", WRONG), *apart))
    assert found.scores["maj@5"].value == 0.0


def test_a_score_that_the_samples_cannot_tell_is_not_there() -> None:
    one = scores(judged(("1", RIGHT)), pass_at=[1, 4])
    assert list(one.scores) == ["pass@1"]
    two = scores(judged(("1", RIGHT), ("2", WRONG)), pass_at=[1, 2, 8])
    assert list(two.scores) == ["pass@1", "avg@2", "pass@2", "maj@2"]
    none = scores(
        judged(("1", UNJUDGED), ("2", UNJUDGED)),
        judged((None, UNJUDGED), ("2", UNJUDGED), kind="l"),
    )
    assert (none.scores, none.by_kind, none.outcomes.unjudged) == ({}, {}, 4)
    some = scores(judged(("1", RIGHT), ("2", UNJUDGED)))
    assert list(some.scores) == ["pass@1", "avg@2", "maj@2"]  # one judged sample: no pass@2


def test_two_runs_are_compared_in_every_score_that_both_have() -> None:
    """Values by hand: of four samples each, ours right in 2, 4, 0, unjudged; theirs 1, 4, 1, 4."""
    ours = [
        judged(("1", RIGHT), ("1", RIGHT), ("2", WRONG), ("3", WRONG), name="a"),
        judged(*[("1", RIGHT)] * 4, name="b"),
        judged(("2", WRONG), ("3", WRONG), ("2", WRONG), (None, WRONG), name="c"),
        judged(*[("1", UNJUDGED)] * 4, name="d"),
    ]
    theirs = [
        judged(("1", RIGHT), ("2", WRONG), ("2", WRONG), ("3", WRONG), name="a"),
        judged(*[("1", RIGHT)] * 4, name="b"),
        judged(("1", RIGHT), ("2", WRONG), ("3", WRONG), ("4", WRONG), name="c"),
        judged(*[("1", RIGHT)] * 4, name="d"),
    ]
    mine, their = problem_scores(ours), problem_scores(theirs)

    def apart(score: str) -> tuple[int, float, int, int, str]:
        found = difference(mine, their, score, seed=0)
        assert found is not None
        assert found.low <= found.difference <= found.high
        return found.problems, found.difference, found.better, found.worse, found.interval

    assert apart("pass@1") == (3, pytest.approx((1 / 4 + 0 - 1 / 4) / 3), 1, 1, "bootstrap")
    assert apart("pass@2") == (3, pytest.approx((5 / 6 - 1 / 2 + 0 - 1 / 2) / 3), 1, 1, "bootstrap")
    assert apart("pass@4") == (3, pytest.approx(-1 / 3), 0, 1, "tango")
    assert apart("maj@4") == (
        3,
        0.0,
        1,
        1,
        "tango",
    )  # of c the first of theirs leads, which is right
    assert difference(mine, their, "pass@8", seed=0) is None


def test_an_answer_that_nobody_can_read_is_a_failure_of_form() -> None:
    unreadable = Verdict(False, "unreadable_answer", False)
    one = judged(("1", RIGHT), ("??", unreadable), ("??", unreadable), ("3", WRONG))
    one = Judged(
        one.example,
        [Answer("…", 1, place == 2) for place in range(4)],
        one.verdicts,
        one.stated,
    )
    found = scores(one).outcomes
    assert (found.right, found.wrong, found.format_error, found.truncated) == (1, 1, 1, 1)
