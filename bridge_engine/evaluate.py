"""What a training job measures itself: held-out accuracy, greedy, one sample a problem, with a
confidence interval."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from bridge_engine.evaluation.scores import wilson_interval


@dataclass(frozen=True)
class Score:
    """Accuracy over a set of problems; answers that could not be judged are counted apart."""

    right: int
    judged: int
    unjudged: int = 0
    truncated: int = 0
    by_kind: dict[str, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """Share of judged answers that are right; 0 where nothing was judged."""
        return self.right / self.judged if self.judged else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of `accuracy`."""
        return wilson_interval(self.right, self.judged)

    def metrics(self) -> dict[str, float]:
        """Under the names that the metrics stream uses."""
        low, high = self.interval
        return {
            "accuracy": self.accuracy,
            "accuracy/low": low,
            "accuracy/high": high,
            "eval/unjudged": float(self.unjudged),
            "eval/truncated": float(self.truncated),
            **{f"accuracy/{kind}": value for kind, value in self.by_kind.items()},
        }


def score(
    verdicts: Sequence[bool | None], kinds: Sequence[str | None], truncated: int = 0
) -> Score:
    """The score of a list of verdicts (None: unjudged), in all and for each kind of problem."""
    judged = [v for v in verdicts if v is not None]
    groups: dict[str, list[bool]] = defaultdict(list)
    for verdict, kind in zip(verdicts, kinds, strict=True):
        if verdict is not None and kind is not None:
            groups[kind].append(verdict)
    return Score(
        right=sum(judged),
        judged=len(judged),
        unjudged=len(verdicts) - len(judged),
        truncated=truncated,
        by_kind={k: sum(v) / len(v) for k, v in sorted(groups.items())} if len(groups) > 1 else {},
    )
