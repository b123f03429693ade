"""`bridge grade`: JSON lines in, each with its verdict out. Judges here, without service.

Lines are judged in batches, so that a file of any length passes through; the output has one line
for each line of input, in order. A line that cannot be read comes out with its number and an error.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from bridge_engine.rewards import Case, Verifier, stated_answer
from bridge_engine.rewards.graders import GraderSpec, grade

BATCH = 256
UNREADABLE = "unreadable_line"
LONGEST_LINE = 10_000_000
"""Characters of a line."""


class Line(BaseModel):
    """One line of input; whatever else it has is passed through."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, strict=True)

    gold: str | int | float
    """The right answer."""
    answer: str | int | float
    """What a model wrote, the whole text; a number states itself."""
    prompt: str | None = None
    gold_value: float | None = None

    def case(self) -> Case:
        """As the verifier takes it."""
        return Case(str(self.gold), str(self.answer), self.prompt, self.gold_value)


def graded(
    lines: Iterable[str], grader: GraderSpec, *, timeout: float, workers: int
) -> Iterator[dict[str, Any]]:
    """Each line's object with `verdict`, `reason`, `detail` and `stated`; an unreadable line as
    its number and the error. Blank lines are passed over."""
    numbered = ((n, text) for n, text in enumerate(lines, 1) if text.strip())
    with Verifier(timeout, workers) as verifier:
        while batch := list(islice(numbered, BATCH)):
            read = [_read(number, text) for number, text in batch]
            cases = [line.case() for line in read if isinstance(line, Line)]
            verdicts = iter(grade(grader, cases, verifier))
            for line in read:
                if not isinstance(line, Line):
                    yield line
                    continue
                verdict, case = next(verdicts), line.case()
                yield line.model_dump(exclude_unset=True) | {
                    "verdict": verdict.name,
                    "reason": verdict.reason,
                    "detail": verdict.sentence,
                    "stated": stated_answer(case.text, case.prompt),
                }


def _read(number: int, text: str) -> Line | dict[str, Any]:
    """The line, or what is wrong with it."""
    if len(text) > LONGEST_LINE:
        return _bad(number, f"is longer than {LONGEST_LINE} characters")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = "nested too deeply, or a number too long"
        if isinstance(error, json.JSONDecodeError):
            what = f"{error.msg} at column {error.colno}"
        return _bad(number, f"is not JSON: {what}")
    if not isinstance(value, dict):
        return _bad(number, f"is not an object with gold and answer but {type(value).__name__}")
    try:
        return Line.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return _bad(number, f"has a wrong `{first['loc'][0]}`: {first['msg']}")


def _bad(number: int, why: str) -> dict[str, Any]:
    error = f"line {number} {why}"
    return {"verdict": "unjudged", "reason": UNREADABLE, "line": number, "error": error}


def run(
    lines: Iterable[str],
    grader: GraderSpec,
    *,
    timeout: float,
    workers: int,
    write: Callable[[str], None],
    complain: Callable[[str], None],
) -> Counter[str]:
    """Writes every line's outcome; complains of the bad ones; how many there were of each kind."""
    counts: Counter[str] = Counter()
    for outcome in graded(lines, grader, timeout=timeout, workers=workers):
        if outcome["reason"] == UNREADABLE:
            complain(outcome["error"])
            counts["bad"] += 1
        else:
            counts[outcome["verdict"]] += 1
        write(json.dumps(outcome))
    return counts
