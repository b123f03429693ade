"""The names of figures: which of them may still come, and which are mistakes."""

from __future__ import annotations

from collections.abc import Sequence

from bridge_engine.spec.errors import nearest_name
from service.errors import ApiError
from service.store.models import JobRow

FAMILIES = frozenset(
    [
        *("reward", "frac_reward_zero_std", "gain", "lambda", "objective", "sft", "clip_ratio"),
        *("logprob_drift", "sampler_mismatch", "entropy", "kl", "completions", "verifier"),
        *("grad_norm", "accuracy", "eval", "time", "tokens"),
    ]
)
"""What stands before the / in the names of the figures that methods and evaluations report (see
docs/methods.md). A job may report one of them late: accuracy comes with the first evaluation, a
method of two phases has other figures in each."""


def check_names(missing: Sequence[str], job: JobRow) -> None:
    """Refuses the first of the names the job has no figures of that is not one to wait for.

    A job without any figures is asked early, or failed early: nothing is known of it yet.
    """
    known = sorted(job.latest)
    for name in missing:
        if name in known or not known:
            continue  # it has figures, though none of the steps asked for
        if not job.ended and name.partition("/")[0] in FAMILIES:
            continue
        near = nearest_name(name, known)
        hint = f"; did you mean {near!r}?" if near else "."
        raise ApiError(
            404,
            "unknown_metric",
            f"job {job.id} ({job.status}) has no metric {name!r}{hint} It has: {', '.join(known)}",
            param="keys",
            given=name,
            allowed=known,
            nearest=near,
        )
