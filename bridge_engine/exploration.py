"""Exploring and measuring: the policy writes completions, the verifier judges them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from bridge_engine.correction import corrected
from bridge_engine.data.example import Example
from bridge_engine.data.training import TrainingData
from bridge_engine.distributed.ranks import World
from bridge_engine.evaluate import Score, score
from bridge_engine.evaluation.answers import case_of
from bridge_engine.evaluation.measuring import Examiner, check_finite, shown
from bridge_engine.events import Event
from bridge_engine.forward.sequences import TokenSequence
from bridge_engine.groups import RolloutGroup
from bridge_engine.metrics import Metrics
from bridge_engine.policy import Policy
from bridge_engine.rewards import Verdict, Verifier
from bridge_engine.rewards.rewarder import Rewarder
from bridge_engine.rollout import Completion, Sampler, SamplingParams
from bridge_engine.seeding import epoch_draw, generator
from bridge_engine.spec.train import TrainSpec


class Explorer:
    """Samples from the policy and judges what comes; every draw is a function of (seed, step)."""

    def __init__(
        self,
        spec: TrainSpec,
        policy: Policy,
        data: TrainingData,
        sampler: Sampler,
        verifier: Verifier,
        emit: Callable[[Event], None],
        world: World | None = None,
    ) -> None:
        self.spec = spec
        self.policy = policy
        self.data = data
        self.sampler = sampler
        self.emit = emit
        self.world = world or World()
        self.examiner = Examiner(sampler, self._text, verifier, self.world)
        self.rewarder = Rewarder(spec, self._text)
        self.group_size = spec.rollout.group_size - spec.method.experts
        """Rollouts of a problem: a method may keep places of the group for demonstrations."""

    @property
    def verifier(self) -> Verifier:
        """What judges."""
        return self.examiner.verifier

    @verifier.setter
    def verifier(self, verifier: Verifier) -> None:
        self.examiner.verifier = verifier

    # ------------------------------------------------------------------ exploring

    def explore(self, step: int, turn: int) -> tuple[list[RolloutGroup], Metrics]:
        """The `turn`-th batch of rollouts from the policy, at 0-based `step`, verified. Among the
        figures: how many `rollouts` were sampled."""
        wanted = self.spec.rollout.prompts_per_step
        synced = self.sampler.sync(step)
        began = time.monotonic()
        judging = 0.0
        found: list[RolloutGroup] = []
        seen: set[str] = set()
        rounds = 0
        for rounds in range(self.spec.rollout.dynamic_sampling + 1):
            problems = [e for e in self._problems(turn, rounds) if e.id not in seen]
            seen |= {e.id for e in problems}
            if problems:
                groups, seconds = self._round(problems, step, rounds)
                found += groups
                judging += seconds
            useful = [g for g in found if g.informative]
            if len(useful) >= wanted:
                break
        sampled = time.monotonic() - began - judging
        metrics = _rollout_metrics(found) | self.rewarder.metrics() | synced
        if self.spec.rollout.dynamic_sampling:
            metrics["dynamic_sampling/rounds"] = float(rounds)
            metrics["dynamic_sampling/discarded"] = float(len(found) - min(len(useful), wanted))
            found = useful[:wanted] or found[:wanted]
        if self.spec.rl.importance_correction == "truncated":
            found, figures = corrected(found, self.policy, self.spec, self.world)
            metrics |= figures
        return found, metrics | {"time/sampling": sampled, "time/verification": judging}

    def _problems(self, turn: int, again: int) -> list[Example]:
        """The problems of a round: of the first from the epochs, of further ones from their own."""
        return epoch_draw(
            self.data.prompts,
            self.spec.rollout.prompts_per_step,
            seed=self.spec.seed,
            purpose=f"prompts/again-{again}" if again else "prompts",
            step=turn,
        )

    def _round(
        self, problems: list[Example], step: int, again: int
    ) -> tuple[list[RolloutGroup], float]:
        """(the groups of these problems, seconds spent on judging them)."""
        size = self.group_size
        prompts = [self.data.prompt(e) for e in problems]
        completions = self.sample(
            prompts,
            SamplingParams(self.spec.rollout.max_new_tokens),
            rng=generator(self.spec.seed, f"rollouts/again-{again}" if again else "rollouts", step),
            repeats=size,
        )
        began = time.monotonic()
        cases = [
            case_of(problems[place // size], self._text(completion))
            for place, completion in enumerate(completions)
        ]
        verdicts = self.examiner.verdicts(cases)
        seconds = time.monotonic() - began
        if not again and step % (self.spec.eval.every or self.spec.checkpoint.every) == 0:
            texts = [case.text for case in cases[::size]]
            self.show(step + 1, "rollout", problems, texts, verdicts[::size])
        groups = []
        for place, problem in enumerate(problems):
            mine = slice(place * size, (place + 1) * size)
            written = completions[mine]
            rewards, noisy = self.rewarder.reward(problem.id, step, again, written, verdicts[mine])
            groups.append(
                RolloutGroup(
                    [TokenSequence(prompts[place], c.tokens, c.logprobs) for c in written],
                    rewards,
                    [not c.finished for c in written],
                    self.data.demo_of(problem),
                    noisy,
                )
            )
        return groups, seconds

    # ------------------------------------------------------------------ measuring

    def measure(self, step: int, names: Sequence[str], *, show: bool) -> Score:
        """Greedy accuracy of these parameter sets together on the held-out problems."""
        self.sampler.sync(step, names)
        problems = self.data.held_out
        judged = self.examiner.judge(
            self.examiner.ask(
                problems,
                [self.data.prompt(e) for e in problems],
                SamplingParams(self.data.eval_tokens, temperature=0),
            )
        )
        answers = [one.answers[0] for one in judged]
        verdicts = [one.verdicts[0] for one in judged]
        if show:
            self.show(step, "eval", problems, [a.text for a in answers], verdicts)
        return score(
            [v.value for v in verdicts],
            [e.kind for e in problems],
            truncated=sum(a.truncated for a in answers),
        )

    # ------------------------------------------------------------------ sampling and judging

    def sample(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        *,
        rng: torch.Generator | None = None,
        repeats: int = 1,
    ) -> list[Completion]:
        """Completions by what the sampler was last synced to; each rank draws its share."""
        completions = self.sampler.sample(prompts, params, rng=rng, repeats=repeats)
        check_finite(completions)
        return completions

    def _text(self, completion: Completion) -> str:
        text: str = self.policy.tokenizer.decode(completion.tokens, skip_special_tokens=True)
        return text

    def show(
        self,
        step: int,
        source: Literal["rollout", "eval"],
        problems: Sequence[Example],
        texts: Sequence[str],
        verdicts: Sequence[Verdict],
    ) -> None:
        """Reports a few completions, one a problem."""
        for sample in shown(step, source, problems, texts, verdicts):
            self.emit(sample)


def _rollout_metrics(groups: Sequence[RolloutGroup]) -> Metrics:
    """What the rollouts say, under TRL's names."""
    rewards = [r for g in groups for r in g.rewards]
    judged = [r for r in rewards if r is not None]
    lengths = [len(s.completion) for g in groups for s in g.rollouts]
    cut = [c for g in groups for c in g.truncated]
    metrics = {
        "frac_reward_zero_std": sum(not g.informative for g in groups) / len(groups),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/clipped_ratio": sum(cut) / len(cut),
        "verifier/unjudged": (len(rewards) - len(judged)) / len(rewards),
        "tokens": float(sum(lengths)),
        "rollouts": float(len(lengths)),
    }
    if judged:
        metrics["reward"] = sum(judged) / len(judged)
    return metrics
