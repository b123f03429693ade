"""From judged answers to scores: pass@1, pass@k, maj@k with their intervals, and what went wrong.

Every answer counts in exactly one of `Outcomes`. An unjudged one is no sample of its problem: it is
left out, never counted as wrong. An answer that was cut off, or that states nothing the verifier
can read, is not right and counts against the score, but has a number of its own: a model that does
not know the form is not a model that cannot calculate.

Intervals are 95 %: Wilson's where a problem counts 0 or 1, as with single samples, else the
bootstrap over problems, a function of the spec's seed; of very many problems what that tends to
(`bridge_engine.evaluation.scores`). Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from bridge_engine.data.example import Example
from bridge_engine.evaluation.answers import Judged
from bridge_engine.evaluation.scores import Interval, mean, mean_interval, pass_at_k, voted
from bridge_engine.rewards import numbers
from bridge_engine.rewards.normalise import key, normal
from bridge_engine.rewards.verifier import LONGEST_HERE


class Report(BaseModel):
    """Base of what a report is made of."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Score(Report):
    """A figure in 0…1 with its 95 % interval."""

    value: float
    low: float
    high: float
    problems: int
    """Problems it is the mean of: those with enough judged answers."""
    interval: Interval
    """By what it was computed."""


class Outcomes(Report):
    """What became of the answers; each counts once."""

    right: int = 0
    wrong: int = 0
    """States another answer."""
    format_error: int = 0
    """Came to its end and states no answer that can be read."""
    truncated: int = 0
    """Was cut off before it stated an answer."""
    unjudged: int = 0
    """Could not be judged, and counts nowhere."""


class ProblemScore(Report):
    """How one problem went."""

    id: str
    sha256: str
    """Of problem and answer, the first sixteen digits: the same id may be another problem."""
    judged: int
    right: int
    majority: float | None = None
    """Of several samples: is the answer that most of them state right? None: nobody can tell."""


class Asking(Report):
    """How the problems of a set were asked: what a score has to be read with."""

    name: str
    """The set's label."""
    split: str | None
    data_sha256: str
    """Of the problems, as they were loaded."""
    temperature: float
    top_p: float
    max_new_tokens: int
    template: dict[str, Any]
    """How a problem became a prompt."""
    prompt: str | None = None
    """The first problem that was asked, as the model read it, chat template and all; None: it was
    not kept."""
    warning: str | None = None
    """What speaks against its scores: the adapter was trained on problems of the set. None: nothing
    that is known."""


class SetScores(Report):
    """What a set of problems says of a model."""

    problems: int
    """Problems that were asked."""
    left_out: int
    """Problems whose prompt leaves no room for an answer in the model's context."""
    samples: int
    """Answers to each."""
    scores: dict[str, Score]
    """`pass@1`, with several samples their average, which is `avg@k` too; `pass@k` unbiased;
    `maj@k`. What no problem has enough judged answers for is left out."""
    outcomes: Outcomes
    reasons: dict[str, int]
    """The same by the verifier's word, the most frequent first."""
    truncation_rate: float
    """Share of all answers that reached the token limit, whatever they state."""
    mean_tokens: float
    by_kind: dict[str, Score]
    """pass@1 by subject, where the data has several."""
    by_level: dict[str, Score]
    """The same by level of difficulty."""


class SetReport(Asking, SetScores):
    """A set's scores and how they came about."""


class EvaluationResult(Report):
    """What a finished evaluation has to show: `result` of its job."""

    kind: Literal["eval"] = "eval"
    model: str
    adapter: str | None
    preset: str
    grader: dict[str, Any]
    """Its name and options, and the `version` of its rules."""
    seed: int
    engine: str | None = None
    """What sampled: `native` or `vllm`. None: recorded before results said so; the spec does."""
    completions_of: str | None
    """The evaluation whose answers were judged anew."""
    seconds: float
    """Of the last attempt."""
    environment: dict[str, Any]
    """Hardware and versions that the answers were given with."""
    benchmarks: list[SetReport]


