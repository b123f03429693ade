r"""Reward functions by name: what a completion earns beside being right.

Each is a pure function of one completion (`Seen`) and its options, and answers a number, or None
where the completion could not be judged, which leaves it out of its group. `total` adds them up
with their weights. By default, `accuracy` alone, a reward is the verdict itself: 1, 0 or None.

Source of soft overlong punishment: DAPO, equation 13 (arXiv 2503.14476).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bridge_engine.rewards.extract import stated_answer
from bridge_engine.rewards.spec import RewardSpec


@dataclass(frozen=True, slots=True)
class Seen:
    """One completion, as reward functions see it."""

    text: str
    value: bool | None
    """The verifier's verdict; None: unjudged."""
    tokens: int
    """Its length, with the end token where it has one."""
    max_tokens: int
    """The limit it was sampled under."""
    truncated: bool
    """It was cut off at the limit."""


Reward = Callable[[Seen, RewardSpec], float | None]


def accuracy(seen: Seen, spec: RewardSpec) -> float | None:
    """1 right, 0 wrong, None unjudged."""
    return None if seen.value is None else float(seen.value)


def format_(seen: Seen, spec: RewardSpec) -> float | None:
    """1 where the completion has the form that is asked for, else 0, right or wrong."""
    return float(has_form(seen.text, spec.form))


def length_penalty(seen: Seen, spec: RewardSpec) -> float | None:
    """For right answers −tokens/max_tokens, between −1 and 0; 0 for wrong ones, which being short
    must not make better; None for unjudged ones."""
    if seen.value is None:
        return None
    return -seen.tokens / seen.max_tokens if seen.value else 0.0


def overlong(seen: Seen, spec: RewardSpec) -> float | None:
    """−1 for a completion that was cut off at the limit, else 0."""
    return -1.0 if seen.truncated else 0.0


def soft_overlong(seen: Seen, spec: RewardSpec) -> float | None:
    """DAPO's: 0 up to max_tokens − buffer tokens, then falling to −1 at max_tokens."""
    buffer = spec.buffer or max(1, seen.max_tokens // 5)
    over = seen.tokens - (seen.max_tokens - buffer)
    return -min(1.0, over / buffer) if over > 0 else 0.0


REWARDS: Mapping[str, Reward] = {
    "accuracy": accuracy,
    "format": format_,
    "length_penalty": length_penalty,
    "overlong": overlong,
    "soft_overlong": soft_overlong,
}

_BOXED = re.compile(r"\\boxed\s*\{")
_THINK = re.compile(r"\s*<think>(?:(?!</?think>).)*</think>(?:(?!</?think>).)*", re.DOTALL)


def has_form(text: str, form: str) -> bool:
    """Has a completion this form? `stated`: it states an answer the verifier can read; `boxed`: in
    exactly one box; `think`: `<think>…</think>` at the beginning, and a stated answer after it."""
    if form == "stated":
        return stated_answer(text) is not None
    if form == "boxed":
        return len(_BOXED.findall(text)) == 1 and stated_answer(text) is not None
    whole = _THINK.fullmatch(text)
    return whole is not None and stated_answer(text.rpartition("</think>")[2]) is not None


def parts(seen: Seen, rewards: Sequence[RewardSpec]) -> list[float | None]:
    """What each reward function gives the completion, without its weight."""
    return [REWARDS[spec.name](seen, spec) for spec in rewards]


def total(values: Sequence[float | None], rewards: Sequence[RewardSpec]) -> float | None:
    """The weighted sum; None as soon as one of them is None. Exact for one part of weight 1."""
    found = 0.0
    for value, spec in zip(values, rewards, strict=True):
        if value is None:
            return None
        found += spec.weight * value
    return found


def flipped(
    value: bool | None, probability: float, *, seed: int, step: int, key: str
) -> bool | None:
    """A verdict with label noise: turned round with this probability.

    A function of (seed, step, key) alone, `key` naming the problem and which of its completions: a
    resumed run is told the same lies. Unjudged stays unjudged.
    """
    if value is None or probability <= 0:
        return value
    digest = hashlib.sha256(f"{seed}/label-noise/{step}/{key}".encode()).digest()
    return value ^ (int.from_bytes(digest[:8], "big") < probability * 2**64)
