"""`rl.rewards` of a job spec: which reward functions, with which weights and options."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from bridge_engine.spec.base import SpecModel


class RewardSpec(SpecModel):
    """One reward function. A bare name is short for `{name: …}`."""

    name: Literal["accuracy", "format", "length_penalty", "overlong", "soft_overlong"]
    """`accuracy`: 1 for a right answer; `format`: 1 for the form that is asked for;
    `length_penalty`: −length/limit for right answers; `overlong`: −1 for completions that were cut
    off; `soft_overlong`: DAPO's, falling to −1 over the last `buffer` tokens before the limit."""
    weight: Annotated[float, Field(ge=-1000, le=1000)] = 1.0
    """The reward is the sum of weight · value."""
    form: Literal["stated", "boxed", "think"] = "stated"
    """`format`: an answer is stated, in exactly one box, or after `<think>…</think>`."""
    buffer: Annotated[int, Field(ge=1)] | None = None
    """`soft_overlong`: tokens before the limit over which the punishment grows; default: a fifth of
    rollout.max_new_tokens."""


def _reward_from_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Rewards = Annotated[
    list[Annotated[RewardSpec, BeforeValidator(_reward_from_name)]],
    Field(min_length=1, max_length=16),
]