def set_scores(
    judged: Sequence[Judged], *, samples: int, pass_at: Sequence[int] | None, seed: int
) -> SetScores:
    """The scores of one set; `pass_at` None: 1, 2, 4, … and all the samples. A k above these cannot
    be told of this set, and is left out."""
    asked = [one for one in judged if one.answers]
    answers = [answer for one in asked for answer in one.answers]
    reasons: dict[str, int] = defaultdict(int)
    for one in asked:
        for verdict in one.verdicts:
            reasons[verdict.reason] += 1
    scores = {"pass@1": _pass_at_one(asked, seed)}
    if samples > 1:
        scores[f"avg@{samples}"] = scores["pass@1"]
    for k in pass_at or _powers(samples):
        if 1 < k <= samples:
            values = [pass_at_k(*_count(one), k) for one in asked]
            scores[f"pass@{k}"] = _score(values, seed)
    if samples > 1:
        scores[f"maj@{samples}"] = _score([_majority(one) for one in asked], seed)
    return SetScores(
        problems=len(asked),
        left_out=len(judged) - len(asked),
        samples=samples,
        scores={name: score for name, score in scores.items() if score.problems},
        outcomes=_outcomes(asked),
        reasons=dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        truncation_rate=mean([float(answer.truncated) for answer in answers]),
        mean_tokens=mean([float(answer.tokens) for answer in answers]),
        by_kind=_by([(one.example.kind, one) for one in asked], seed),
        by_level=_by([(_text(one.example.level), one) for one in asked], seed),
    )


def problem_scores(judged: Iterable[Judged]) -> list[ProblemScore]:
    """What paired comparisons are made of: how each problem went."""
    return [
        ProblemScore(
            id=one.example.id,
            sha256=_mark(one.example),
            judged=n,
            right=c,
            majority=_majority(one) if len(one.answers) > 1 else None,
        )
        for one in judged
        if one.answers
        for n, c in [_count(one)]
    ]


def _mark(example: Example) -> str:
    return hashlib.sha256(f"{example.problem}\0{example.answer}".encode()).hexdigest()[:16]


def _count(one: Judged) -> tuple[int, int]:
    """(judged answers, right ones)."""
    values = [v.value for v in one.verdicts if v.value is not None]
    return len(values), sum(values)


def _pass_at_one(asked: Iterable[Judged], seed: int) -> Score:
    return _score([c / n if n else None for one in asked for n, c in [_count(one)]], seed)


def _score(values: Iterable[float | None], seed: int) -> Score:
    """The mean of a value in 0…1 for each problem; None: it has none, and is left out."""
    known = [value for value in values if value is not None]
    low, high, how = mean_interval(known, seed=seed)
    return Score(value=mean(known), low=low, high=high, problems=len(known), interval=how)


def _majority(one: Judged) -> float | None:
    """Is the answer that most samples state right? None where that answer could not be judged."""
    place = voted([None if text is None else _ballot(text) for text in one.stated])
    if place is None:  # no sample states any
        return None if all(v.value is None for v in one.verdicts) else 0.0
    value = one.verdicts[place].value
    return None if value is None else float(value)


def _ballot(stated: str) -> str:
    """What an answer is counted as: the same for answers that differ in their writing alone. The
    longest are not taken apart outside of a killable process, as the verifier has it."""
    if len(stated) > LONGEST_HERE:
        return stated
    form = normal(stated)
    number = numbers.read(form)
    return key(form) if number is None else str(number.value)


def _outcomes(asked: Iterable[Judged]) -> Outcomes:
    found = Outcomes()
    for one in asked:
        for answer, verdict in zip(one.answers, one.verdicts, strict=True):
            if verdict.value is None:
                found.unjudged += 1
            elif verdict.value:
                found.right += 1
            elif verdict.reason not in ("no_answer", "unreadable_answer"):
                found.wrong += 1
            elif answer.truncated:
                found.truncated += 1
            else:
                found.format_error += 1
    return found


def _by(named: Iterable[tuple[str | None, Judged]], seed: int) -> dict[str, Score]:
    groups: dict[str, list[Judged]] = defaultdict(list)
    for name, one in named:
        if name is not None:
            groups[name].append(one)
    if len(groups) < 2:
        return {}
    found = {name: _pass_at_one(groups[name], seed) for name in sorted(groups)}
    return {name: score for name, score in found.items() if score.problems}


def _powers(samples: int) -> list[int]:
    powers = [2**n for n in range(samples.bit_length()) if 2**n <= samples]
    return powers if powers[-1] == samples else [*powers, samples]


def _text(level: int | None) -> str | None:
    return None if level is None else str(level)
