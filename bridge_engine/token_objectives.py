"""J_SFT and J_RL of one step's sequences, and their gradients: what a method's step is given.

Everything is normalised by the token counts of the whole step, so the split into micro-batches
changes memory and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bridge_engine import objectives
from bridge_engine.adapters import AdaptedModel
from bridge_engine.methods import Gradient, Method
from bridge_engine.objectives import Metrics
from bridge_engine.policy import Policy
from bridge_engine.sequences import Padded, TokenSequence, micro_batches
from bridge_engine.spec import RlSpec
from bridge_engine.vector import Vector


class TokenObjectives:
    """The objectives on a batch of demonstrations and a batch of rollouts."""

    def __init__(
        self,
        policy: Policy,
        method: Method[Any],
        *,
        demos: Sequence[TokenSequence] = (),
        rollouts: Sequence[TokenSequence] = (),
        rl: RlSpec,
        micro_batch: int,
    ) -> None:
        self.policy = policy
        self.has_teacher = "teacher" in method.options.adapters
        self.rl = rl
        self.micro_batch = micro_batch
        self.demos = demos
        self.demo_tokens = max(1, sum(len(s.completion) for s in demos))
        # A rollout of advantage 0 has gradient 0: it counts in the mean, but no pass is spent on it
        # (unless the KL term, which has no advantage, wants it).
        self.rollouts = [s for s in rollouts if s.advantage != 0 or rl.kl_coef > 0]
        self.rollout_tokens = max(1, sum(len(s.completion) for s in rollouts))
        self.computed_tokens = max(1, sum(len(s.completion) for s in self.rollouts))

    def gradient(self, theta: str, *, sft: float = 0.0, rl: float = 0.0) -> Gradient:
        """See `bridge_engine.methods.Objectives`. One backward per micro-batch gives both parts."""
        names = (theta, "teacher") if self.has_teacher else (theta,)
        metrics: Metrics = {}
        if sft:
            for batch in self._batches(self.demos):
                self._backward(sft, self._sft_loss(batch, names, metrics))
        if rl:
            metrics["objective"] = 0.0  # also where no rollout has anything to say
            for batch in self._batches(self.rollouts):
                self._backward(rl, self._rl_loss(batch, names, metrics))
        adapters = self.policy.adapters
        return Gradient(
            theta=_take_ascent(adapters, theta),
            w=_take_ascent(adapters, "teacher") if self.has_teacher else None,
            metrics=metrics,
        )

    def _batches(self, sequences: Sequence[TokenSequence]) -> list[Padded]:
        return list(
            micro_batches(
                sequences, self.micro_batch, pad_id=self.policy.pad_id, device=self.policy.device
            )
        )

    @staticmethod
    def _backward(weight: float, loss: Tensor) -> None:
        (weight * loss).backward()  # type: ignore[no-untyped-call]

    def _sft_loss(self, batch: Padded, names: tuple[str, ...], metrics: Metrics) -> Tensor:
        with self.policy.using(*names):
            logprobs_BT, _ = self.policy.logprobs(batch)
        loss, figures = objectives.sft(logprobs_BT, batch.mask_BT, total_tokens=self.demo_tokens)
        _add(metrics, figures)
        return loss

    def _rl_loss(self, batch: Padded, names: tuple[str, ...], metrics: Metrics) -> Tensor:
        with self.policy.using(*names):
            logprobs_BT, entropy_BT = self.policy.logprobs(batch)
        loss, figures = objectives.grpo(
            logprobs_BT,
            batch.behaviour_BT,
            batch.advantages_B,
            batch.mask_BT,
            clip_low=self.rl.clip_low,
            clip_high=self.rl.clip_high,
            total_tokens=self.rollout_tokens,
        )
        # means over the tokens that were computed (advantage not 0), whatever the micro-batches
        share = self.rollout_tokens / self.computed_tokens
        figures["logprob_drift"] *= share
        figures["entropy"] = entropy_BT.sum().item() / self.computed_tokens
        if self.rl.kl_coef > 0:
            with torch.no_grad(), self.policy.using():
                reference_BT, _ = self.policy.logprobs(batch)
            penalty, penalty_figures = objectives.kl(
                logprobs_BT, reference_BT, batch.mask_BT, total_tokens=self.rollout_tokens
            )
            loss = loss + self.rl.kl_coef * penalty
            figures["objective"] -= self.rl.kl_coef * penalty.item()
            figures |= penalty_figures
        _add(metrics, figures)
        return loss


def _add(metrics: Metrics, figures: Metrics) -> None:
    for key, value in figures.items():
        metrics[key] = metrics.get(key, 0.0) + value


def _take_ascent(adapters: AdaptedModel, name: str) -> Vector:
    """Takes the accumulated gradients of a loss away, as the ascent direction of its objective."""
    taken = []
    for parameter in adapters.parameters(name):
        gradient = parameter.grad
        taken.append(torch.zeros_like(parameter) if gradient is None else -gradient)
        parameter.grad = None
    return Vector(taken)
