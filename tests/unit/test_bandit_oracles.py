"""BRIDGE on problems small enough to solve by hand, through the very method code that trains.

A policy over three arms, π = softmax(θ + w), with exact gradients instead of samples:
∇J_SFT = q − π, and ∇J_RL = π∘(r − π·r), less μθ for the regularised problem. The expected figures
were derived by hand from the paper's equations (and agree with an independent prototype).
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bridge_engine.methods import Gradient, Method
from bridge_engine.methods.bridge import Bridge, BridgeOptions
from bridge_engine.parameters import ParameterSet
from bridge_engine.spec.train import OptimizerSpec
from bridge_engine.vector import Vector

EXACT = OptimizerSpec(name="sgd", max_grad_norm=None)


class Bandit:
    """Objectives of a 3-armed bandit with exact gradients, in float64."""

    def __init__(self, demo, reward, mu=0.0):
        self.demo, self.reward = torch.tensor(demo).double(), torch.tensor(reward).double()
        self.mu = mu
        self.values = {
            name: nn.Parameter(torch.zeros(3, dtype=torch.float64))
            for name in ("student", "teacher", "shadow")
        }

    def policy(self, theta="student"):
        return torch.softmax(self.values[theta] + self.values["teacher"], 0).detach()

    def gradient(self, theta, *, sft=0.0, rl=0.0):
        pi = self.policy(theta)
        imitate = self.demo - pi
        reinforce = pi * (self.reward - pi @ self.reward)
        both = sft * imitate + rl * reinforce
        regularised = both - rl * self.mu * self.values[theta].detach()
        return Gradient(Vector([regularised]), Vector([both]))

    def sets(self, alpha, beta):
        rates = {"student": alpha, "shadow": alpha, "teacher": beta}
        return {n: ParameterSet(n, [v], EXACT, rates[n]) for n, v in self.values.items()}


def close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(
        actual.detach(), torch.tensor(expected).double(), atol=tolerance, rtol=0
    )


def run(bandit: Bandit, method: Method, steps: int, alpha=1.0, beta=1.0):
    sets = bandit.sets(alpha, beta)
    for step in range(steps):
        method.step(bandit, sets, step, steps)


def bridge(lam, meta=True):
    return Bridge(BridgeOptions(**{"lambda": lam, "meta": meta}))


def test_one_step_moves_student_shadow_and_teacher_as_computed_by_hand():
    bandit = Bandit(demo=[0.0, 1.0, 0.0], reward=[1.0, 0.0, 0.0])
    run(bandit, bridge(0.5), 1)
    close(bandit.values["student"], [-0.055556, 0.277778, -0.222222])
    close(bandit.values["shadow"], [0.222222, -0.111111, -0.111111])
    close(bandit.values["teacher"], [-0.166667, 0.333333, -0.166667])


def test_two_steps_use_the_parameters_before_each_step_for_all_three_updates():
    bandit = Bandit(demo=[0.0, 1.0, 0.0], reward=[1.0, 0.0, 0.0])
    run(bandit, bridge(0.5), 2)
    close(bandit.values["student"], [-0.084623, 0.433498, -0.348876])
    close(bandit.values["shadow"], [0.448222, -0.251786, -0.196435])
    close(bandit.values["teacher"], [-0.308734, 0.559392, -0.250658])


@pytest.mark.parametrize("lam", [0.3, 0.5, 0.7])
def test_bridge_reaches_the_bilevel_optimum_whatever_lambda(lam):
    # stationarity of the shadow forces θ = θ̂ and π = q, so θ* = q∘(r − q·r)/μ for every λ
    bandit = Bandit(demo=[0.7, 0.2, 0.1], reward=[1.0, 0.0, 0.5], mu=0.5)
    run(bandit, bridge(lam), 4_000, alpha=1.0, beta=1.0)
    close(bandit.policy(), [0.7, 0.2, 0.1])
    close(bandit.values["student"], [0.35, -0.30, -0.05])
    close(bandit.values["shadow"], [0.35, -0.30, -0.05])
    teacher = bandit.values["teacher"].detach()
    # w* = log q − θ* up to a constant; the oracle is given with mean 0
    close(teacher - teacher.mean(), [0.716224, 0.113461, -0.829686])


@pytest.mark.parametrize(
    ("lam", "policy"),
    [(0.5, [0.818417, 0.107799, 0.073784]), (0.3, [0.763041, 0.148594, 0.088365])],
)
def test_without_the_meta_term_the_optimum_depends_on_lambda_and_theta_vanishes(lam, policy):
    bandit = Bandit(demo=[0.7, 0.2, 0.1], reward=[1.0, 0.0, 0.5], mu=0.5)
    run(bandit, bridge(lam, meta=False), 4_000, alpha=1.0, beta=1.0)
    close(bandit.policy(), policy)
    close(bandit.values["student"], [0.0, 0.0, 0.0])


def test_lambda_one_with_equal_shadow_is_plain_rl_for_ever():
    bandit = Bandit(demo=[0.0, 1.0, 0.0], reward=[1.0, 0.0, 0.2])
    theta = torch.zeros(3, dtype=torch.float64)
    sets, method = bandit.sets(0.7, 0.9), bridge(1.0)
    for step in range(200):
        method.step(bandit, sets, step, 200)
        pi = torch.softmax(theta, 0)
        theta = theta + 0.7 * pi * (bandit.reward - pi @ bandit.reward)
        assert torch.equal(bandit.values["teacher"], torch.zeros(3, dtype=torch.float64))
        torch.testing.assert_close(bandit.values["student"].detach(), theta, atol=1e-12, rtol=0)
        assert torch.equal(bandit.values["shadow"], bandit.values["student"])


def test_lambda_zero_moves_student_and_teacher_by_sft_alone():
    bandit = Bandit(demo=[0.0, 1.0, 0.0], reward=[1.0, 0.0, 0.0])
    sets, method = bandit.sets(0.5, 0.25), bridge(0.0)
    theta = torch.zeros(3, dtype=torch.float64)
    w = torch.zeros(3, dtype=torch.float64)
    for step in range(50):
        method.step(bandit, sets, step, 50)
        imitate = bandit.demo - torch.softmax(theta + w, 0)
        theta, w = theta + 0.5 * imitate, w + 0.25 * imitate
        torch.testing.assert_close(bandit.values["student"].detach(), theta, atol=1e-12, rtol=0)
        torch.testing.assert_close(bandit.values["teacher"].detach(), w, atol=1e-12, rtol=0)


def test_lambda_schedule_runs_from_its_start_to_its_end():
    options = BridgeOptions(**{"lambda": {"start": 0.2, "end": 0.8}})
    assert [round(options.lambda_at(s, 4), 6) for s in range(4)] == [0.2, 0.4, 0.6, 0.8]
    seen = []
    objectives = SimpleNamespace(
        gradient=lambda theta, sft=0.0, rl=0.0: (
            seen.append((theta, round(sft, 6), round(rl, 6)))
            or Gradient(Vector([torch.zeros(1)]), Vector([torch.zeros(1)]))
        )
    )
    movable = SimpleNamespace(ascend=lambda g: 0.0)
    method = Bridge(options)
    for step in range(4):
        method.step(objectives, dict.fromkeys(method.options.adapters, movable), step, 4)
    assert [call for call in seen if call[0] == "student"] == [
        ("student", 0.8, 0.2),
        ("student", 0.6, 0.4),
        ("student", 0.4, 0.6),
        ("student", 0.2, 0.8),
    ]
    assert all(call[1:] == (0.0, 1.0) for call in seen if call[0] == "shadow")
