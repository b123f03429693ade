"""The evaluation job: ask every problem, judge every answer, report.

Problems are asked in rounds of about a batch. Once a round's answers are kept they are never asked
for again, whatever happens to the process; judging is cheap and done anew. So a run that is killed
and run again has the answers, and with them the scores, of one that was not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import compress
from operator import not_
from pathlib import Path
from typing import Any

from bridge_engine.data.datasets import digest, load
from bridge_engine.data.example import Example
from bridge_engine.data.fitting import left_out, no_room
from bridge_engine.data.template import prompt_tokens, resolve_template
from bridge_engine.distributed.ranks import World
from bridge_engine.errors import EngineError
from bridge_engine.evaluation.answers import Asked
from bridge_engine.evaluation.checks import read_card, seen_in_training
from bridge_engine.evaluation.keeping import kept_answers, save
from bridge_engine.evaluation.measuring import Examiner, shown
from bridge_engine.evaluation.presets import doubt, remark
from bridge_engine.evaluation.report import (
    EvaluationResult,
    SetReport,
    SetScores,
    set_scores,
)
from bridge_engine.evaluation.scores import mean
from bridge_engine.evaluation.sets import AskedSet
from bridge_engine.evaluation.spec import EvaluationSpec
from bridge_engine.evaluation.subject import Subject, load_subject
from bridge_engine.events import (
    Checkpoint,
    Done,
    EventWriter,
    Log,
    Metric,
    Phase,
    Resume,
    Stopped,
)
from bridge_engine.rewards import Verifier
from bridge_engine.rewards.verifier import VERSION
from bridge_engine.rollout import Sampler, SamplingParams, make_sampler
from bridge_engine.state.checkpoint import step_folder
from bridge_engine.state.initial_parameters import FOLDER

SNAPSHOT_SECONDS = 300.0
"""Between checkpoints of the answers, which an artifact store takes to other machines."""
QUIET_SECONDS = 30.0
"""How long judging goes on before it says so: a run that says nothing counts as stuck."""
JUDGING_SECONDS = 120.0
"""Longest stretch of judging between two looks at the clock, unless one answer may take longer, or
the machine keeps the judges from computing."""
JUDGED_AT_ONCE = 32
"""Problems between two looks at whether to stop, where their answers are there already."""
MOST_JUDGES = 4
"""Processes that judge side by side, where there are cores for them."""


class _StopRequested(Exception):
    """Unwinds a run that has been asked to stop, from wherever it is."""


class Evaluation:
    """One run of one spec in one directory. A context manager, like `trainer.Trainer`."""

    def __init__(
        self,
        spec: EvaluationSpec,
        directory: Path,
        events: EventWriter,
        stop_requested: Callable[[], bool] = lambda: False,
        world: World | None = None,
        environment: dict[str, Any] | None = None,
        accepted: Callable[[dict[str, str]], None] = lambda hashes: None,
    ) -> None:
        """`environment`: what the result says of hardware and versions. `accepted` is called, on
        rank 0 and with the hashes of the data, once the directory is known to hold no answers to
        anything else."""
        self.spec = spec
        self.directory = directory
        self.events = events
        self.stop_requested = stop_requested
        self.world = world or World()
        self.environment = environment or {}
        self.sets = [
            AskedSet(number, label, ref, problems, digest(problems))
            for number, (label, ref) in enumerate(zip(spec.labels(), spec.benchmarks, strict=True))
            for problems in [load(ref, "eval", f"benchmarks.{number}")]
        ]
        self.kept = kept_answers(
            spec, directory, [one.sha256 for one in self.sets], self.environment, self.world
        )
        hashes = {one.label: one.sha256 for one in self.sets}
        self.world.first(lambda: accepted(hashes))
        cores = (os.cpu_count() or 1) // self.world.local_size
        workers = max(1, min(MOST_JUDGES, cores))
        self.verifier = Verifier(timeout_s=spec.verifier_timeout, workers=workers)
        each = max(1, int(JUDGING_SECONDS / spec.verifier_timeout))
        self._answers_at_once = each * workers * self.world.size
        folder = directory / FOLDER
        asks = spec.adapter is not None and spec.completions_of is None
        self._warnings = seen_in_training(spec, read_card(folder)) if asks else {}
        self._sampler: Sampler | None = None
        self._saved = self._said = time.monotonic()

    def __enter__(self) -> Evaluation:
        return self

    def __exit__(self, *_: object) -> None:
        self.verifier.close()
        if self._sampler is not None:
            self._sampler.close()

    # ------------------------------------------------------------------ the run

    @property
    def total(self) -> int:
        """Problems of all sets."""
        return sum(len(one.problems) for one in self.sets)

    @property
    def step(self) -> int:
        """Problems that are finished."""
        return len(self.kept)

    def run(self) -> bool:
        """Evaluates to the end (True) or until asked to stop (False, answers kept)."""
        began = time.monotonic()
        if self.events.started_before:
            self.events.emit(Resume(step=self.step))
        self.events.emit(Phase(phase="evaluating", steps=self.total))
        if not self.events.started_before:
            if (said := remark(self.spec)) is not None:
                self.events.emit(Log(message=said))
            for warning in self._warnings.values():
                self.events.emit(Log(level="warning", message=warning))
        try:
            results = self._results()
        except _StopRequested:
            self._save()
            self.events.emit(Stopped(step=self.step))
            return False
        self._save()
        seconds = round(time.monotonic() - began, 3)
        self.events.emit(Done(step=self.step, result=self._result(results, seconds)))
        return True

    def _results(self) -> list[SetScores]:
        examiner, subject = self._examiner()
        rounds = [list(self._rounds(one, subject, examiner)) for one in self.sets]
        results = []
        for one, left in zip(self.sets, rounds, strict=True):
            self._judge_kept(one, examiner)
            for ask in left:
                self._heed_stop()
                self._round(one, ask, examiner)
            results.append(self._finish(one))
        return results

    def _heed_stop(self) -> None:
        if self.world.any(self.stop_requested()):
            raise _StopRequested

    def _has(self, one: AskedSet, example: Example) -> bool:
        return (one.number, example.id) in self.kept

    def _examiner(self) -> tuple[Examiner, Subject | None]:
        """What asks and judges; with no model loaded where there is nothing left to ask."""
        spec = self.spec
        if self.step == self.total:
            return Examiner(_Nobody(), str, self.verifier, self.world, spec.grader), None
        if spec.completions_of is not None:
            raise EngineError(
                f"{self.total - self.step} of {self.total} problems have no answer from "
                f"{spec.completions_of}; grade an evaluation that has finished",
                code="completions_missing",
                param="completions_of",
            )
        folder = self.directory / FOLDER if spec.adapter is not None else None
        subject = load_subject(spec.base, folder, spec.runtime)
        doubtful = doubt(spec, subject.policy.tokenizer)
        if doubtful is not None:
            self.events.emit(Log(level="warning", message=doubtful))
        sampler = make_sampler(subject.policy, subject.names, self.directory, spec, self.world)
        self._sampler = sampler
        self.kept.environment |= sampler.software()
        sampler.sync(0)
        decode = subject.policy.tokenizer.decode
        return (
            Examiner(
                sampler,
                lambda c: str(decode(c.tokens, skip_special_tokens=True)),
                self.verifier,
                self.world,
                spec.grader,
            ),
            subject,
        )

    def _rounds(
        self, one: AskedSet, subject: Subject | None, examiner: Examiner
    ) -> Iterator[Callable[[], list[Asked]]]:
        """What is left to ask of a set, a round at a time; nothing is asked before it is called."""
        todo = [e for e in one.problems if not self._has(one, e)]
        if subject is None or not todo:
            return
        spec, samples = self.spec, self.spec.samples_of(one.ref)
        params = self._params
        tokenizer = subject.policy.tokenizer
        template = resolve_template(spec.template_of(one.ref), tokenizer)

        def prompt(example: Example) -> list[int]:
            return prompt_tokens(example.problem, template, tokenizer)

        def fits(example: Example) -> bool:
            return 0 < len(prompt(example)) <= room

        room = subject.policy.context - params.max_new_tokens
        first = next(filter(fits, one.problems), None)
        if first is None:
            param = f"benchmarks.{one.number}"
            why = no_room(room, params.max_new_tokens, subject.policy.context)
            raise EngineError(left_out(param, len(one.problems), why), code="no_data", param=param)
        as_read = tokenizer.decode(prompt(first))
        warning = self._warnings.get(one.number)
        self.world.first(
            lambda: self.kept.note(one.number, template.model_dump(), as_read, warning)
        )
        # the tokens of all problems at once may be more than there is memory
        fit = [fits(e) for e in todo]
        fitting, too_long = list(compress(todo, fit)), list(compress(todo, map(not_, fit)))
        if too_long:
            self.events.emit(
                Log(
                    level="warning",
                    message=f"{one.label}: {len(too_long)} of {len(one.problems)} problems left "
                    f"out: {no_room(room, params.max_new_tokens, subject.policy.context)} "
                    f"({', '.join(e.id for e in too_long[:10])})",
                )
            )
            yield lambda: [Asked(e, []) for e in too_long]
        at_once = max(1, spec.sampling.batch_size // samples)
        for start in range(0, len(fitting), at_once):
            some = fitting[start : start + at_once]
            yield lambda some=some: examiner.ask(  # type: ignore[misc]
                some,
                [prompt(e) for e in some],
                params,
                samples=samples,
                seed=spec.seed,
                of=one.ref.name,
            )

    @property
    def _params(self) -> SamplingParams:
        sampling = self.spec.sampling
        assert sampling.max_new_tokens is not None
        assert sampling.temperature is not None
        assert sampling.top_p is not None
        return SamplingParams(sampling.max_new_tokens, sampling.temperature, sampling.top_p)

    def _judge_kept(self, one: AskedSet, examiner: Examiner) -> None:
        """Judges what earlier processes, or another evaluation, have asked."""
        there = [e for e in one.problems if self._has(one, e)]
        for start in range(0, len(there), JUDGED_AT_ONCE):
            some = [self.kept.get(one.number, e) for e in there[start : start + JUDGED_AT_ONCE]]
            self._judge(one, some, examiner)
            self._go_on(one)

    def _judge(self, one: AskedSet, asked: Sequence[Asked], examiner: Examiner) -> None:
        one.take(examiner.judge(asked, lambda: self._go_on(one), self._answers_at_once))

    def _go_on(self, one: AskedSet) -> None:
        """Amid judging, whose answers are kept: heeds a wish to stop, and says that it goes on."""
        self._heed_stop()
        if time.monotonic() - self._said >= QUIET_SECONDS:
            self._emit(_standing(one), sum(each.finished for each in self.sets))

    def _emit(self, figures: dict[str, float | None], step: int) -> None:
        self.events.emit(Metric(step=step, metrics=figures))
        self._said = time.monotonic()

    def _round(self, one: AskedSet, ask: Callable[[], list[Asked]], examiner: Examiner) -> None:
        began = time.monotonic()
        asked = ask()
        sampled = time.monotonic()
        self.world.first(lambda: self.kept.add(one.number, asked))
        if not self.world.is_first:
            self.kept.remember(one.number, asked)
        one.asked_here = True
        self._judge(one, asked, examiner)
        answers = [answer for each in asked for answer in each.answers]
        figures: dict[str, float | None] = {
            "time/step": time.monotonic() - began,
            "time/sampling": sampled - began,
            "tokens": float(sum(answer.tokens for answer in answers)),
            "completions/mean_length": mean([float(a.tokens) for a in answers]),
            "completions/clipped_ratio": mean([float(a.truncated) for a in answers]),
        }
        self._emit(figures | _standing(one), self.step)
        if self.world.any(time.monotonic() - self._saved > SNAPSHOT_SECONDS):
            self._save()

    def _finish(self, one: AskedSet) -> SetScores:
        """Reports a set that has been asked to its end, at the step at which it was: whoever goes
        on after that reports the same once more."""
        judged = one.judged
        found = set_scores(
            judged,
            samples=self.spec.samples_of(one.ref),
            pass_at=self.spec.pass_at,
            seed=self.spec.seed,
        )
        step = sum(len(each.problems) for each in self.sets[: one.number + 1])
        self._emit(one.figures(found), step)
        if one.asked_here or not self.events.started_before:
            answered = [each for each in judged if each.answers]
            for sample in shown(
                step,
                "eval",
                [each.example for each in answered],
                [each.answers[0].text for each in answered],
                [each.verdicts[0] for each in answered],
            ):
                self.events.emit(sample)
        return found

    def _save(self) -> None:
        step = self.step
        folder = self.directory / "checkpoints" / step_folder(step)
        self.world.first(lambda: save(folder, self.kept, self.sets))
        self.events.emit(Checkpoint(step=step, path=str(folder.relative_to(self.directory))))
        self._saved = time.monotonic()

    def _result(self, results: Sequence[SetScores], seconds: float) -> dict[str, Any]:
        """What the finished run has to show (`Done.result`)."""
        spec, params = self.spec, self._params
        return EvaluationResult(
            model=spec.base,
            adapter=spec.adapter,
            preset=spec.preset,
            grader={**spec.grader.model_dump(), "version": VERSION},
            seed=spec.seed,
            engine=spec.sampling.engine,
            completions_of=spec.completions_of,
            seconds=seconds,
            environment=dict(self.kept.environment),
            benchmarks=[
                SetReport(
                    name=one.label,
                    split=one.ref.split,
                    data_sha256=one.sha256,
                    temperature=params.temperature,
                    top_p=params.top_p,
                    max_new_tokens=params.max_new_tokens,
                    **(
                        self.kept.asked_as.get(one.number)
                        or {"template": spec.template_of(one.ref).model_dump()}
                    ),
                    **found.model_dump(),
                )
                for one, found in zip(self.sets, results, strict=True)
            ],
        ).model_dump(mode="json")


def _standing(one: AskedSet) -> dict[str, float | None]:
    """How a set stands before it is finished."""
    between = 0 < one.finished < len(one.problems)
    return {f"eval/{one.label}/pass@1": one.so_far} if between else {}


class _Nobody:
    """A sampler where nothing is left to sample."""

    def sync(self, *_: object) -> dict[str, float]:
        return {}

    def sample(self, *_: object, **__: object) -> list[Any]:
        raise AssertionError("every problem has its answers")

    def software(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        """Nothing is held."""
