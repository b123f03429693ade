"""Held-out accuracy: greedy, one sample a problem, with a confidence interval."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

Z95 = 1.959963984540054
"""97.5th percentile of the standard normal."""


def wilson_interval(right: float, total: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval for a proportion (95 % by default); (0, 1) where nothing was judged.

    Unlike the normal approximation it stays inside 0…1 and does not collapse at 0 or all right.
    """
    if total == 0:
        return 0.0, 1.0
    share, z2 = right / total, z * z
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    # exact at the ends, where rounding would leave 3e-18 for a bound that is 0
    return (0.0 if right == 0 else centre - half), (1.0 if right == total else centre + half)


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
