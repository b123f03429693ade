"""The three updates of a BRIDGE step on a real transformer, against a float64 reference.

The reference is written from the paper: a separate copy of the model whose effective weights are
W + s(B_θ A_θ + B_w A_w), losses as sums over single unpadded sequences, and autograd on the
objectives. It shares no code with the engine but the model's architecture.
"""

from typing import get_args

import pytest
import torch

from bridge_engine.methods import METHODS, make_method
from bridge_engine.methods.alternating import AlternatingOptions
from bridge_engine.methods.bridge import BridgeOptions
from bridge_engine.methods.cold_start import ColdStartOptions
from bridge_engine.methods.mix import MixOptions
from bridge_engine.methods.rl import RlOptions
from bridge_engine.methods.sft import SftOptions
from bridge_engine.parameters import ParameterSet
from bridge_engine.spec.train import LoraSpec, OptimizerSpec, RlSpec
from bridge_engine.token_objectives import TokenObjectives
from tests.support.reference import Reference, with_exact_norms
from tests.support.tiny import (
    random_groups,
    random_model,
    random_policy,
    random_sequences,
    tiny_spec,
    with_advantages,
)

ALPHA, BETA = 0.05, 0.08
SGD = OptimizerSpec(name="sgd", max_grad_norm=None)
NAMES = ("student", "teacher", "shadow")


def one_step(options, names, *, demos=None, groups=None, rl=None, **runtime):
    policy = random_policy(*names)
    method = make_method(options)
    rates = {"teacher": BETA}
    targets = {n: n for n in names} | options.optimizers
    sets = {
        n: ParameterSet(n, policy.parameters(t), SGD, rates.get(t, ALPHA))
        for n, t in targets.items()
    }
    objectives = TokenObjectives(
        policy,
        method,
        tiny_spec(options, rl=rl, **runtime),
        demos=demos if demos is not None else DEMOS,
        groups=groups if groups is not None else GROUPS,
        library=DEMOS,
    )
    metrics = method.step(objectives, sets, 0, 1)
    return {n: policy.adapters.parameters(n) for n in names}, metrics


DEMOS = random_sequences(5, seed=3)
GROUPS = random_groups(2, 4, seed=4, demos=True)
ROLLOUTS = with_advantages(GROUPS)


def assert_same(actual, expected, tolerance=1e-10):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.detach(), other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.5, 1.0])
def test_bridge_moves_student_shadow_and_teacher_by_the_papers_equations(lam):
    moved, _ = one_step(BridgeOptions(**{"lambda": lam}), NAMES)
    reference = Reference(random_policy(*NAMES), NAMES)
    pair, ghost = ("student", "teacher"), ("shadow", "teacher")
    j_sft, j_rl = reference.j_sft(DEMOS, pair), reference.j_rl(ROLLOUTS, pair)
    j_shadow = reference.j_rl(ROLLOUTS, ghost)

    g = reference.gradient((1 - lam) * j_sft + lam * j_rl, "student")
    assert_same(moved["student"], reference.moved("student", ALPHA, g))
    g = reference.gradient(j_shadow, "shadow")
    assert_same(moved["shadow"], reference.moved("shadow", ALPHA, g))
    g = reference.gradient((1 - lam) * j_sft + lam * (j_rl - j_shadow), "teacher")
    assert_same(moved["teacher"], reference.moved("teacher", BETA, g))


def test_the_reported_gain_is_the_difference_of_the_two_objectives():
    _, metrics = one_step(BridgeOptions(), NAMES)
    reference = Reference(random_policy(*NAMES), NAMES)
    gain = reference.j_rl(ROLLOUTS, ("student", "teacher")) - reference.j_rl(
        ROLLOUTS, ("shadow", "teacher")
    )
    assert metrics["gain"] == pytest.approx(gain.item(), abs=1e-7)


def test_without_the_meta_term_the_teacher_never_sees_the_shadow():
    names = ("student", "teacher")
    moved, _ = one_step(BridgeOptions(meta=False), names)
    reference = Reference(random_policy(*names), names)
    objective = 0.5 * reference.j_sft(DEMOS, names) + 0.5 * reference.j_rl(ROLLOUTS, names)
    g = reference.gradient(objective, "teacher")
    assert_same(moved["teacher"], reference.moved("teacher", BETA, g))


def test_sft_and_rl_climb_their_own_objective_alone():
    reference = Reference(random_policy("student"), ("student",))
    moved, _ = one_step(SftOptions(), ("student",))
    g = reference.gradient(reference.j_sft(DEMOS, ("student",)), "student")
    assert_same(moved["student"], reference.moved("student", ALPHA, g))
    moved, _ = one_step(RlOptions(), ("student",))
    g = reference.gradient(reference.j_rl(ROLLOUTS, ("student",)), "student")
    assert_same(moved["student"], reference.moved("student", ALPHA, g))


