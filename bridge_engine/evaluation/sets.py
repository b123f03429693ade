"""A set of problems and how far an evaluation is with it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from bridge_engine.data.example import Example
from bridge_engine.evaluation.answers import Judged
from bridge_engine.evaluation.report import SetScores
from bridge_engine.evaluation.spec import EvalSet


@dataclass
class AskedSet:
    """One set of problems with the answers that have been judged."""

    number: int
    """Its place in the spec."""
    label: str
    ref: EvalSet
    problems: list[Example]
    sha256: str
    """Of the problems, as they were loaded."""
    asked_here: bool = False
    """Was any of it asked by this process, rather than by one before?"""
    _judged: dict[str, Judged] = field(default_factory=dict)
    _known: int = 0
    _right: int = 0

    def take(self, judged: Iterable[Judged]) -> None:
        """Counts these answers."""
        for one in judged:
            self._judged[one.example.id] = one
            values = [v.value for v in one.verdicts if v.value is not None]
            self._known += len(values)
            self._right += sum(values)

    @property
    def finished(self) -> int:
        """Problems whose answers are judged."""
        return len(self._judged)

    @property
    def judged(self) -> list[Judged]:
        """What is judged so far, in the order of the set."""
        return [self._judged[e.id] for e in self.problems if e.id in self._judged]

    @property
    def so_far(self) -> float:
        """Share of right ones among the answers that could be judged so far; 0 of none."""
        return self._right / self._known if self._known else 0.0

    def figures(self, found: SetScores) -> dict[str, float | None]:
        """Its scores under the names that the metrics stream uses."""
        figures: dict[str, float | None] = {}
        for name, score in found.scores.items():
            figures[f"eval/{self.label}/{name}"] = score.value
            figures[f"eval/{self.label}/{name}/low"] = score.low
            figures[f"eval/{self.label}/{name}/high"] = score.high
        for name, count in found.outcomes.model_dump().items():
            figures[f"eval/{self.label}/{name}"] = float(count)
        figures[f"eval/{self.label}/truncation_rate"] = found.truncation_rate
        return figures
