"""Problems asked and answers judged: the same code for an evaluation job and for the evaluations of
a training job, so that the same policy gets the same score from both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch

from bridge_engine.data.example import Example
from bridge_engine.distributed.ranks import World
from bridge_engine.errors import EngineError
from bridge_engine.evaluation.answers import Answer, Asked, Judged, case_of
from bridge_engine.events import Sample
from bridge_engine.rewards import Case, Verdict, Verifier, stated_answer
from bridge_engine.rewards.graders import GraderSpec, grade
from bridge_engine.rollout import Completion, Sampler, SamplingParams
from bridge_engine.seeding import generator

SAMPLES_SHOWN = 4
"""Completions reported as samples at each evaluation and at each step that reports rollouts."""


class Examiner:
    """Asks a sampler's policy, and has a verifier judge what it answers."""

    def __init__(
        self,
        sampler: Sampler,
        text: Callable[[Completion], str],
        verifier: Verifier,
        world: World | None = None,
        grader: GraderSpec | None = None,
    ) -> None:
        self.sampler = sampler
        self.text = text
        self.verifier = verifier
        self.world = world or World()
        self.grader = grader or GraderSpec()

    def ask(
        self,
        problems: Sequence[Example],
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        samples: int = 1,
        seed: int = 0,
        of: str = "",
    ) -> list[Asked]:
        """`samples` answers to each problem, whose prompt's tokens stand at the same place.

        What a sample draws is a function of (seed, of, the problem's id, the sample's number):
        neither of the problems beside it nor of how many samples there are.
        """
        draws = None
        if params.temperature > 0:
            draws = [
                generator(seed, f"answer/{of}/{problem.id}", number)
                for problem in problems
                for number in range(samples)
            ]
        completions = self.sampler.sample(prompts, params, rng=draws, repeats=samples)
        check_finite(completions)
        answers = [Answer(self.text(c), len(c.tokens), not c.finished) for c in completions]
        return [
            Asked(problem, answers[place * samples : (place + 1) * samples])
            for place, problem in enumerate(problems)
        ]

    def judge(
        self,
        asked: Sequence[Asked],
        between: Callable[[], None] = lambda: None,
        at_once: int | None = None,
    ) -> list[Judged]:
        """Each answer with its verdict; each rank judges its share.

        `between` is called, on every rank, whenever `at_once` answers have been judged and others
        are left.
        """
        cases = [case_of(one.example, answer.text) for one in asked for answer in one.answers]
        at_once = at_once or max(1, len(cases))
        found: list[Verdict] = []
        for start in range(0, len(cases), at_once):
            if start:
                between()
            found += self.verdicts(cases[start : start + at_once])
        verdicts = iter(found)
        return [
            Judged(
                one.example,
                one.answers,
                [next(verdicts) for _ in one.answers],
                [stated_answer(answer.text, one.example.problem) for answer in one.answers],
            )
            for one in asked
        ]

    def verdicts(self, cases: Sequence[Case]) -> list[Verdict]:
        """A verdict a case, in order."""
        return self.world.spread(cases, lambda some: grade(self.grader, some, self.verifier))


def check_finite(completions: Sequence[Completion]) -> None:
    """A policy of NaNs answers nothing right, so its groups are all equal and its gradient is 0:
    without this look it would go on for ever."""
    if not torch.tensor([p for c in completions for p in c.logprobs]).isfinite().all():
        raise EngineError(
            "the policy's log-probabilities became NaN or infinite; in training, lower "
            "optimizer.student_lr and optimizer.teacher_lr, the last checkpoint is intact; what is "
            "trained already has broken weights",
            code="non_finite_policy",
        )


def shown(
    step: int,
    source: Literal["rollout", "eval"],
    problems: Sequence[Example],
    texts: Sequence[str],
    verdicts: Sequence[Verdict],
) -> Iterator[Sample]:
    """A few completions, one a problem, spread over them, for a person to read."""
    every = max(1, len(problems) // SAMPLES_SHOWN)
    for place in range(0, len(problems), every)[:SAMPLES_SHOWN]:
        value = verdicts[place].value
        yield Sample(
            step=step,
            source=source,
            problem=problems[place].problem,
            completion=texts[place],
            gold=problems[place].answer,
            reward=None if value is None else float(value),
        )