@pytest.mark.parametrize("options", [page() for page in METHODS.values()], ids=lambda o: o.name)
def test_accumulation_is_invariant(options):
    names = options.adapters
    if "imitation" in options.optimizers:
        options = options.model_copy(update={"buffer": 1})  # so that it imitates at once
    whole, _ = one_step(options, names, micro_batch=64)
    single, _ = one_step(options, names, micro_batch=1)
    for name in names:
        assert_same(single[name], [p.detach() for p in whole[name]], tolerance=1e-8)


@pytest.mark.parametrize(
    "rl",
    [{}, {"kl_coef": 0.05}, {"kl_coef": 0.05, "mask_truncated": True}],
    ids=["plain", "KL", "KL and mask"],
)
@pytest.mark.parametrize("loss", get_args(RlSpec.model_fields["loss"].annotation))
@pytest.mark.parametrize(
    "options",
    [page() for page in METHODS.values() if page().turns(0, 1).rewards is not None],
    ids=lambda o: o.name,
)
def test_micro_batches_and_padding_change_no_loss(options, loss, rl):
    """Nor any figure; by every method but those of which a step is one of `sft` or of `rl`."""
    if "imitation" in options.optimizers:
        options = options.model_copy(update={"buffer": 1})
    groups = random_groups(2, 3, seed=4, demos=True, rewards=[[1, 0, 1], [0, 0, 0]])
    groups[0].truncated[1] = groups[1].truncated[2] = True
    rl = {"loss": loss, "clip_high": 0.3, **rl}

    def moved(**runtime):
        return one_step(options, options.adapters, demos=DEMOS[:2], groups=groups, rl=rl, **runtime)

    whole, figures = moved(micro_batch=64)
    for parts, same in (moved(micro_batch=1), moved(micro_batch=3, padding_free=True)):
        assert same == pytest.approx(figures, rel=1e-6, abs=1e-6), "in float32"
        for name in options.adapters:
            assert_same(parts[name], [p.detach() for p in whole[name]], tolerance=1e-8)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_mix_climbs_the_weighted_sum_of_both_objectives(lam):
    moved, _ = one_step(MixOptions(**{"lambda": lam}), ("student",))
    reference = Reference(random_policy("student"), ("student",))
    objective = (1 - lam) * reference.j_sft(DEMOS, ("student",)) + lam * reference.j_rl(
        ROLLOUTS, ("student",)
    )
    g = reference.gradient(objective, "student")
    assert_same(moved["student"], reference.moved("student", ALPHA, g))


def run_steps(options, count, optimizer):
    """The student after `count` steps on ever new data."""
    policy = random_policy("student")
    method = make_method(options)
    student = ParameterSet("student", policy.adapters.parameters("student"), optimizer, ALPHA)
    for step in range(count):
        objectives = TokenObjectives(
            policy,
            method,
            tiny_spec(options),
            demos=random_sequences(3, seed=step),
            groups=random_groups(1, 4, seed=100 + step),
        )
        method.begin({"student": student}, step, count)
        method.step(objectives, {"student": student}, step, count)
    return policy, student


def climbed_by_hand(kinds, optimizer, restart_at=None):
    """The same by a list of "sft" and "rl", one objective a step."""
    policy = random_policy("student")
    student = ParameterSet("student", policy.adapters.parameters("student"), optimizer, ALPHA)
    for step, kind in enumerate(kinds):
        if step == restart_at:
            student = ParameterSet(
                "student", policy.adapters.parameters("student"), optimizer, ALPHA
            )
        objectives = TokenObjectives(
            policy,
            make_method(RlOptions()),
            tiny_spec(),
            demos=random_sequences(3, seed=step),
            groups=random_groups(1, 4, seed=100 + step),
        )
        student.ascend(objectives.gradient("student", **{kind: 1.0}).theta)
    return student


def test_alternating_takes_its_steps_in_turn_with_one_optimiser():
    options = AlternatingOptions(sft_steps=2, rl_steps=1)
    _, student = run_steps(options, 5, OptimizerSpec())
    expected = climbed_by_hand(["sft", "sft", "rl", "sft", "sft"], OptimizerSpec())
    assert_same(student.tensors, [t.detach() for t in expected.tensors])


def test_cold_start_is_sft_and_then_rl_with_a_fresh_optimiser():
    optimizer = OptimizerSpec(warmup_steps=1)
    _, student = run_steps(ColdStartOptions(sft_fraction=0.4), 5, optimizer)
    expected = climbed_by_hand(["sft", "sft", "rl", "rl", "rl"], optimizer, restart_at=2)
    assert_same(student.tensors, [t.detach() for t in expected.tensors])
    carried_over = climbed_by_hand(["sft", "sft", "rl", "rl", "rl"], optimizer)
    assert not torch.allclose(student.tensors[0], carried_over.tensors[0], atol=1e-6)


def test_rewards_that_are_all_equal_give_a_gradient_of_exactly_zero():
    flat = random_groups(2, 4, rewards=[[1, 1, 1, 1], [0, 0, 0, 0]])
    before = [p.detach().clone() for p in random_policy("student").adapters.parameters("student")]
    moved, _ = one_step(RlOptions(), ("student",), groups=flat)
    assert all(torch.equal(a, b) for a, b in zip(moved["student"], before, strict=True))


