"""What completions are rewarded for, by name and weight, and the noise that a study puts on it."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from bridge_engine.rewards import Verdict
from bridge_engine.rewards.functions import REWARDS, Seen, flipped, parts, total
from bridge_engine.rewards.rewarder import Rewarder
from bridge_engine.rewards.spec import RewardSpec
from bridge_engine.rollout import Completion
from bridge_engine.spec.train import TrainSpec

BASE = {"method": "rl", "data": {"prompts": "arithmetic"}}
VERDICTS = [Verdict(v, "scripted", fast=True) for v in (True, False, None, True)]


def spec(**rl) -> TrainSpec:
    return TrainSpec.model_validate(BASE | {"rl": rl, "rollout": {"max_new_tokens": 10}})


def completions(*lengths: int) -> list[Completion]:
    return [Completion(list(range(n)), [0.0] * n, n < 10) for n in lengths]


def rewarded(made: TrainSpec, texts="#5", step=0):
    rewarder = Rewarder(made, lambda completion: texts)
    return rewarder, rewarder.reward("p1", step, 0, completions(5, 5, 5, 10), VERDICTS)


def test_by_default_a_reward_is_the_verdict_and_no_metric_is_added() -> None:
    rewarder, (rewards, verdicts) = rewarded(spec())
    assert rewards == [1.0, 0.0, None, 1.0]
    assert verdicts is None
    assert rewarder.metrics() == {}
    dumped = spec().model_dump(mode="json")["rl"]
    assert [r["name"] for r in dumped["rewards"]] == ["accuracy"]
    assert TrainSpec.model_validate(spec().model_dump(mode="json")) == spec()


@pytest.mark.parametrize(
    ("name", "seen", "value"),
    [
        ("accuracy", Seen("#5", True, 3, 10, False), 1.0),
        ("accuracy", Seen("#5", None, 3, 10, False), None),
        ("format", Seen("no answer", True, 3, 10, False), 0.0),
        ("format", Seen("#5", False, 3, 10, False), 1.0),
        ("length_penalty", Seen("#5", True, 4, 10, False), -0.4),
        ("length_penalty", Seen("#5", False, 1, 10, False), 0.0),
        ("overlong", Seen("#5", True, 10, 10, True), -1.0),
        ("overlong", Seen("#5", True, 10, 10, False), 0.0),
    ],
)
def test_each_reward_function_gives_what_it_says(name: str, seen: Seen, value) -> None:
    assert REWARDS[name](seen, RewardSpec(name=name)) == value


def test_soft_overlong_punishment_is_dapos() -> None:
    """Equation 13: 0 up to L − buffer, then ((L − buffer) − length) / buffer down to −1 at L."""
    buffered = RewardSpec(name="soft_overlong", buffer=4)
    lengths = [1, 12, 13, 14, 16]
    found = [REWARDS["soft_overlong"](Seen("", True, n, 16, False), buffered) for n in lengths]
    assert found == [0.0, 0.0, -0.25, -0.5, -1.0]


@pytest.mark.parametrize(
    ("form", "text", "has"),
    [
        ("boxed", r"\boxed{5}", 1.0),
        ("boxed", r"\boxed{4} or \boxed{5}", 0.0),
        ("boxed", "#5", 0.0),
        ("think", "<think>2+3</think>#5", 1.0),
        ("think", "<think>2+3</think> none", 0.0),
        ("think", "<think>a</think><think>b</think>#5", 0.0),
        ("think", "2+3 #5", 0.0),
    ],
)
def test_formats(form: str, text: str, has: float) -> None:
    assert parts(Seen(text, True, 1, 2, False), [RewardSpec(name="format", form=form)]) == [has]


def test_rewards_are_added_up_with_their_weights_and_the_verdicts_are_kept() -> None:
    made = spec(rewards=["accuracy", {"name": "format", "weight": 0.5}, "soft_overlong"])
    rewarder, (rewards, verdicts) = rewarded(made, "#5")
    assert rewards == [1.5, 0.5, None, 0.5]  # the last is 10 of 10 tokens long
    assert verdicts == [True, False, None, True]
    means = rewarder.metrics()
    assert means["reward/format"] == 1.0
    assert means["reward/accuracy"] == pytest.approx(2 / 3)
    assert rewarder.metrics() == {}
    assert total([None, 1.0], made.rl.rewards[:2]) is None


def test_label_noise_is_a_function_of_seed_step_and_problem() -> None:
    made = spec(flip_probability=0.3)
    first, again = (rewarded(made, step=7)[1] for _ in range(2))
    assert first == again
    draws = {
        (seed, step): [
            flipped(True, 0.3, seed=seed, step=step, key=f"0/{n}/p") for n in range(4000)
        ]
        for seed in (0, 1)
        for step in (0, 1)
    }
    assert len({tuple(d) for d in draws.values()}) == 4
    for told in draws.values():
        assert told.count(False) / 4000 == pytest.approx(0.3, abs=0.03)
    assert flipped(None, 1.0, seed=0, step=0, key="x") is None
    assert flipped(False, 1.0, seed=0, step=0, key="x") is True
    assert flipped(False, 0.0, seed=0, step=0, key="x") is False
    assert rewarded(spec(flip_probability=1.0))[1][0] == [0.0, 1.0, None, 0.0]


@pytest.mark.parametrize(
    "rewards", [[], ["accuracy", "accuracy"], ["accurate"], [{"name": "format", "form": "xml"}]]
)
def test_rewards_that_cannot_be_meant_are_refused(rewards) -> None:
    with pytest.raises(ValidationError):
        spec(rewards=rewards)
