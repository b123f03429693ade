"""J_SFT and J_RL of one update's sequences, and their gradients: what a method's step is given.

Everything is normalised by the counts of the whole update, so the split into micro-batches changes
memory and nothing else, and so does the split over ranks: each passes its share of the sequences,
and what they found is added up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bridge_engine import objectives
from bridge_engine.distributed.ranks import World
from bridge_engine.distributed.sharding import empty_pass, is_shard
from bridge_engine.errors import NonFinite
from bridge_engine.forward.sequences import MicroBatch, TokenSequence, micro_batches
from bridge_engine.groups import RolloutGroup
from bridge_engine.methods import Exploration, Gradient, Imitation, Method
from bridge_engine.metrics import Metrics
from bridge_engine.objectives import StepTotals, group_advantages
from bridge_engine.policy import Policy
from bridge_engine.spec.train import TrainSpec
from bridge_engine.vector import Vector


class TokenObjectives:
    """The objectives on a batch of demonstrations and the groups of a batch of rollouts."""

    def __init__(
        self,
        policy: Policy,
        method: Method[Any],
        spec: TrainSpec,
        *,
        demos: Sequence[TokenSequence] = (),
        groups: Sequence[RolloutGroup] = (),
        library: Sequence[TokenSequence] = (),
        step_groups: Sequence[RolloutGroup] | None = None,
        world: World | None = None,
    ) -> None:
        """`demos` are the update's own, `library` all of the run's, for `Imitation.demos`;
        `step_groups` are those of all the step's mini-batches, for advantages over the batch.
        Every rank of `world` is given the same."""
        self.policy = policy
        self.has_teacher = "teacher" in method.options.adapters
        self.spec = spec
        self.demos = demos
        self.groups = groups
        self.library = library
        self.step_groups = groups if step_groups is None else step_groups
        self.world = world or World()

    def gradient(
        self, theta: str, *, sft: float | Imitation = 0.0, rl: float | Exploration = 0.0
    ) -> Gradient:
        """See `bridge_engine.methods.Objectives`. One backward per micro-batch gives both parts."""
        imitation = sft if isinstance(sft, Imitation) else Imitation(sft)
        exploration = rl if isinstance(rl, Exploration) else Exploration(rl)
        names = (theta, "teacher") if self.has_teacher else (theta,)
        metrics: Metrics = {}
        tokens = 0
        with self.policy.on_device(*names):
            if imitation.weight:
                self._imitate(imitation, names, metrics)
            if exploration.weight:
                tokens = self._explore(exploration, names, metrics)
        found = {name: Vector(_take(self.policy.parameters(name))) for name in names}
        accumulated = [tensor for vector in found.values() for tensor in vector.tensors]
        self.world.sum_([tensor for tensor in accumulated if not is_shard(tensor)])
        metrics = self.world.add(metrics)
        _refuse_non_finite(metrics, found)
        return Gradient(
            theta=found[theta],
            w=found.get("teacher"),
            metrics=metrics,
            rollout_tokens=tokens,
        )

    # ------------------------------------------------------------------ J_SFT

    def _imitate(self, term: Imitation, names: tuple[str, ...], metrics: Metrics) -> None:
        demos = self.demos if term.demos is None else [self.library[i] for i in term.demos]
        total = max(1, sum(len(s.completion) for s in demos))
        for batch, counts in self._batches(demos):
            with self._backward(names, term.weight) as losses:
                logprobs_BT, entropy_BT = self.policy.logprobs(batch)
                weights_BT = objectives.phi(logprobs_BT) if term.token_weight == "phi" else None
                loss, figures = objectives.sft(
                    logprobs_BT, batch.mask_BT, total_tokens=total, weights_BT=weights_BT
                )
                losses.append(loss if counts else empty_pass(logprobs_BT))
            figures["sft/entropy"] = entropy_BT.sum().item() / total
            _add(metrics, figures if counts else {})

    # ------------------------------------------------------------------ J_RL

    def _explore(self, term: Exploration, names: tuple[str, ...], metrics: Metrics) -> int:
        """Accumulates the gradient; returns the tokens of the rollouts that took a pass."""
        groups: Sequence[RolloutGroup] = self.groups if term.groups is None else term.groups
        rollouts, experts = self._with_advantages(term, groups)
        kept = [s for s, cut in rollouts if not (cut and self.spec.rl.mask_truncated)]
        totals = StepTotals(
            tokens=max(1, sum(len(s.completion) for s in (*kept, *experts))),
            sequences=max(1, len(rollouts) + len(experts)),
            longest=self.spec.rollout.max_new_tokens,
        )
        # A rollout of advantage 0 has gradient 0: it counts in the mean, but no pass is spent on it
        # (unless the KL term, which has no advantage, wants it).
        passing = [s for s in kept if s.advantage != 0 or self.spec.rl.kl_coef > 0]
        computed = sum(len(s.completion) for s in passing)  # 0 where all of them are empty
        metrics["objective"] = 0.0  # also where no rollout has anything to say
        for batch, counts in self._batches(passing):
            figures = self._surrogate(batch, names, term.weight, totals, counts)
            # means over the tokens that were computed, whatever the micro-batches
            figures["logprob_drift"] *= totals.tokens / max(1, computed)
            figures["entropy"] /= max(1, computed)
            _add(metrics, figures if counts else {})
        for batch, counts in self._batches([s for s in experts if s.advantage != 0]):
            assert term.gamma is not None
            with self._backward(names, term.weight) as losses:
                logprobs_BT, _ = self.policy.logprobs(batch)
                loss, figures = objectives.shaped(
                    logprobs_BT,
                    batch.advantages_B,
                    batch.mask_BT,
                    gamma=term.gamma,
                    spec=self.spec.rl,
                    totals=totals,
                )
                losses.append(loss if counts else empty_pass(logprobs_BT))
            _add(metrics, figures if counts else {})
        return computed

    def _surrogate(
        self,
        batch: MicroBatch,
        names: tuple[str, ...],
        weight: float,
        totals: StepTotals,
        counts: bool,
    ) -> Metrics:
        reference_BT = None
        if self.spec.rl.kl_coef > 0:
            with torch.no_grad(), self.policy.using():
                reference_BT, _ = self.policy.logprobs(batch)
        with self._backward(names, weight) as losses:
            logprobs_BT, entropy_BT = self.policy.logprobs(batch)
            loss, figures = objectives.rl(
                logprobs_BT,
                batch.behaviour_BT,
                batch.advantages_B,
                batch.mask_BT,
                spec=self.spec.rl,
                totals=totals,
                reference_BT=reference_BT,
                weights_BT=batch.weights_BT,
            )
            losses.append(loss if counts else empty_pass(logprobs_BT))
        figures["entropy"] = entropy_BT.sum().item()
        return figures

    def _with_advantages(
        self, term: Exploration, groups: Sequence[RolloutGroup]
    ) -> tuple[list[tuple[TokenSequence, bool]], list[TokenSequence]]:
        """(rollouts and whether each was cut off, the experts' solutions), with advantages."""
        rewards = [list(g.rewards) for g in self.step_groups]
        if term.gamma is not None:
            rewards = [
                [*r, 1.0] if g.demo is not None else r
                for r, g in zip(rewards, self.step_groups, strict=True)
            ]
        if term.advantage is not None:
            found = [[None if r is None else term.advantage(r) for r in row] for row in rewards]
        else:
            found = group_advantages(rewards, term.scale or self.spec.rl.advantage)
        by_group = {id(g): row for g, row in zip(self.step_groups, found, strict=True)}
        rollouts: list[tuple[TokenSequence, bool]] = []
        experts: list[TokenSequence] = []
        for group in groups:
            row = by_group[id(group)]
            for sequence, cut, advantage in zip(group.rollouts, group.truncated, row, strict=False):
                if advantage is not None:
                    rollouts.append((replace(sequence, advantage=advantage), cut))
            if term.gamma is not None and group.demo is not None:
                advantage = row[-1]
                assert advantage is not None, "the expert's answer is always judged: right"
                experts.append(replace(self.library[group.demo], advantage=advantage))
        return rollouts, experts

    # ------------------------------------------------------------------ passes

    def _batches(self, sequences: Sequence[TokenSequence]) -> Iterator[tuple[MicroBatch, bool]]:
        """This rank's passes over the sequences, and whether each counts: where a pass is something
        all ranks do together, those with fewer make empty ones, on the shortest sequence."""
        mine = list(self._micro_batches(self.world.balanced(sequences)))
        together = self.policy.sharded and bool(sequences)
        idle = max(self.world.gather(len(mine))) - len(mine) if together else 0
        for batch in mine:
            yield batch, True
        for batch in self._micro_batches([min(sequences, key=len)] if idle else []):
            for _ in range(idle):
                yield batch, False

    def _micro_batches(self, sequences: Sequence[TokenSequence]) -> Iterator[MicroBatch]:
        return micro_batches(
            sequences,
            self.spec.runtime.micro_batch,
            pad_id=self.policy.pad_id,
            device=self.policy.device,
            packed=self.spec.runtime.padding_free,
            sharing=self.policy.sharing if self.spec.runtime.share_prompts else None,
        )

    @contextmanager
    def _backward(self, names: tuple[str, ...], weight: float) -> Iterator[list[Tensor]]:
        """Within: the policy of these sets; at the end the losses' gradients are accumulated, while
        the sets are still in use, because checkpointed activations are computed again then."""
        losses: list[Tensor] = []
        with self.policy.using(*names):
            yield losses
            for loss in losses:
                if loss.requires_grad:
                    # up the objective, which a loss is the negative of
                    (-weight * loss).backward()  # type: ignore[no-untyped-call]


def _add(metrics: Metrics, figures: Metrics) -> None:
    for key, value in figures.items():
        metrics[key] = metrics.get(key, 0.0) + value


def _take(parameters: Sequence[torch.nn.Parameter]) -> list[Tensor]:
    """Takes the accumulated gradients away."""
    taken = []
    for parameter in parameters:
        gradient = parameter.grad
        taken.append(torch.zeros_like(parameter) if gradient is None else gradient)
        parameter.grad = None
    return taken


def _refuse_non_finite(metrics: Metrics, found: dict[str, Vector]) -> None:
    broken = sorted(key for key, value in metrics.items() if not math.isfinite(value))
    broken += [f"the gradient of the {n}" for n, v in found.items() if not math.isfinite(v.norm())]
    if broken:
        raise NonFinite(", ".join(broken))
