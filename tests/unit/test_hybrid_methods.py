"""CHORD, LUFFY, SRFT, HPT and ReLIFT: one step of each against its published formula in float64.

The formulas are written out here with the reference's log-probabilities; nothing of the engine's
objectives is used.
"""

import math
import statistics

import pytest
import torch

from bridge_engine.methods import make_method
from bridge_engine.methods.chord import ChordOptions, MuSchedule
from bridge_engine.methods.hpt import HptOptions
from bridge_engine.methods.luffy import LuffyOptions
from bridge_engine.methods.relift import ReliftOptions
from bridge_engine.methods.srft import SrftOptions
from bridge_engine.parameters import ParameterSet
from bridge_engine.token_objectives import TokenObjectives
from tests.support.reference import Reference
from tests.support.tiny import random_groups, random_policy, random_sequences, with_advantages
from tests.unit.test_updates import ALPHA, SGD, assert_same, one_step, tiny_spec

STUDENT = ("student",)
DEMOS = random_sequences(5, seed=3)


@pytest.fixture
def reference():
    return Reference(random_policy("student"), STUDENT)


def assert_climbs(reference, options, objective, **data):
    moved, metrics = one_step(options, STUDENT, **data)
    g = reference.gradient(objective, "student")
    assert_same(moved["student"], reference.moved("student", ALPHA, g))
    return metrics


# --------------------------------------------------------------------------- CHORD


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0])
def test_chord_mu_climbs_the_weighted_sum(reference, mu):
    groups = random_groups(2, 4, seed=4)
    objective = mu * reference.j_sft(DEMOS, STUDENT) + (1 - mu) * reference.j_rl(
        with_advantages(groups), STUDENT
    )
    metrics = assert_climbs(reference, ChordOptions(mu=mu), objective, demos=DEMOS, groups=groups)
    assert metrics["mu"] == mu


def test_chord_phi_weighs_each_token_by_p_times_one_minus_p_and_does_not_follow_its_gradient(
    reference,
):
    total = sum(len(d.completion) for d in DEMOS)
    imitation = 0.0
    for demo in DEMOS:
        logprobs = reference.logprobs(demo, STUDENT)
        p = logprobs.exp().detach()
        imitation = imitation + (p * (1 - p) * logprobs).sum() / total
    groups = random_groups(2, 4, seed=4)
    objective = 0.1 * imitation + 0.9 * reference.j_rl(with_advantages(groups), STUDENT)
    options = ChordOptions(mu=0.1, phi=True)
    metrics = assert_climbs(reference, options, objective, demos=DEMOS, groups=groups)
    plain = -reference.j_sft(DEMOS, STUDENT).item()
    assert metrics["sft/nll"] == pytest.approx(plain, rel=1e-6), "the likelihood, not the loss"


def test_chords_weight_rises_to_its_peak_and_falls_to_its_valley():
    schedule = MuSchedule(peak=0.9, valley=0.05, warmup_steps=4, decay_steps=200)
    rising = [schedule.at(step) for step in range(5)]
    assert rising == pytest.approx([0.18, 0.36, 0.54, 0.72, 0.9])
    assert schedule.at(104) == pytest.approx((0.9 + 0.05) / 2)
    assert schedule.at(204) == schedule.at(9999) == pytest.approx(0.05)
    assert MuSchedule().at(0) == 0.9


# --------------------------------------------------------------------------- LUFFY


def test_luffy_puts_the_expert_into_the_group_with_a_shaped_weight_and_no_std(reference):
    groups = random_groups(2, 3, seed=5, rewards=[[1, 0, 0], [0, 0, 0]], demos=True)
    tokens, objective = 0, 0.0
    for group in groups:
        expert = DEMOS[group.demo]
        mean = statistics.mean([*group.rewards, 1.0])
        for rollout, reward in zip(group.rollouts, group.rewards, strict=True):
            old = torch.tensor(rollout.behaviour, dtype=torch.float32).double()
            ratio = (reference.logprobs(rollout, STUDENT) - old).exp()
            advantage = reward - mean
            kept = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            objective, tokens = objective + kept.sum(), tokens + len(rollout.completion)
        p = reference.logprobs(expert, STUDENT).exp()
        objective = objective + ((1 - mean) * p / (p + 0.1)).sum()
        tokens += len(expert.completion)
    assert_climbs(reference, LuffyOptions(), objective / tokens, groups=groups)


def test_luffy_learns_from_a_problem_that_no_rollout_solves_and_not_from_one_that_all_do(reference):
    hopeless = random_groups(1, 3, seed=5, rewards=[[0, 0, 0]], demos=True)
    before = [p.detach().clone() for p in random_policy("student").parameters("student")]
    moved, _ = one_step(LuffyOptions(), STUDENT, groups=hopeless)
    assert not torch.equal(moved["student"][0], before[0])
    easy = random_groups(1, 3, seed=5, rewards=[[1, 1, 1]], demos=True)
    moved, _ = one_step(LuffyOptions(), STUDENT, groups=easy)
    assert all(torch.equal(a, b) for a, b in zip(moved["student"], before, strict=True))


# --------------------------------------------------------------------------- SRFT