def test_a_rollout_without_advantage_costs_no_pass_and_still_counts_in_the_mean():
    idle = random_groups(1, 4, seed=9, rewards=[[1, 1, 1, 1]])
    moved, _ = one_step(RlOptions(), ("student",), groups=[*GROUPS, *idle])
    reference = Reference(random_policy("student"), ("student",))
    rollouts = [*ROLLOUTS, *idle[0].rollouts]  # of advantage 0
    g = reference.gradient(reference.j_rl(rollouts, ("student",)), "student")
    assert_same(moved["student"], reference.moved("student", ALPHA, g))


def test_kl_term_pulls_toward_the_bare_base():
    policy = random_policy("student")
    objectives = TokenObjectives(
        policy,
        make_method(RlOptions()),
        tiny_spec(rl={"kl_coef": 0.3}, micro_batch=3),
        groups=GROUPS,
    )
    found = objectives.gradient("student", rl=1.0)
    reference = Reference(policy, ("student",))
    total = sum(len(r.completion) for r in ROLLOUTS)
    divergence = 0.0
    for rollout in ROLLOUTS:
        difference = reference.logprobs(rollout, ()).detach() - reference.logprobs(
            rollout, ("student",)
        )
        divergence = divergence + (difference.exp() - difference - 1).sum()
    objective = reference.j_rl(ROLLOUTS, ("student",)) - 0.3 * divergence / total
    assert_same(found.theta.tensors, reference.gradient(objective, "student"))


def test_the_two_clips_are_used_on_their_own_sides():
    policy = random_policy("student")
    spec = tiny_spec(rl={"clip_low": 0.1, "clip_high": 0.6})
    objectives = TokenObjectives(policy, make_method(RlOptions()), spec, groups=GROUPS)
    found = objectives.gradient("student", rl=1.0)
    reference = Reference(policy, ("student",))
    g = reference.gradient(reference.j_rl(ROLLOUTS, ("student",), 0.1, 0.6), "student")
    assert_same(found.theta.tensors, g)


def test_a_fresh_adapter_changes_nothing():
    policy = random_policy("student", "teacher", trained=False)
    bare = with_exact_norms(random_model())
    tokens = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(policy.model(tokens).logits, bare(tokens).logits)
        expected = policy.model(tokens).logits
        with policy.using("student", "teacher"):
            assert torch.equal(policy.model(tokens).logits, expected)
        with policy.using("student", "teacher", merged=True):
            assert torch.equal(policy.model(tokens).logits, expected)


def test_merged_weights_are_the_adapters_and_leave_no_trace():
    policy = random_policy("student", "teacher")
    tokens = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        bare = policy.model(tokens).logits
        with policy.using("student", "teacher"):
            adapted = policy.model(tokens).logits
        with policy.using("student", "teacher", merged=True):
            merged = policy.model(tokens).logits
        assert torch.equal(policy.model(tokens).logits, bare)
    assert not torch.allclose(adapted, bare, atol=1e-3)
    torch.testing.assert_close(merged, adapted, atol=1e-10, rtol=1e-10)


def test_student_teacher_and_shadow_have_one_shape_and_the_rank_of_the_spec():
    policy = random_policy(*NAMES, rank=3)
    shapes = [[p.shape for p in policy.adapters.parameters(n)] for n in NAMES]
    assert shapes[0] == shapes[1] == shapes[2]
    assert {s[0] for s in shapes[0][::2]} == {3} == {s[1] for s in shapes[0][1::2]}
    assert LoraSpec().rank == 8


def test_lambda_one_with_equal_shadow_is_plain_rl_for_ever():
    """While θ̂ = θ the two J_RL cancel to the last bit, so the teacher never moves, so θ̂ = θ."""
    together = random_policy(*NAMES)
    together.adapters.copy("student", "shadow")
    alone = random_policy("student", "teacher")
    bridge, rl = make_method(BridgeOptions(**{"lambda": 1.0})), make_method(RlOptions())
    adam = OptimizerSpec()
    sets = {n: ParameterSet(n, together.adapters.parameters(n), adam, ALPHA) for n in NAMES}
    plain = {"student": ParameterSet("s", alone.adapters.parameters("student"), adam, ALPHA)}
    fixed = [p.detach().clone() for p in together.adapters.parameters("teacher")]
    for step in range(5):
        groups = random_groups(2, 3, seed=step)
        for policy, method, moving in ((together, bridge, sets), (alone, rl, plain)):
            spec = tiny_spec(micro_batch=4)
            objectives = TokenObjectives(policy, method, spec, demos=DEMOS, groups=groups)
            objectives.has_teacher = True  # plain RL beside a teacher that is there and stands
            method.step(objectives, moving, step, 5)
    teacher, shadow = (together.adapters.parameters(n) for n in ("teacher", "shadow"))
    assert all(torch.equal(a, b) for a, b in zip(teacher, fixed, strict=True))
    student = together.adapters.parameters("student")
    assert all(torch.equal(a, b) for a, b in zip(student, shadow, strict=True))
    assert all(
        torch.equal(a, b)
        for a, b in zip(student, alone.adapters.parameters("student"), strict=True)
    )
