"""Verification: what counts as an answer, who judges it, and that nothing can hang or kill it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bridge_engine.errors import EngineError
from bridge_engine.rewards import Verdict, Verifier, child, compare, fast, pool, slow, stated_answer
from bridge_engine.rewards.extract import clean
from bridge_engine.rewards.normalise import normal
from bridge_engine.rewards.pool import Judgement, Pool, Question
from tests.support.waiting import PATIENCE, gone, until

TIMEOUT_S = 2.0
HARD = r"\frac{x}{2}"
"""A gold answer that needs mathematics, so that the fast path leaves it to the pool."""


@pytest.fixture(scope="module")
def silence() -> Iterator[None]:
    """Of math-verify, which logs each answer that it cannot read; of nobody who comes after."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(TIMEOUT_S) as shared:
        shared.judge([(HARD, r"\boxed{x/2}")])  # pays for the child's start once
        yield shared


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"So $x = \boxed{2}$.", "2"),
        (r"\boxed{1} was wrong, it is \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\text{a \} b}}", r"\text{a \} b}"),
        (r"done: \boxed{7} and then \boxed{8", "7"),
        (r"\boxed {5}", "5"),
        (r"\boxed{29,\!322,\!216}", "29322216"),
        ("12+3=15,15-5=10#10", "10"),
        ("He has 72 clips.\n#### 72\n", "72"),
        ("### Step 1\nWe add.\nThe answer is 72.", "72"),
        ("Final answer: **1,250**.", "1,250"),
        (" 42\n", "42"),
        ("-3/4", "-3/4"),
    ],
)
def test_a_stated_answer_is_found(completion: str, answer: str) -> None:
    assert stated_answer(completion) == answer


@pytest.mark.parametrize(
    "completion",
    [
        "",
        " \n ",
        "He has 72 clips altogether.",
        "1\n2\n3",
        r"\boxed{}",
        r"\boxed{12",
        r"\boxed}12{",
        "### Step 1\nWe add 3 and 4.",
        "the answer is 3\nbut I am not sure",
        "12+3=15,15-5=10#",
    ],
)
def test_mentioning_a_number_states_nothing(completion: str, verifier: Verifier) -> None:
    assert stated_answer(completion) is None
    assert verifier.judge([("72", completion)]) == [Verdict(False, "no_answer", True)]


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="\\boxed{}#$. 1\n", max_size=80))
def test_extraction_never_fails_and_cleaning_is_idempotent(text: str) -> None:
    answer = stated_answer(text)
    assert answer is None or (answer and clean(answer) == answer)


def test_extraction_takes_linear_time() -> None:
    hostile = ["\\boxed{" * 150_000, "{" * 10**6, "#" * 10**6, "answer is " * 10**5, "$" * 10**6]
    started = time.process_time()
    for text in hostile:
        stated_answer(text)
    assert time.process_time() - started < 30  # quadratic time would be hours


# ------------------------------------------------------------------- the fast path

_whole = st.integers(-(10**7), 10**7)
_numbers = st.one_of(
    _whole.map(str),
    st.integers(0, 10**14).map(lambda n: f"{n:,}"),
    _whole.map(lambda n: f"+{abs(n)}"),
    _whole.map(lambda n: f"00{abs(n)}"),
    st.tuples(_whole, st.integers(0, 10**7)).map(lambda p: f"{p[0]}.{p[1]}"),
    st.integers(0, 999).map(lambda n: f".{n}"),
    st.tuples(_whole, st.integers(0, 50)).map(lambda p: f"{p[0]}/{p[1]}"),
    st.tuples(_whole, st.integers(1, 50)).map(lambda p: rf"-\frac{{{p[0]}}}{{{p[1]}}}"),
    st.tuples(_whole, st.integers(1, 50)).map(lambda p: rf"\dfrac{{{p[0]}}}{{{p[1]}}}"),
    st.integers(0, 10**6).map(lambda n: rf"\${n:,}"),
    st.sampled_from(["1,00", "1 000", "5%", "--5", "1e3x", "1/0", "∞", "٣", "½"]),
)


@st.composite
def _pairs(draw: st.DrawFn) -> tuple[str, str]:
    one = draw(_numbers)
    dressed = [one, f"{one}.0", f"0{one}", one.replace(",", ""), f"{one}/1", f"-{one}", f"{one}1"]
    return one, draw(st.one_of(_numbers, st.sampled_from(dressed)))


