"""Is one evaluation better than another? Paired by problem, which is sharper than two intervals.

What differs from problem to problem, how hard it is, is in both runs and falls out of the
difference. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bridge_engine.evaluation.report import ProblemScore, Report
from bridge_engine.evaluation.scores import PairedInterval, mean, paired_difference, pass_at_k


class Difference(Report):
    """A score of two evaluations on the problems that both have enough judged answers to."""

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
    """Problems on which ours does better."""
    worse: int


def difference(
    ours: Sequence[ProblemScore],
    theirs: Sequence[ProblemScore],
    score: str = "pass@1",
    *,
    seed: int,
) -> Difference | None:
    """The paired difference on one set in `pass@k` or `maj@k`; None where no problem tells it of
    both."""
    known = _values(theirs, score)
    pairs = [(value, known[name]) for name, value in _values(ours, score).items() if name in known]
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


def _values(scores: Sequence[ProblemScore], score: str) -> Mapping[tuple[str, str], float]:
    """What each problem that can tell adds to a score."""
    kind, _, k = score.partition("@")
    values = {
        (one.id, one.sha256): one.majority
        if kind == "maj"
        else pass_at_k(one.judged, one.right, int(k))
        for one in scores
    }
    return {name: value for name, value in values.items() if value is not None}
