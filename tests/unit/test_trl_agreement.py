"""J_RL against TRL's own loss code, on the same tensors.

`GRPOTrainer._compute_loss` is called as it stands, on a trainer that was never started: the
log-probabilities it would get from a model are handed to it, so that both sides differentiate the
same leaf. TRL is a test dependency; nothing of the engine needs it.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from bridge_engine import objectives
from bridge_engine.objectives import StepTotals, group_advantages, importance_weights
from bridge_engine.spec.train import RlSpec

grpo = pytest.importorskip("trl.trainer.grpo_trainer")

B, T, LONGEST = 6, 7, 9
TRL_LOSS = {"dapo": "dapo", "grpo": "grpo", "dr_grpo": "dr_grpo", "gspo": "grpo", "cispo": "cispo"}


class OneProcess:
    """Stands where accelerate stands, in one process."""

    num_processes = 1
    sync_gradients = True

    @staticmethod
    def gather(x):
        return x

    @staticmethod
    def reduce(x, reduction):
        return x


def trl_loss(spec, logprobs_BT, tensors, mask_BT, tokens):
    """The loss that TRL computes from these log-probabilities."""
    trainer = object.__new__(grpo.GRPOTrainer)
    trainer.loss_type = TRL_LOSS[spec.loss]
    trainer.importance_sampling_level = "sequence" if spec.loss == "gspo" else "token"
    trainer.epsilon_low = spec.clip_low
    trainer.epsilon_high = spec.clip_high + (1 if spec.loss == "cispo" else 0)
    trainer.beta = spec.kl_coef
    trainer.max_completion_length = LONGEST
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = "weights" in tensors
    trainer.top_entropy_quantile = 1.0
    trainer.off_policy_mask_threshold = None
    trainer.aux_loss_enabled = trainer._entropy_bonus_enabled = False
    trainer.current_gradient_accumulation_steps = 1
    trainer.args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    trainer.model = SimpleNamespace(training=True)
    trainer.accelerator = OneProcess()
    trainer._metrics = defaultdict(lambda: defaultdict(list))
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
        logprobs_BT,
        torch.zeros(B, T),
        None,
    )
    ids_BT = torch.zeros(B, T, dtype=torch.long)
    inputs = {
        "prompt_ids": ids_BT[:, :1],
        "prompt_mask": torch.ones(B, 1),
        "completion_ids": ids_BT,
        "completion_mask": mask_BT,
        "advantages": tensors["advantages"],
        "old_per_token_logps": tensors["behaviour"],
        "ref_per_token_logps": tensors["reference"],
        "importance_sampling_ratio": tensors.get("weights"),
        "num_items_in_batch": torch.tensor(float(tokens)),
    }
    return trainer._compute_loss(trainer.model, inputs), trainer._metrics["train"]


def random_tensors(seed=0):
    """Log-probabilities apart enough that every clip bites somewhere; uneven lengths."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    logprobs_BT = -1 + 0.5 * draw(B, T)
    lengths_B = torch.tensor([7, 3, 1, 5, 7, 2])
    mask_BT = (torch.arange(T) < lengths_B.unsqueeze(1)).double()
    tensors = {
        "behaviour": logprobs_BT + 0.3 * draw(B, T),
        "reference": logprobs_BT + 0.4 * draw(B, T),
        "advantages": draw(B),
    }
    return logprobs_BT, tensors, mask_BT


