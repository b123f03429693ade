"""The training loop: explore, verify, step, measure, save. The same for every method."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from bridge_engine.data.datasets import load
from bridge_engine.data.example import Example
from bridge_engine.errors import EngineError
from bridge_engine.evaluate import Score, score
from bridge_engine.events import Done, EventWriter, Log, Metric, Phase, Resume, Sample, Stopped
from bridge_engine.methods import make_method
from bridge_engine.objectives import Metrics, group_advantages
from bridge_engine.parameters import ParameterSet
from bridge_engine.policy import Policy
from bridge_engine.rewards import Verdict, Verifier
from bridge_engine.rollout import Completion, SamplingParams, sample
from bridge_engine.run_state import Progress, RunState
from bridge_engine.seeding import epoch_draw, generator
from bridge_engine.sequences import TokenSequence
from bridge_engine.spec import TrainSpec
from bridge_engine.template import demonstration, prompt_tokens, resolve_template
from bridge_engine.token_objectives import TokenObjectives

SAMPLES_SHOWN = 4
"""Completions reported as samples at each evaluation and at each step that reports rollouts."""


class Trainer:
    """One run of one spec in one directory. `stop_requested` is asked after every step."""

    def __init__(
        self,
        spec: TrainSpec,
        directory: Path,
        events: EventWriter,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self.spec = spec
        self.events = events
        self.stop_requested = stop_requested
        self.phase = "loading"
        self.method = make_method(spec.method)

        self.policy = Policy.load(spec.model, spec.lora, spec.runtime)
        self.template = resolve_template(spec.template, self.policy.tokenizer)
        for name in self.method.options.adapters:
            self.policy.adapters.add(name, spec.seed)
        if "shadow" in self.method.options.adapters:
            self.policy.adapters.copy("student", "shadow")
        rates = {"teacher": spec.optimizer.teacher_lr}
        self.sets = {
            name: ParameterSet(
                name,
                self.policy.adapters.parameters(name),
                spec.optimizer,
                rates.get(name, spec.optimizer.student_lr),
            )
            for name in self.method.options.adapters
        }
        self._load_data()
        self.verifier = Verifier(timeout_s=spec.rl.verifier_timeout)
        self.state = RunState(directory, spec, self.policy, self.method, self.sets, self.template)

    # ------------------------------------------------------------------ data

    def _load_data(self) -> None:
        data = self.spec.data
        self.prompts: list[Example] = []
        self.demos: list[TokenSequence] = []
        self.held_out: list[Example] = []
        learns_from = self.spec.method.learns_from
        if "rewards" in learns_from and data.prompts is not None:
            self.prompts = self._fitting(
                load(data.prompts, "prompts"), "data.prompts", self.spec.rollout.max_new_tokens
            )
        if "demos" in learns_from and data.demos is not None:
            self.demos = self._demonstrations(load(data.demos, "demos"))
        if data.eval is not None:
            self.held_out = self._fitting(load(data.eval, "eval"), "data.eval", self.eval_tokens)

    def _fitting(self, examples: list[Example], param: str, answer: int) -> list[Example]:
        """The problems whose prompt leaves room for an answer of so many tokens; the others are
        counted and named."""
        room = self.policy.context - answer
        fitting = [e for e in examples if len(self._prompt(e)) <= room]
        self._report_left_out(
            examples,
            fitting,
            param,
            f"prompts over {room} tokens, which leave no "
            f"room for an answer of {answer} in the model's context of {self.policy.context},",
        )
        return fitting

    def _demonstrations(self, examples: list[Example]) -> list[TokenSequence]:
        longest = min(self.spec.sft.max_tokens or self.policy.context, self.policy.context)
        eos = self.policy.eos_ids[0]
        solved = [e for e in examples if e.solution is not None]
        self._report_left_out(examples, solved, "data.demos", "rows without a solution")
        sequences = [demonstration(e, self.template, self.policy.tokenizer, eos) for e in solved]
        fitting = [s for s in sequences if len(s) <= longest]
        self._report_left_out(sequences, fitting, "data.demos", f"rows over {longest} tokens")
        return fitting

    def _report_left_out(
        self, before: Sequence[object], after: Sequence[object], param: str, why: str
    ) -> None:
        if not after:
            raise EngineError(
                f"{param} has nothing to train on: {len(before)} rows, all left out ({why})"
                if before
                else f"{param} is empty",
                code="no_data",
                param=param,
            )
        if len(after) < len(before):
            self._warn(f"{param}: {len(before) - len(after)} {why} left out")

    @property
    def eval_tokens(self) -> int:
        """Longest completion of an evaluation."""
        return self.spec.eval.max_new_tokens or self.spec.rollout.max_new_tokens

    def _prompt(self, example: Example) -> list[int]:
        tokens = prompt_tokens(example.problem, self.template, self.policy.tokenizer)
        if not tokens:
            raise EngineError(
                f"the problem {example.id!r} is no token at all to this model's tokenizer",
                code="empty_prompt",
                param="data",
            )
        return tokens

    # ------------------------------------------------------------------ the run

    def run(self) -> bool:
        """Trains to the end (True) or until asked to stop (False, state saved)."""
        progress = self._start()
        while progress.step < self.spec.steps and not self.stop_requested():
            self._enter("training")
            metrics = self._advance(progress)
            self.events.emit(Metric(step=progress.step, metrics=metrics))
            due = progress.step % self.spec.checkpoint.every == 0
            if due or self._is_last(progress) or progress.best_step == progress.step:
                self.events.emit(self.state.save(progress))
        if self._is_last(progress):
            self.events.emit(Done(step=progress.step, result=progress.result(self.spec)))
            return True
        if progress.step > 0:
            self.events.emit(self.state.save(progress))
        self.events.emit(Stopped(step=progress.step))
        return False

    def _is_last(self, progress: Progress) -> bool:
        return progress.step == self.spec.steps

    def _advance(self, progress: Progress) -> Metrics:
        """One step and, where one is due, an evaluation."""
        began = time.monotonic()
        try:
            metrics = self._step(progress.step)
        except EngineError as error:
            error.step = progress.step + 1
            raise
        progress.step += 1
        metrics["time/step"] = time.monotonic() - began
        every = self.spec.eval.every
        if self._is_last(progress) or (every and progress.step % every == 0):
            metrics |= self._evaluate(progress)
        progress.seconds += time.monotonic() - began
        return metrics

    def _start(self) -> Progress:
        """Takes up the newest whole checkpoint, or measures the untrained policy and starts."""
        progress, torn = self.state.resume()
        for folder in torn:
            self._warn(f"checkpoint {folder.name} is damaged; going back one further")
        if progress is not None:
            self.events.emit(Resume(step=progress.step))
            # said again, should the last attempt have died between saving it and saying so
            self.events.emit(self.state.save(progress))
            return progress
        if self.events.started_before:  # an earlier attempt died before its first checkpoint
            self.events.emit(Resume(step=-1))
        progress = Progress()
        metrics = self._evaluate(progress)
        if metrics:
            self.events.emit(Metric(step=0, metrics=metrics))
        return progress

    def _step(self, step: int) -> Metrics:
        metrics: Metrics = {}
        rollouts: list[TokenSequence] = []
        demos: list[TokenSequence] = []
        turns = self.spec.method.turns(step, self.spec.steps)
        if turns.rewards is not None:
            rollouts, metrics = self._explore(step, turns.rewards)
        if turns.demos is not None:
            demos = epoch_draw(
                self.demos,
                self.spec.sft.batch_size,
                seed=self.spec.seed,
                purpose="demos",
                step=turns.demos,
            )
        objectives = TokenObjectives(
            self.policy,
            self.method,
            demos=demos,
            rollouts=rollouts,
            rl=self.spec.rl,
            micro_batch=self.spec.runtime.micro_batch,
        )
        figures = self.method.step(objectives, self.sets, step, self.spec.steps)
        metrics |= _published_names(figures)
        _refuse_non_finite(metrics)
        return metrics

    # ------------------------------------------------------------------ exploring and measuring

    def _explore(self, step: int, turn: int) -> tuple[list[TokenSequence], Metrics]:
        """The `turn`-th batch of rollouts from the policy, verified and with their advantages."""
        spec = self.spec.rollout
        problems = epoch_draw(
            self.prompts, spec.prompts_per_step, seed=self.spec.seed, purpose="prompts", step=turn
        )
        prompts = [self._prompt(e) for e in problems]
        began = time.monotonic()
        completions = self._sample(
            prompts,
            SamplingParams(spec.max_new_tokens),
            index=step,
            repeats=spec.group_size,
        )
        sampled = time.monotonic()
        golds = [e.answer for e in problems for _ in range(spec.group_size)]
        verdicts = self._judge(golds, completions)
        judged_at = time.monotonic()
        rewards = [None if v.value is None else float(v.value) for v in verdicts]
        advantages = group_advantages(
            rewards, spec.group_size, divide_by_std=self.spec.rl.advantage == "group_std"
        )
        rollouts = [
            TokenSequence(
                prompts[index // spec.group_size], completion.tokens, completion.logprobs, advantage
            )
            for index, (completion, advantage) in enumerate(
                zip(completions, advantages, strict=True)
            )
            if advantage is not None
        ]
        if step % (self.spec.eval.every or self.spec.checkpoint.every) == 0:
            self._show(step + 1, "rollout", problems, completions[:: spec.group_size], verdicts)
        metrics = _rollout_metrics(completions, rewards, spec.group_size)
        metrics["time/sampling"] = sampled - began
        metrics["time/verification"] = judged_at - sampled
        return rollouts, metrics

    def _evaluate(self, progress: Progress) -> Metrics:
        """Greedy accuracy of the policy on the held-out problems; {} where there are none."""
        if not self.held_out:
            return {}
        self._enter("evaluating")
        completions = self._sample(
            [self._prompt(e) for e in self.held_out],
            SamplingParams(self.eval_tokens, temperature=0),
        )
        verdicts = self._judge([e.answer for e in self.held_out], completions)
        result: Score = score(
            [v.value for v in verdicts],
            [e.kind for e in self.held_out],
            truncated=sum(not c.finished for c in completions),
        )
        progress.measured(result)
        self._show(progress.step, "eval", self.held_out, completions, verdicts)
        return result.metrics() if result.judged else {"eval/unjudged": float(result.unjudged)}

    def _sample(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        *,
        index: int = 0,
        repeats: int = 1,
    ) -> list[Completion]:
        rng = None
        if params.temperature > 0:
            rng = generator(self.spec.seed, "rollouts", index)
        with self.policy.using(*self.method.options.policy, merged=self.spec.rollout.merge_weights):
            completions = sample(
                self.policy.model,
                prompts,
                params,
                eos_ids=self.policy.eos_ids,
                pad_id=self.policy.pad_id,
                generator=rng,
                repeats=repeats,
                batch_size=self.spec.rollout.batch_size,
            )
        # A policy of NaNs answers nothing right, so its groups are all equal and its gradient is 0:
        # without this look it would go on for ever.
        total = sum(sum(c.logprobs) for c in completions)
        _refuse_non_finite({"the policy's log-probability": total})
        return completions

    def _judge(self, golds: list[str], completions: list[Completion]) -> list[Verdict]:
        texts = [self._text(c) for c in completions]
        return self.verifier.judge(list(zip(golds, texts, strict=True)))

    def _text(self, completion: Completion) -> str:
        text: str = self.policy.tokenizer.decode(completion.tokens, skip_special_tokens=True)
        return text

    def _show(
        self,
        step: int,
        source: Literal["rollout", "eval"],
        problems: Sequence[Example],
        completions: Sequence[Completion],
        verdicts: Sequence[Verdict],
    ) -> None:
        """Reports a few completions, spread over the problems, for a person to read."""
        stride = len(verdicts) // len(problems)
        every = max(1, len(problems) // SAMPLES_SHOWN)
        for place in range(0, len(problems), every)[:SAMPLES_SHOWN]:
            value = verdicts[place * stride].value
            self.events.emit(
                Sample(
                    step=step,
                    source=source,
                    problem=problems[place].problem,
                    completion=self._text(completions[place]),
                    gold=problems[place].answer,
                    reward=None if value is None else float(value),
                )
            )

    def _enter(self, phase: Literal["evaluating", "training"]) -> None:
        if phase != self.phase:
            self.phase = phase
            self.events.emit(Phase(phase=phase))

    def _warn(self, message: str) -> None:
        self.events.emit(Log(level="warning", message=message))


def _refuse_non_finite(figures: Metrics) -> None:
    broken = sorted(key for key, value in figures.items() if not math.isfinite(value))
    if broken:
        raise EngineError(
            f"{', '.join(broken)} became NaN or infinite; lower optimizer.student_lr and "
            "optimizer.teacher_lr; the last checkpoint is intact",
            code="non_finite_loss",
        )


def _rollout_metrics(
    completions: list[Completion], rewards: list[float | None], group_size: int
) -> Metrics:
    """What the rollouts say, under TRL's names."""
    judged = [r for r in rewards if r is not None]
    groups = [rewards[i : i + group_size] for i in range(0, len(rewards), group_size)]
    lengths = [len(c.tokens) for c in completions]
    metrics = {
        "frac_reward_zero_std": sum(len(set(g) - {None}) < 2 for g in groups) / len(groups),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/clipped_ratio": sum(not c.finished for c in completions) / len(completions),
        "verifier/unjudged": (len(rewards) - len(judged)) / len(rewards),
        "tokens": float(sum(lengths)),
    }
    if judged:
        metrics["reward"] = sum(judged) / len(judged)
    return metrics


def _published_names(figures: Metrics) -> Metrics:
    """The policy's own figures go by the field's plain names."""
    plain = {
        "entropy/student": "entropy",
        "kl/student": "kl",
        "logprob_drift/student": "sampler_mismatch",
    }
    return {plain.get(key, key): value for key, value in figures.items()}
