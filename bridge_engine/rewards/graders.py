"""Graders by name: ways of judging answers that can be tried before a job is launched.

`math` is the verifier of training and evaluation. `numeric` takes every gold answer for a measured
number and compares within a tolerance. `exact` compares the stated answer as text. Pure but for the
verifier's processes; imports no torch and no math-verify.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from bridge_engine.rewards.extract import clean, stated_answer
from bridge_engine.rewards.verifier import MEASURED, Case, Verdict, Verifier
from bridge_engine.spec.base import SpecModel


class GraderSpec(SpecModel):
    """A grader and its options."""

    name: Literal["math", "numeric", "exact"] = "math"
    """`math`: the verifier; `numeric`: the verifier with a tolerance on every number; `exact`: the
    stated answer and the gold answer are the same text, blanks and `$` aside."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Relative, 0.01 by default. `math`: of gold answers with a `gold_value`; `numeric`: of all."""


def grade(grader: GraderSpec, cases: Sequence[Case], verifier: Verifier) -> list[Verdict]:
    """One verdict a case, in order."""
    if grader.name == "exact":
        return [_exact(case) for case in cases]
    return verifier.judge([_case(grader, case) for case in cases])


def _case(grader: GraderSpec, case: Case) -> Case:
    measured = case.gold_value is not None or grader.name == "numeric"
    if not measured or case.tolerance is not None:
        return case
    tolerance = MEASURED if grader.tolerance is None else grader.tolerance
    return Case(case.gold, case.text, case.prompt, case.gold_value, tolerance)


def _exact(case: Case) -> Verdict:
    want, stated = clean(case.gold), stated_answer(case.text, case.prompt)
    if not want:
        return Verdict(None, "empty_gold", fast=True)
    if stated is None:
        return Verdict(False, "no_answer", fast=True)
    same = want == stated
    return Verdict(same, "equal" if same else "other_text", fast=True)