def both(spec, mask_BT, tensors, logprobs_BT, sequences=B):
    """((our loss, its gradient), (TRL's loss, its gradient), their metrics)."""
    tokens = int(mask_BT.sum())
    ours_BT = logprobs_BT.clone().requires_grad_()
    loss, figures = objectives.rl(
        ours_BT,
        tensors["behaviour"],
        tensors["advantages"],
        mask_BT,
        spec=spec,
        totals=StepTotals(tokens, sequences, LONGEST),
        reference_BT=tensors["reference"] if spec.kl_coef else None,
        weights_BT=tensors.get("weights"),
    )
    loss.backward()
    theirs_BT = logprobs_BT.clone().requires_grad_()
    expected, their_figures = trl_loss(spec, theirs_BT, tensors, mask_BT, tokens)
    expected.backward()
    return (loss, ours_BT.grad, figures), (expected, theirs_BT.grad, their_figures)


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("clip_high", [0.2, 0.28])
@pytest.mark.parametrize("loss", TRL_LOSS)
def test_every_loss_and_its_gradient_is_trls(loss, clip_high, kl_coef):
    spec = RlSpec(loss=loss, clip_high=clip_high, kl_coef=kl_coef)
    logprobs_BT, tensors, mask_BT = random_tensors()
    ours, theirs = both(spec, mask_BT, tensors, logprobs_BT)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-12, atol=1e-12)
    assert ours[1].abs().sum() > 0
    if kl_coef:
        assert ours[2]["kl"] == pytest.approx(theirs[2]["kl"][0])
    if loss in ("dapo", "grpo", "dr_grpo"):
        assert 0 < ours[2]["clip_ratio"] == pytest.approx(theirs[2]["clip_ratio/region_mean"][0])


@pytest.mark.parametrize("loss", TRL_LOSS)
def test_the_capped_importance_weights_enter_as_in_trl(loss):
    logprobs_BT, tensors, mask_BT = random_tensors()
    sampler_BT = tensors["behaviour"] + 0.8 * torch.randn(
        B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(9)
    )
    quotient_BT = (tensors["behaviour"] - sampler_BT).exp()
    tensors["weights"] = quotient_BT.clamp(max=1.5)  # TRL's `token_truncate`
    assert (quotient_BT > 1.5).any()
    ours, theirs = both(RlSpec(loss=loss, kl_coef=0.1), mask_BT, tensors, logprobs_BT)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-12, atol=1e-12)
    row = importance_weights(tensors["behaviour"][0].tolist(), sampler_BT[0].tolist(), 1.5)
    assert row == pytest.approx(tensors["weights"][0].tolist(), rel=1e-5)


@pytest.mark.parametrize("loss", TRL_LOSS)
def test_masking_a_truncated_completion_is_trls(loss):
    """TRL zeroes its mask; ours leaves it out of the pass and counts it among the sequences."""
    logprobs_BT, tensors, mask_BT = random_tensors()
    kept_B = torch.tensor([True, True, True, True, False, True])
    theirs_mask_BT = mask_BT * kept_B.unsqueeze(1)
    spec = RlSpec(loss=loss)
    expected, _ = trl_loss(
        spec, logprobs_BT.clone(), tensors, theirs_mask_BT, theirs_mask_BT.sum().item()
    )
    loss_value, _ = objectives.rl(
        logprobs_BT[kept_B],
        tensors["behaviour"][kept_B],
        tensors["advantages"][kept_B],
        mask_BT[kept_B],
        spec=spec,
        totals=StepTotals(int(theirs_mask_BT.sum()), B, LONGEST),
    )
    torch.testing.assert_close(loss_value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("group_std", "group"), ("group", "none"), ("batch_std", "batch")]
)
def test_advantages_are_trls(ours, theirs):
    rewards = [[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0.5, 0, 1, 0]]
    found = torch.tensor(group_advantages(rewards, ours), dtype=torch.float64)
    flat = torch.tensor(rewards, dtype=torch.float64).flatten()
    torch.testing.assert_close(found.flatten(), trl_advantages(flat, 4, theirs))


def trl_advantages(rewards, size, scale):
    """Read from `GRPOTrainer._generate_and_score_completions`, whose arithmetic is not a function
    of its own: r − mean of the group, over nanstd of the group or of the batch, + 1e-4."""
    groups = rewards.view(-1, size)
    centred = rewards - grpo.torch.nanmean(groups, dim=1).repeat_interleave(size)
    if scale == "none":
        return centred
    std = (
        grpo.nanstd(groups, dim=1).repeat_interleave(size)
        if scale == "group"
        else grpo.nanstd(rewards).expand_as(rewards)
    )
    return centred / (std + 1e-4)
