"""The methods by name, and the options of each: the torch-free half of `bridge_engine.methods`.

A method's options also say what anybody needs to know of it without running it: what it learns
from, and when, and which adapters it trains.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BeforeValidator, Discriminator, Field, Tag

from bridge_engine.spec_base import SpecModel


class Turns(NamedTuple):
    """What a step learns from: its place (from 0) among the steps that use demonstrations, and
    among those that explore; None where it does not."""

    demos: int | None
    rewards: int | None


class Options(SpecModel):
    """What all methods have."""

    name: str
    learns_from: ClassVar[frozenset[Literal["demos", "rewards"]]]

    @property
    def policy(self) -> tuple[str, ...]:
        """The adapters whose sum is the policy: what explores, is evaluated and exported."""
        return ("student",)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that are trained."""
        return self.policy

    def turns(self, step: int, steps: int) -> Turns:
        """What 0-based `step` of `steps` learns from; by default, all the method learns from."""
        return Turns(
            step if "demos" in self.learns_from else None,
            step if "rewards" in self.learns_from else None,
        )

    def totals(self, steps: int) -> tuple[int, int]:
        """How many of `steps` imitate, and how many explore."""
        return (
            steps if "demos" in self.learns_from else 0,
            steps if "rewards" in self.learns_from else 0,
        )


# --------------------------------------------------------------------------- λ


class LambdaSchedule(SpecModel):
    """λ over the steps of a run; linear between its two ends."""

    start: Annotated[float, Field(ge=0, le=1)] = 0.0
    """λ of the first step. 0 is imitation alone."""
    end: Annotated[float, Field(ge=0, le=1)] = 1.0
    """λ of the last step. 1 is reinforcement alone."""

    def at(self, step: int, steps: int) -> float:
        """λ of 0-based `step` in a run of `steps`."""
        fraction = step / (steps - 1) if steps > 1 else 1.0
        return self.start + (self.end - self.start) * fraction


Lambda = Annotated[
    Annotated[float, Field(ge=0, le=1), Tag("constant")]
    | Annotated[LambdaSchedule, Tag("schedule")],
    Discriminator(lambda v: "schedule" if isinstance(v, dict | LambdaSchedule) else "constant"),
]


class Weighted(Options):
    """A method that weighs RL against SFT by λ."""

    learns_from: ClassVar[frozenset[Literal["demos", "rewards"]]] = frozenset({"demos", "rewards"})

    lambda_: Lambda = Field(default=0.5, alias="lambda")
    """Weight of RL against SFT: a constant in 0…1, or {start, end} for a linear schedule.
    Constants in 0.3…0.7 are robust by the paper's own account."""

    def lambda_at(self, step: int, steps: int) -> float:
        """λ of 0-based `step` in a run of `steps`."""
        if isinstance(self.lambda_, LambdaSchedule):
            return self.lambda_.at(step, steps)
        return self.lambda_


# --------------------------------------------------------------------------- the methods


class SftOptions(Options):
    """Supervised fine-tuning on the demonstrations alone."""

    learns_from = frozenset({"demos"})
    name: Literal["sft"] = "sft"


class RlOptions(Options):
    """GRPO from the base model ("RL-zero" in the paper): no demonstrations."""

    learns_from = frozenset({"rewards"})
    name: Literal["rl"] = "rl"


class ColdStartOptions(Options):
    """SFT, then RL: the usual two stages."""

    learns_from = frozenset({"demos", "rewards"})
    name: Literal["cold_start"] = "cold_start"
    sft_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the steps that is SFT; RL gets the rest."""
    sft_lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the first stage; default: optimizer.student_lr."""

    def sft_steps(self, steps: int) -> int:
        """Steps of the first stage: at least one, and at least one is left to RL."""
        return max(1, min(steps - 1, round(self.sft_fraction * steps)))

    def turns(self, step: int, steps: int) -> Turns:
        first = self.sft_steps(steps)
        return Turns(step, None) if step < first else Turns(None, step - first)

    def totals(self, steps: int) -> tuple[int, int]:
        first = self.sft_steps(steps)
        return first, steps - first


class AlternatingOptions(Options):
    """SFT steps and RL steps in turn on the same parameters ("Naive Alter." in the paper)."""

    learns_from = frozenset({"demos", "rewards"})
    name: Literal["alternating"] = "alternating"
    sft_steps: Annotated[int, Field(ge=1)] = 1
    """SFT steps in a row, ..."""
    rl_steps: Annotated[int, Field(ge=1)] = 1
    """... and then so many RL steps."""

    def turns(self, step: int, steps: int) -> Turns:
        cycle, place = divmod(step, self.sft_steps + self.rl_steps)
        if place < self.sft_steps:
            return Turns(cycle * self.sft_steps + place, None)
        return Turns(None, cycle * self.rl_steps + place - self.sft_steps)

    def totals(self, steps: int) -> tuple[int, int]:
        cycles, rest = divmod(steps, self.sft_steps + self.rl_steps)
        imitating = cycles * self.sft_steps + min(rest, self.sft_steps)
        return imitating, steps - imitating


class MixOptions(Weighted):
    """SFT and RL losses summed, one set of parameters."""

    name: Literal["mix"] = "mix"


class BridgeOptions(Weighted):
    """BRIDGE: SFT leads, RL follows, joined by the cooperative gain (arXiv 2509.06948)."""

    name: Literal["bridge"] = "bridge"
    meta: bool = True
    """False drops the cooperative gain from the teacher's objective (the paper's ablation)."""

    @property
    def policy(self) -> tuple[str, ...]:
        return ("student", "teacher")

    @property
    def adapters(self) -> tuple[str, ...]:
        return (*self.policy, "shadow") if self.meta else self.policy


METHODS: dict[str, type[Options]] = {
    "sft": SftOptions,
    "rl": RlOptions,
    "cold_start": ColdStartOptions,
    "alternating": AlternatingOptions,
    "mix": MixOptions,
    "bridge": BridgeOptions,
}


def _from_name(value: Any) -> Any:
    """`method: bridge` is short for `method: {name: bridge}`."""
    return {"name": value} if isinstance(value, str) else value


def _name_of(value: Any) -> str | None:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return name if isinstance(name, str) else None


MethodOptions = Annotated[
    Annotated[SftOptions, Tag("sft")]
    | Annotated[RlOptions, Tag("rl")]
    | Annotated[ColdStartOptions, Tag("cold_start")]
    | Annotated[AlternatingOptions, Tag("alternating")]
    | Annotated[MixOptions, Tag("mix")]
    | Annotated[BridgeOptions, Tag("bridge")],
    Discriminator(_name_of),
    BeforeValidator(_from_name),
]
