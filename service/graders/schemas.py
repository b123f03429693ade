"""Bodies of POST /graders/run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from bridge_engine.rewards.graders import GraderSpec
from bridge_engine.rewards.verifier import Case, Verdict
from service.generate.forms import some

MOST_ITEMS = 1_000
LONGEST_TEXT = 200_000


class GradeItem(BaseModel):
    """One answer to judge."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    gold: Annotated[str, Field(max_length=10_000)]
    """The right answer; LaTeX allowed."""
    answer: Annotated[str, Field(max_length=LONGEST_TEXT)]
    """What a model wrote, the whole text: the grader looks for the answer in it."""
    prompt: Annotated[str, Field(max_length=LONGEST_TEXT)] | None = None
    """Where `answer` repeats this, what it repeats is not its answer."""
    gold_value: float | None = None
    """The gold answer as a number that was measured: compared within the grader's tolerance."""

    def case(self) -> Case:
        """As the verifier takes it."""
        return Case(self.gold, self.answer, self.prompt, self.gold_value)


def _grader_from_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class GradersRun(BaseModel):
    """A grader and the answers to try it on."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    grader: Annotated[GraderSpec, BeforeValidator(_grader_from_name)] = GraderSpec()
    """A name, or an object with options."""
    items: Annotated[list[GradeItem], Field(min_length=1, max_length=MOST_ITEMS), some("item")]
    """At most 1000; the whole body is at most 1 MB."""


class Grade(BaseModel):
    """What the grader says of one answer."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    verdict: Literal["right", "wrong", "unjudged"]
    """unjudged: it could not be told, and counts neither way."""
    reason: str
    """A stable word for programs."""
    detail: str
    """The reason as a sentence."""
    stated: str | None
    """The answer that was found in the text; null where it states none."""

    @classmethod
    def of(cls, verdict: Verdict, stated: str | None) -> Grade:
        return cls(
            verdict=verdict.name, reason=verdict.reason, detail=verdict.sentence, stated=stated
        )


class Grades(BaseModel):
    """A verdict for each answer, in order."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    grader: GraderSpec
    version: str
    """Of the grader's rules: raised whenever a verdict changes."""
    data: list[Grade]
    right: int
    wrong: int
    unjudged: int


EXAMPLES = {
    "math": {
        "summary": "The verifier of training",
        "value": {
            "items": [
                {"gold": "\\frac{1}{2}", "answer": "Half of it: \\boxed{0.5}"},
                {"gold": "1, 2", "answer": "\\boxed{2}"},
            ]
        },
    },
    "numeric": {
        "summary": "Measured numbers",
        "value": {
            "grader": {"name": "numeric", "tolerance": 0.05},
            "items": [{"gold": "8.7e8", "answer": "\\boxed{9 \\times 10^8}"}],
        },
    },
}