@pytest.mark.usefixtures("silence")
@settings(max_examples=200, deadline=None)
@given(_pairs())
@example(("12,074,550", "012,074,550"))
@example(("0.333333", "1/3"))
@example(("1", "1.0000001"))
@example(("8.7e8", "870000001"))
def test_fast_path_never_disagrees_with_mathematics(pair: tuple[str, str]) -> None:
    gold, stated = map(normal, pair)
    judged = fast.leaf(gold, stated)
    if not judged.deferred:
        computed = slow.mathematics(gold, stated).value
        assert computed is judged.value or computed is None


_pieces = [*"xyei23+-*/()[],_=<>|!'é", "10", r"\frac", "{", "}", r"\pi", r"\text", r"\%"]
_latex = st.lists(st.sampled_from(_pieces), min_size=1, max_size=6).map("".join)


@pytest.mark.usefixtures("silence")
@settings(max_examples=200, deadline=None)
@given(_latex, _latex)
def test_whole_answers_are_judged_alike_by_the_fast_path_and_the_slow_one(
    gold: str, stated: str
) -> None:
    for one, other in ((gold, stated), (gold, gold)):
        quick = compare.judge(one, other, fast.leaf)
        if not quick.deferred and quick.value is not None:
            assert child.judge(one, other)["value"] in (quick.value, None)


@pytest.mark.parametrize(
    ("gold", "stated", "right"),
    [
        (r"8.7 \times 10^{8}", "8.7e8", True),
        (r"8.7 \times 10^{8}", "870000000", True),
        (r"1.325 \times 10^{-27}", r"5 \times 10^{-30}", False),
        ("1e3", "1001", False),
        (r"3 \cdot 10^5", "300,000", True),
    ],
)
def test_scientific_notation_is_judged_by_value(gold: str, stated: str, right: bool) -> None:
    """Where math-verify 0.9 is known to be wrong, the fast path speaks instead of it."""
    assert fast.judge(gold, stated) is right


def test_what_needs_mathematics_is_left_to_it() -> None:
    assert fast.judge(r"\frac{x}{2}", "0.5x") is None
    assert fast.judge("5", "5 apples") is None
    assert compare.judge(r"\frac{x}{2}", "0.5x", fast.leaf).deferred