def test_srft_weighs_imitation_and_right_answers_by_entropies_taken_as_constants(reference):
    groups = random_groups(2, 3, seed=6, rewards=[[1, 0, 0], [1, 1, 0]])
    rollouts = [(s, r) for g in groups for s, r in zip(g.rollouts, g.rewards, strict=True)]
    total = sum(len(s.completion) for s, _ in rollouts)
    right = sum(_ratio(reference, s).clamp(max=1.2).sum() for s, r in rollouts if r) / total
    wrong = sum(_ratio(reference, s).clamp(min=0.8).sum() for s, r in rollouts if not r) / total
    demos_entropy = _entropy(reference, DEMOS)
    entropy = _entropy(reference, [s for s, _ in rollouts])
    objective = (
        0.5 * math.exp(-demos_entropy) * reference.j_sft(DEMOS, STUDENT)
        + 0.1 * math.exp(entropy) * right
        - wrong
    )
    metrics = assert_climbs(reference, SrftOptions(), objective, demos=DEMOS, groups=groups)
    assert metrics["entropy"] == pytest.approx(entropy, rel=1e-6)
    assert metrics["weight/right"] == pytest.approx(0.1 * math.exp(entropy), rel=1e-6)


def _ratio(reference, rollout):
    old = torch.tensor(rollout.behaviour, dtype=torch.float32).double()
    return (reference.logprobs(rollout, STUDENT) - old).exp()


def _entropy(reference, sequences):
    """Mean entropy per token, from the whole distribution at each place."""
    total, tokens = 0.0, 0
    for sequence in sequences:
        logits = reference.logits(sequence, STUDENT)
        found = torch.distributions.Categorical(logits=logits.detach()).entropy()
        total, tokens = total + found.sum().item(), tokens + len(found)
    return total / tokens


# --------------------------------------------------------------------------- HPT


@pytest.mark.parametrize(
    ("gate", "imitated"), [(0, [0]), (1, [0, 1]), (3, [0, 1, 2])], ids=["none", "one", "all"]
)
def test_hpt_imitates_what_is_not_solved_and_explores_the_rest(reference, gate, imitated):
    rewards = [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    groups = random_groups(3, 3, seed=7, rewards=rewards, demos=True)
    solved = [g for i, g in enumerate(groups) if i not in imitated]
    objective = len(imitated) / 3 * reference.j_sft([DEMOS[i] for i in imitated], STUDENT)
    if solved:
        objective = objective + len(solved) / 3 * reference.j_rl(with_advantages(solved), STUDENT)
    metrics = assert_climbs(reference, HptOptions(gate=gate), objective, groups=groups)
    assert metrics["imitated"] == pytest.approx(len(imitated) / 3)


def test_hpt_does_not_take_an_unjudged_group_for_a_failed_one(reference):
    rewards = [[None, None, None], [1, 0, 0]]
    groups = random_groups(2, 3, seed=7, rewards=rewards, demos=True)
    objective = reference.j_rl(with_advantages(groups[1:]), STUDENT)
    metrics = assert_climbs(reference, HptOptions(), objective, groups=groups)
    assert metrics["imitated"] == 0


# --------------------------------------------------------------------------- ReLIFT


def relift_steps(options, batches):
    """ReLIFT on these batches of groups, with plain gradient ascent; (method, policy, figures)."""
    policy = random_policy("student")
    method = make_method(options)
    sets = {
        n: ParameterSet(n, policy.parameters("student"), SGD, ALPHA)
        for n in ("student", "imitation")
    }
    figures = []
    for step, groups in enumerate(batches):
        objectives = TokenObjectives(
            policy, method, tiny_spec(options), groups=groups, library=DEMOS
        )
        figures.append(method.step(objectives, sets, step, len(batches)))
    return method, policy, figures


def test_relift_collects_failed_problems_once_each_and_imitates_them_when_there_are_enough():
    failed = random_groups(3, 3, seed=8, rewards=[[0, 0, 0], [1, 0, 0], [0, 0, 0]], demos=True)
    method, _, figures = relift_steps(ReliftOptions(buffer=3), [failed, failed])
    assert method.buffer == [0, 2], "twice failed, once collected; the solved one is not"
    assert [f["buffer"] for f in figures] == [2, 2]
    more = random_groups(5, 3, seed=9, rewards=[[1, 0, 0]] * 4 + [[0, 0, 0]], demos=True)
    method, policy, figures = relift_steps(ReliftOptions(buffer=3), [failed, more])
    assert method.buffer == []
    assert "grad_norm/imitation" not in figures[0]

    by_hand = random_policy("student")
    student = ParameterSet("student", by_hand.parameters("student"), SGD, ALPHA)
    for groups in (failed, more):
        objectives = TokenObjectives(by_hand, method, tiny_spec(), groups=groups)
        student.ascend(objectives.gradient("student", rl=1.0).theta)
    lesson = TokenObjectives(by_hand, method, tiny_spec(), demos=[DEMOS[i] for i in (0, 2, 4)])
    student.ascend(lesson.gradient("student", sft=1.0).theta)
    assert_same(policy.parameters("student"), [p.detach() for p in by_hand.parameters("student")])


def test_relifts_buffer_is_part_of_its_state():
    method = make_method(ReliftOptions())
    method.buffer = [3, 1]
    again = make_method(ReliftOptions())
    again.load(method.state())
    assert again.buffer == [3, 1]
