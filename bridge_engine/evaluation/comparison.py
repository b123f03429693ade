"""Is one evaluation better than another? Paired by problem, which is sharper than two intervals.

What differs from problem to problem, how hard it is, is in both runs and falls out of the
difference. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bridge_engine.evaluation.report import ProblemScore, Report
from bridge_engine.scores import PairedInterval, mean, paired_difference


class Difference(Report):
    """pass@1 of two evaluations on the problems that both have judged answers to."""

    problems: int
    ours: float
    theirs: float
    difference: float
    """ours − theirs, in −1…1."""
    low: float
    high: float
    """95 % interval of the difference."""
    interval: PairedInterval
    """By what: `tango` where a problem counts 0 or 1 in each, or the difference is the same on all;
    else the bootstrap over problems, or `normal`, which is what that of very many tends to."""
    better: int
    """Problems that ours answers right more often."""
    worse: int


def difference(
    ours: Sequence[ProblemScore], theirs: Sequence[ProblemScore], *, seed: int
) -> Difference | None:
    """The paired difference on one set; None where no problem was judged in both."""
    known = _rates(theirs)
    pairs = [(rate, known[name]) for name, rate in _rates(ours).items() if name in known]
    if not pairs:
        return None
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    apart, low, high, how = paired_difference(a, b, seed=seed)
    return Difference(
        problems=len(pairs),
        ours=mean(a),
        theirs=mean(b),
        difference=apart,
        low=low,
        high=high,
        interval=how,
        better=sum(x > y for x, y in pairs),
        worse=sum(x < y for x, y in pairs),
    )


def _rates(scores: Sequence[ProblemScore]) -> Mapping[tuple[str, str], float]:
    return {(one.id, one.sha256): one.right / one.judged for one in scores if one.judged}
