"""What the verifier says of answers: the corpus judged by hand, and every notation of a number."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bridge_engine.rewards import Case, Verdict, Verifier, compare, fast
from bridge_engine.rewards.extract import clean
from bridge_engine.rewards.findings import SENTENCES
from tests.support import notations
from tests.support import verifier_corpus as corpus


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(20.0, workers=2) as shared:
        yield shared


@pytest.fixture(scope="module")
def judged(verifier: Verifier) -> list[tuple[tuple[str, str, str, str, str], Verdict]]:
    """The whole corpus, judged once."""
    pairs = corpus.pairs()
    verdicts = verifier.judge([(gold, rf"\boxed{{{stated}}}") for _, gold, stated, _, _ in pairs])
    return list(zip(pairs, verdicts, strict=True))


def test_the_corpus_is_large_and_knows_both_verdicts_of_every_form() -> None:
    pairs = {(gold, stated) for block in corpus.BLOCKS for gold, stated in block.pairs}
    assert len(pairs) >= 400
    verdicts: dict[str, set[str]] = {}
    for block in corpus.BLOCKS:
        verdicts.setdefault(block.topic, set()).add(block.verdict)
    both = {corpus.RIGHT, corpus.WRONG}
    assert [t for t, found in verdicts.items() if not both <= found] == ["writing", "unreadable"]


@pytest.mark.parametrize("topic", sorted({block.topic for block in corpus.BLOCKS}))
def test_every_pair_of_the_corpus_gets_its_verdict(topic: str, judged) -> None:
    """Both ways round, where the block is symmetric."""
    wrong = [
        f"{gold!r} and {stated!r}: {verdict.name} ({verdict.reason}), not {want}: {why}"
        for (its, gold, stated, want, why), verdict in judged
        if its == topic and verdict.name != want
    ]
    assert not wrong, "\n".join(wrong)


def test_every_verdict_has_a_reason_that_fits_it(judged) -> None:
    for (_, gold, stated, _, _), verdict in judged:
        assert verdict.reason in SENTENCES, (gold, stated, verdict)
        assert verdict.sentence == SENTENCES[verdict.reason]
        told = verdict.reason.startswith(("equal", "within")) and verdict.reason != "equal_in_part"
        assert told is (verdict.value is True), (gold, stated, verdict)


@pytest.mark.parametrize("number", corpus.SOURCED)
def test_published_verdicts_of_math_verify_that_are_wrong_are_right_here(
    number: int, verifier: Verifier
) -> None:
    cases = corpus.SOURCED[number]
    found = verifier.judge([(gold, rf"\boxed{{{stated}}}") for gold, stated, _ in cases])
    assert [v.name for v in found] == [want for _, _, want in cases]


@pytest.mark.parametrize("number", corpus.HANGING)
def test_published_answers_that_hang_math_verify_cost_the_limit_alone(number: int) -> None:
    with Verifier(1.0) as short:
        found = short.judge([("5", rf"\boxed{{{corpus.HANGING[number]}}}"), ("5x", r"\boxed{x5}")])
    assert found[0].value is not True
    assert found[1].value is True


def test_what_counts_as_the_answer_of_a_text(verifier: Verifier) -> None:
    found = verifier.judge([(gold, text) for _, gold, text, _ in corpus.TEXTS])
    for (about, _, text, want), verdict in zip(corpus.TEXTS, found, strict=True):
        assert verdict.name == want, (about, text, verdict)


def test_what_a_text_repeats_of_its_prompt_is_not_its_answer(verifier: Verifier) -> None:
    cases = [Case(gold, text, prompt) for prompt, gold, text, _ in corpus.LEAKS]
    for case, (*_, want), verdict in zip(cases, corpus.LEAKS, verifier.judge(cases), strict=True):
        assert verdict.name == want, (case, verdict)


def test_a_measured_number_is_compared_within_its_tolerance(verifier: Verifier) -> None:
    cases = [Case("", rf"\boxed{{{text}}}", gold_value=gold) for gold, text, _ in corpus.MEASURED]
    for case, (*_, want), verdict in zip(
        cases, corpus.MEASURED, verifier.judge(cases), strict=True
    ):
        assert verdict.name == want, (case, verdict)
    strict = [Case("8.7e8", "#8.72e8"), Case("8.7e8", "#8.72e8", tolerance=0.001)]
    assert [v.name for v in verifier.judge(strict)] == ["wrong", "wrong"]
    assert verifier.judge([Case("8.7e8", "#8.72e8", tolerance=0.01)])[0].name == "right"


# ------------------------------------------------------------------- properties

_values = st.one_of(
    st.integers(-(10**9), 10**9).map(Fraction),
    st.fractions(-1000, 1000, max_denominator=500),
    st.builds(lambda n, p: Fraction(n, 10**p), st.integers(-(10**6), 10**6), st.integers(0, 9)),
)


@settings(max_examples=300, deadline=None)
@given(_values, st.data())
def test_a_number_equals_itself_in_every_notation_and_no_other_in_any(
    value: Fraction, data: st.DataObject
) -> None:
    gold = clean(data.draw(st.sampled_from(notations.number(value))))
    for stated in map(clean, notations.number(value)):
        assert compare.judge(gold, stated, fast.leaf).value is True, (gold, stated)
    other = value + data.draw(
        st.sampled_from([1, -1, Fraction(1, 7), Fraction(1, 1000), -2 * value - 1])
    )
    # 1000.00 is 1000.001 rounded to six digits, and stands for it
    assume(abs(other - value) * 10_000 > abs(value))
    for stated in map(clean, notations.number(other)):
        assert compare.judge(gold, stated, fast.leaf).value is (other == value), (gold, stated)


@settings(max_examples=150, deadline=None)
@given(st.lists(_values, min_size=2, max_size=6, unique=True), st.randoms(use_true_random=False))
def test_a_list_equals_itself_in_any_order_and_not_when_one_is_changed(values, rng) -> None:
    def written(some):
        return [rng.choice(notations.number(v)[:3]) for v in some]

    shuffled = rng.sample(values, len(values))
    gold = ", ".join(written(values))
    for stated in (", ".join(written(shuffled)), r"\{" + ",".join(written(shuffled)) + r"\}"):
        assert compare.judge(gold, stated, fast.leaf).value is True, (gold, stated)
    changed = [*shuffled[:-1], max(values) + 1]
    short, more = shuffled[:-1], [*shuffled, max(values) + 1]
    for some in (changed, short, more):
        assert compare.judge(gold, ", ".join(written(some)), fast.leaf).value is False, (gold, some)
    one, other = (f"({', '.join(written(v))})" for v in (values, shuffled))
    assert compare.judge(one, other, fast.leaf).value is (values == shuffled)


_COMMANDS = r"\frac|\text{ or }|\pm |\le |\{|\}|\cup |\infty |\%|\$|\sqrt|\\|\begin{pmatrix}"
_pieces = st.sampled_from(
    [*"12,.x={}()[<-+^_%e²½:&| \\\x00", "cm", r"\end{pmatrix}", *_COMMANDS.split("|")]
)


@settings(max_examples=500, deadline=None)
@given(st.lists(_pieces, max_size=14).map("".join), st.lists(_pieces, max_size=14).map("".join))
def test_comparing_never_fails_and_never_takes_sides(one: str, other: str) -> None:
    """Whatever the texts: an answer equals itself, and right one way is never wrong the other."""
    there, back = compare.judge(one, other, fast.leaf), compare.judge(other, one, fast.leaf)
    assert {there.value, back.value} != {True, False}, (there, back)
    assert compare.judge(one, one, fast.leaf).value is not False
