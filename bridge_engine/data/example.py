"""The one shape every problem has, wherever it came from."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """One problem with its answer and, where an expert wrote one, its worked solution.

    `solution` is the expert's whole reasoning *including* the stated final answer, exactly as a
    policy should produce it; None where the source has only the answer.
    """

    id: str
    problem: str
    answer: str
    solution: str | None = None
    kind: str | None = None
    level: int | None = None
    value: float | None = None
    """The answer as a number that was measured, where the source says that it is one: compared
    within a tolerance."""
