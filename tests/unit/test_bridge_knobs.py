"""BRIDGE's ablations and knobs, each against what it says it does."""

import pytest
import torch
from pydantic import ValidationError

from bridge_engine.methods import make_method
from bridge_engine.methods.bridge import BridgeOptions
from bridge_engine.methods.options import LambdaSchedule
from bridge_engine.parameters import ParameterSet
from bridge_engine.token_objectives import TokenObjectives
from tests.support.reference import Reference
from tests.support.tiny import random_policy
from tests.unit.test_updates import (
    ALPHA,
    BETA,
    DEMOS,
    GROUPS,
    NAMES,
    ROLLOUTS,
    SGD,
    assert_same,
    one_step,
    tiny_spec,
)

PAIR, GHOST = ("student", "teacher"), ("shadow", "teacher")


def test_a_teacher_that_sees_sft_alone_climbs_nothing_else_and_the_student_climbs_both():
    options = BridgeOptions(**{"lambda": 0.3, "teacher_sees": "sft"})
    assert options.adapters == PAIR, "no shadow: nothing would look at it"
    moved, _ = one_step(options, PAIR)
    reference = Reference(random_policy(*PAIR), PAIR)
    j_sft, j_rl = reference.j_sft(DEMOS, PAIR), reference.j_rl(ROLLOUTS, PAIR)
    g = reference.gradient(0.7 * j_sft, "teacher")
    assert_same(moved["teacher"], reference.moved("teacher", BETA, g))
    g = reference.gradient(0.7 * j_sft + 0.3 * j_rl, "student")
    assert_same(moved["student"], reference.moved("student", ALPHA, g))


def test_sequential_takes_the_teachers_gradient_where_student_and_shadow_have_moved_to():
    moved, _ = one_step(BridgeOptions(order="sequential"), NAMES)
    reference = Reference(random_policy(*NAMES), NAMES)
    joint = 0.5 * reference.j_sft(DEMOS, PAIR) + 0.5 * reference.j_rl(ROLLOUTS, PAIR)
    student = reference.moved("student", ALPHA, reference.gradient(joint, "student"))
    alone = reference.gradient(reference.j_rl(ROLLOUTS, GHOST), "shadow")
    shadow = reference.moved("shadow", ALPHA, alone)
    assert_same(moved["student"], student)
    assert_same(moved["shadow"], shadow)

    reference.set("student", student)
    reference.set("shadow", shadow)
    gain = reference.j_rl(ROLLOUTS, PAIR) - reference.j_rl(ROLLOUTS, GHOST)
    g = reference.gradient(0.5 * reference.j_sft(DEMOS, PAIR) + 0.5 * gain, "teacher")
    assert_same(moved["teacher"], reference.moved("teacher", BETA, g))


def bridge_steps(options, count):
    """The sets after `count` steps; the shadow starts away from the student."""
    policy = random_policy(*NAMES)
    method = make_method(options)
    rates = {"student": ALPHA, "shadow": ALPHA, "teacher": BETA}
    sets = {n: ParameterSet(n, policy.parameters(n), SGD, rates[n]) for n in NAMES}
    history = []
    for step in range(count):
        method.begin(sets, step, count)
        history.append({n: [p.detach().clone() for p in policy.parameters(n)] for n in NAMES})
        objectives = TokenObjectives(policy, method, tiny_spec(options), demos=DEMOS, groups=GROUPS)
        method.step(objectives, sets, step, count)
    history.append({n: [p.detach().clone() for p in policy.parameters(n)] for n in NAMES})
    return history


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_shadow_is_made_the_student_again_every_so_many_steps_and_not_at_the_first():
    history = bridge_steps(BridgeOptions(resync_every=2), 5)
    equal = [same(at["student"], at["shadow"]) for at in history]
    assert equal == [False, False, True, False, True, False]


def test_the_shadow_is_pulled_toward_the_student_by_its_share_after_each_step():
    plain = bridge_steps(BridgeOptions(), 1)[-1]
    pulled = bridge_steps(BridgeOptions(shadow_ema=0.25), 1)[-1]
    expected = [0.75 * a + 0.25 * b for a, b in zip(plain["shadow"], plain["student"], strict=True)]
    assert_same(pulled["shadow"], expected, tolerance=1e-12)
    assert same(pulled["student"], plain["student"])


@pytest.mark.parametrize("knob", [{"resync_every": 3}, {"shadow_ema": 0.1}])
@pytest.mark.parametrize("ablation", [{"meta": False}, {"teacher_sees": "sft"}])
def test_a_knob_of_the_shadow_is_refused_where_there_is_none(knob, ablation):
    with pytest.raises(ValidationError, match="there is none"):
        BridgeOptions(**knob, **ablation)


def test_lambda_moves_from_one_end_to_the_other_straight_or_slowly_at_both_ends():
    straight = LambdaSchedule(start=0.2, end=1.0)
    assert [straight.at(s, 5) for s in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    cosine = LambdaSchedule(start=0.2, end=1.0, shape="cosine")
    found = [cosine.at(s, 5) for s in range(5)]
    assert (found[0], found[2], found[4]) == pytest.approx((0.2, 0.6, 1.0))
    assert found[1] - found[0] < 0.2 < found[2] - found[1]