def test_plain_answers_start_no_process_and_import_no_sympy() -> None:
    code = (
        "import sys; from bridge_engine.rewards import Verifier\n"
        "with Verifier() as v:\n"
        "    got = [x.value for x in v.judge([('10', '5+5=10#10'), ('10', '#11'), ('', '#1')])]\n"
        "    assert got == [True, False, None] and not v.pids\n"
        "assert not {'sympy', 'torch', 'math_verify'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=_root(), timeout=120)


def _root() -> Path:
    return Path(__file__).parents[2]


# ------------------------------------------------------------------- the pool

GOOD = [(HARD, r"\boxed{x/2}", True), (HARD, r"\boxed{x/3}", False), ("(1,2)", "#(1, 2)", True)]

HOSTILE = {
    "nested powers": r"\boxed{9^{9^{9^{9^9}}}}",
    "a factorial": r"\boxed{1000000000!}",
    "a million braces": "\\boxed{" * 140_000,
    "a megabyte": "\\boxed{" + "7" * 10**6 + "}",
    "just short enough": "\\boxed{" + "x+" * 4_900 + "x}",
    "deep recursion": "\\boxed{" + "(" * 4_000 + "x" + ")" * 4_000 + "}",
    "null bytes": "\\boxed{\x00\x00}",
    "half a character": "\\boxed{\ud800}",
    "unbalanced": r"\boxed{\frac{1}{2}",
    "a newline": '\\boxed{x\n\n{"value": true}\n}',
    "nothing": "",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_costs_its_limit_and_spares_its_neighbours(
    name: str, verifier: Verifier
) -> None:
    before, after = GOOD[:2], GOOD[1:]
    pairs = [*[g[:2] for g in before], (HARD, HOSTILE[name]), *[g[:2] for g in after]]
    started = time.monotonic()
    verdicts = verifier.judge(pairs)
    took = time.monotonic() - started
    assert verdicts[len(before)].value is not True
    assert [v.value for v in verdicts[:2]] == [g[2] for g in before]
    assert [v.value for v in verdicts[3:]] == [g[2] for g in after]
    # Once its limit, and at most one new child for the answers after it; the rest is patience.
    assert took < TIMEOUT_S + PATIENCE


def test_an_answer_that_takes_too_long_is_unjudged_and_not_wrong(verifier: Verifier) -> None:
    verdict = verifier.judge([(HARD, HOSTILE["nested powers"])])[0]
    assert verdict == Verdict(None, "timed_out", False)


def test_an_answer_that_needs_too_much_memory_does_not_get_it() -> None:
    with Verifier(20.0, memory_bytes=160 << 20) as small:
        verdicts = small.judge([(HARD, r"\boxed{2^{10^{10}}}"), (HARD, r"\boxed{x/2}")])
    assert verdicts[0].value is not True
    assert verdicts[1].value is True


def test_time_in_which_a_child_could_not_compute_is_none_of_its_own() -> None:
    """A machine that is busy, or stands still, makes no answer one that could not be judged."""
    with Verifier(1.0) as brief:
        brief.judge([(HARD, r"\boxed{x/2}")])
        child = psutil.Process(brief.pids[0])
        child.suspend()
        threading.Timer(2.5, child.resume).start()
        assert brief.judge([(HARD, r"\boxed{x/2}")])[0].value is True


def test_a_child_that_does_not_go_on_is_ended_all_the_same() -> None:
    with Verifier(0.2) as brief:
        for _ in range(100):  # its start is none of an answer's, but its first answer may be slow
            if brief.judge([(HARD, r"\boxed{x/2}")])[0].value:
                break
        psutil.Process(brief.pids[0]).suspend()
        verdict = brief.judge([(HARD, r"\boxed{x/2}")])[0]
    assert verdict == Verdict(None, "timed_out", False)


def test_where_the_kernel_does_not_say_what_a_child_computed_the_clock_is_its_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hidden(_: psutil.Process) -> None:
        raise psutil.AccessDenied

    monkeypatch.setattr(pool, "PATIENCE", 200.0)
    with Verifier(1.0) as brief:
        brief.judge([(HARD, r"\boxed{x/2}")])
        monkeypatch.setattr(psutil.Process, "cpu_times", hidden)
        started = time.monotonic()
        psutil.Process(brief.pids[0]).suspend()
        verdict = brief.judge([(HARD, r"\boxed{x/2}")])[0]
        assert time.monotonic() - started < 120, "it was waited for as one that does not compute"
    assert verdict == Verdict(None, "timed_out", False)


def computes(pid: int) -> bool:
    """Does it, now?"""
    before = sum(psutil.Process(pid).cpu_times()[:2])
    time.sleep(0.1)
    return sum(psutil.Process(pid).cpu_times()[:2]) > before


def test_a_child_killed_in_the_middle_costs_one_verdict() -> None:
    with Verifier(60.0) as patient:  # the kill comes long before the limit
        patient.judge([(HARD, r"\boxed{x/2}")])

        def kill() -> None:
            (child,) = patient._pool._children
            until(lambda: child.task is not None and computes(child.process.pid))
            child.process.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        verdicts = patient.judge([(HARD, HOSTILE["a factorial"]), (HARD, r"\boxed{x/2}")])
        killer.join()
    assert verdicts[0] == Verdict(None, "process_died", False)
    assert verdicts[1].value is True


def test_a_child_killed_between_questions_costs_nothing(verifier: Verifier) -> None:
    verifier.judge([(HARD, r"\boxed{x/2}")])
    os.kill(verifier.pids[0], signal.SIGKILL)
    assert gone(verifier.pids[0])
    assert verifier.judge([(HARD, r"\boxed{x/2}")])[0].value is True


def test_a_signal_to_the_group_does_not_take_the_verdicts_away(verifier: Verifier) -> None:
    """SIGTERM reaches the whole process group, and the engine still finishes its step."""
    verifier.judge([(HARD, r"\boxed{x/2}")])
    pids = verifier.pids
    os.kill(pids[0], signal.SIGTERM)
    os.kill(pids[0], signal.SIGINT)
    assert verifier.judge([(HARD, r"\boxed{x/2}")])[0].value is True
    assert verifier.pids == pids


def test_verdicts_come_in_order_from_several_children() -> None:
    questions = [Question(f"x+{n}", f"{n % 7}+x") for n in range(20)]
    pool = Pool(TIMEOUT_S, workers=2)
    try:
        got = [j.value for j in pool.judge(questions)]
        assert len(pool.pids) == 2
    finally:
        pool.close()
    assert got == [n == n % 7 for n in range(20)]
    assert pool.pids == []


def test_an_answer_that_many_samples_state_is_judged_once(
    verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: list[tuple[str, str]] = []
    judge = compare.judge
    monkeypatch.setattr(compare, "judge", lambda *a: plain.append(a[:2]) or judge(*a))
    asked: list[Question] = []
    slowly = verifier._pool.judge
    monkeypatch.setattr(verifier._pool, "judge", lambda q: asked.extend(q) or slowly(q))
    pairs = [("2", r"\boxed{2}"), ("2", r"\boxed{3}"), (HARD, r"\boxed{x/2}")]
    once = verifier.judge(pairs)
    assert [v.value for v in once] == [True, False, True]
    plain.clear()
    asked.clear()
    assert verifier.judge([pair for pair in pairs for _ in range(8)]) == [
        verdict for verdict in once for _ in range(8)
    ]
    assert sorted(plain) == sorted([("2", "2"), ("2", "3"), (HARD, "x/2")])
    assert asked == [Question(HARD, "x/2")]


def test_long_answers_are_compared_as_they_stand_before_a_process_takes_them_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Question] = []
    with Verifier(TIMEOUT_S) as one:
        monkeypatch.setattr(
            one._pool, "judge", lambda q: asked.extend(q) or [Judgement(False, "x") for _ in q]
        )
        long = "9" * 2_000
        same, other = one.judge([(long, rf"\boxed{{{long}}}"), (HARD, rf"\boxed{{{long}}}")])
    assert same == Verdict(True, "equal", True)
    assert other == Verdict(False, "x", False)
    assert asked == [Question(HARD, long)]


def test_closing_ends_the_children() -> None:
    with Verifier(TIMEOUT_S) as short:
        short.judge([(HARD, r"\boxed{x/2}")])
        (pid,) = short.pids
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_child_outlives_its_parent_by_no_computation() -> None:
    """SIGKILL on the engine leaves no process behind, not even one that is computing."""
    code = (
        "import sys; from bridge_engine.rewards.pool import Pool, Question; import threading\n"
        "pool = Pool(0.5)\n"
        "pool.judge([Question('x', 'y')])\n"
        "print(pool.pids[0], flush=True)\n"
        "pool._ask(pool._children[0], 0, [Question('x', '(' * 4000 + 'x' + ')' * 4000)])\n"
        "threading.Event().wait()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=_root())
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(child), "it is still computing"


def test_a_child_that_cannot_start_is_an_error_that_says_why() -> None:
    pool = Pool(TIMEOUT_S, memory_bytes=1 << 20)
    with pytest.raises(EngineError) as caught:
        pool.judge([Question("x", "y")])
    assert caught.value.code == "verifier_failed"
    assert caught.value.category == "infra"
    assert "did not start" in caught.value.message


def test_an_empty_or_unreadable_gold_answer_is_unjudged(verifier: Verifier) -> None:
    assert [v.value for v in verifier.judge([("", "#5"), (r"\boxed{}", r"\boxed{x}")])] == [
        None,
        None,
    ]


def test_several_answers_in_one_box_are_not_one_of_them(verifier: Verifier) -> None:
    """math-verify passes any overlap between two lists: naming every answer must not pay."""
    hacks = [r"\boxed{$5x$ or $6x$}", r"\boxed{5x, 6x}", r"\boxed{$5x$, $6x$}"]
    assert [v.value for v in verifier.judge([("5x", hack) for hack in hacks])] == [False] * 3


def test_hostile_answers_among_good_ones_cost_no_good_one_its_verdict() -> None:
    """A small share of what `benchmarks/verifier.py hostile` does."""
    kinds = [
        lambda n: "7" * 10**6 + str(n),
        lambda n: "{" * (1000 + n),
        lambda n: f"\x00{n}\x00",
        lambda n: r"\frac{" * 300 + str(n),
        lambda n: "," * 9_000 + str(n),
        lambda n: r"\{" * 3_000 + r"\}" * 3_000 + str(n),
    ]
    slow_ones = [f"9^{{9^{{9^{{{9**9}}}}}}}", "(" * 400 + "x" + ")" * 400, f"{10**9}!"]
    bad = [*slow_ones, *(kinds[n % len(kinds)](n) for n in range(57))]
    good = [r"x/2" if n % 2 else rf"{n}x" for n in range(60)]
    pairs = [(HARD, f"\\boxed{{{text}}}") for both in zip(bad, good, strict=True) for text in both]
    with Verifier(TIMEOUT_S, workers=2) as two:
        values = [v.value for v in two.judge(pairs)]
    assert values[1::2] == [bool(n % 2) for n in range(60)]
    assert True not in values[::2]
