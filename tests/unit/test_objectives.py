"""The pure objectives, against closed forms."""

import math

import pytest
import torch

from bridge_engine import objectives
from bridge_engine.evaluate import score
from bridge_engine.objectives import StepTotals, group_advantages
from bridge_engine.spec.train import RlSpec

TOTALS = StepTotals(tokens=5, sequences=2, longest=4)
MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])


def test_grpo_at_ratio_one_is_the_token_mean_of_the_advantages():
    logprobs = torch.randn(2, 3)
    loss, figures = objectives.rl(
        logprobs, logprobs, torch.tensor([1.0, -0.5]), MASK, spec=RlSpec(), totals=TOTALS
    )
    # Σ advantage·length / Σ length, which is not 0 although the advantages may sum to 0
    assert loss.item() == pytest.approx(-(2 * 1.0 - 3 * 0.5) / 5)
    assert figures["clip_ratio"] == 0
    assert figures["logprob_drift"] == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "flows"),
    [
        (1.5, 1.0, 1.2, False),  # too much of a good thing: clipped
        (0.5, 1.0, 0.5, True),
        (1.5, -1.0, -1.5, True),
        (0.5, -1.0, -0.8, False),
        (1.1, 1.0, 1.1, True),
    ],
)
def test_clipping_bites_only_where_it_limits_the_gain(ratio, advantage, expected, flows):
    logprob = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, figures = objectives.rl(
        logprob,
        torch.zeros(1, 1),
        torch.tensor([advantage]),
        torch.ones(1, 1),
        spec=RlSpec(),
        totals=StepTotals(1, 1, 1),
    )
    loss.backward()
    assert loss.item() == pytest.approx(-expected, rel=1e-6)
    assert (logprob.grad.item() != 0) == flows
    assert figures["clip_ratio"] == (0 if flows else 1)


def test_sft_is_the_negative_log_likelihood_per_token_of_the_whole_step():
    logprobs = torch.tensor([[-1.0, -2.0, -99.0], [-3.0, -4.0, -5.0]])
    loss, figures = objectives.sft(logprobs, MASK, total_tokens=10)
    assert loss.item() == figures["sft/nll"] == pytest.approx(15 / 10)


def test_k3_is_zero_for_equal_policies_and_positive_otherwise():
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0]])
    assert torch.equal(objectives.k3(logprobs, logprobs), torch.zeros(2, 3))
    other = logprobs + torch.tensor([[0.3, -0.2, 5.0], [0.1, -0.4, 0.2]])
    difference = (other - logprobs).flatten().tolist()
    expected = [math.exp(d) - d - 1 for d in difference]
    found = objectives.k3(logprobs, other)
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-4)
    assert (found > 0).all()


def test_advantages_are_centred_and_scaled_in_their_own_group():
    found = group_advantages([[1, 0, 0, 0], [1, 1, 1, 0]])
    std = math.sqrt(sum((r - 0.25) ** 2 for r in [1, 0, 0, 0]) / 3)
    assert found[0] == pytest.approx([0.75 / (std + 1e-4)] + [-0.25 / (std + 1e-4)] * 3)
    assert sum(found[1]) == pytest.approx(0)
    assert group_advantages([[1, 0]], "group") == [[0.5, -0.5]]


def test_batch_advantages_are_centred_in_the_group_and_scaled_by_all_rewards():
    found = group_advantages([[1, 0], [1, 1], [0, None]], "batch_std")
    std = math.sqrt(sum((r - 0.6) ** 2 for r in [1, 0, 1, 1, 0]) / 4) + 1e-4
    assert found[0] == pytest.approx([0.5 / std, -0.5 / std])
    assert found[1:] == [[0.0, 0.0], [0.0, None]]


def test_an_unjudged_answer_is_left_out_of_its_group_and_never_counts_as_wrong():
    with_unjudged = group_advantages([[1, None, 0, 0]], "group")[0]
    assert with_unjudged == pytest.approx([2 / 3, None, -1 / 3, -1 / 3])
    assert group_advantages([[1, None]]) == [[0.0, None]]


def test_a_group_of_equal_rewards_has_advantage_exactly_zero():
    assert group_advantages([[0.1] * 3, [0.3] * 3]) == [[0.0] * 3] * 2


def test_unjudged_answers_are_counted_apart_from_wrong_ones():
    result = score([True, False, None, True], ["a", "a", "b", "b"], truncated=1)
    assert (result.right, result.judged, result.unjudged) == (2, 3, 1)
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.by_kind == {"a": 0.5, "b": 1.0}
