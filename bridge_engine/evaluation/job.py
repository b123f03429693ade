"""The evaluation job: ask every problem, judge every answer, report.

Problems are asked in rounds of about a batch. Once a round's answers are kept they are never asked
for again, whatever happens to the process; judging is cheap and done anew. So a run that is killed
and run again has the answers, and with them the scores, of one that was not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge_engine.checkpoint import newest_whole, prune, publish, set_aside, step_folder, sweep
from bridge_engine.data.datasets import digest, load
from bridge_engine.data.example import Example
from bridge_engine.errors import EngineError
from bridge_engine.evaluation.answers import (
    COMPLETIONS,
    PROBLEMS,
    Asked,
    Judged,
    KeptAnswers,
    source_of,
)
from bridge_engine.evaluation.measuring import Examiner, shown
from bridge_engine.evaluation.report import (
    EvaluationResult,
    SetReport,
    SetScores,
    problem_scores,
    set_scores,
)
from bridge_engine.evaluation.spec import EvalSet, EvaluationSpec
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
from bridge_engine.initial_parameters import FOLDER
from bridge_engine.ranks import World
from bridge_engine.rewards import Verifier
from bridge_engine.rewards.verifier import VERSION
from bridge_engine.rollout import Sampler, SamplingParams, make_sampler
from bridge_engine.scores import mean
from bridge_engine.template import prompt_tokens, resolve_template

SNAPSHOT_SECONDS = 300.0
"""Between checkpoints of the answers, which an artifact store takes to other machines."""


@dataclass
class _Set:
    """One set of problems and how far it is."""

    number: int
    label: str
    ref: EvalSet
    problems: list[Example]
    sha256: str
    judged: list[Judged] = field(default_factory=list)


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
            _Set(number, label, ref, problems, digest(problems))
            for number, (label, ref) in enumerate(zip(spec.labels(), spec.benchmarks, strict=True))
            for problems in [load(ref, "eval", f"benchmarks.{number}")]
        ]
        self.kept = self._kept()
        hashes = {one.label: one.sha256 for one in self.sets}
        self.world.first(lambda: accepted(hashes))
        self.verifier = Verifier(timeout_s=spec.verifier_timeout)
        self._sampler: Sampler | None = None
        self._saved = time.monotonic()

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
        examiner, subject = self._examiner()
        rounds = [list(self._rounds(one, subject, examiner)) for one in self.sets]
        results = []
        for one, left in zip(self.sets, rounds, strict=True):
            one.judged = examiner.judge(
                [self.kept.get(one.number, e) for e in one.problems if self._has(one, e)]
            )
            for asked in left:
                if self.world.any(self.stop_requested()):
                    self._save()
                    self.events.emit(Stopped(step=self.step))
                    return False
                self._round(one, asked, examiner)
            one.judged = _in_order(one)
            results.append(self._finish(one))
        self._save()
        seconds = round(time.monotonic() - began, 3)
        self.events.emit(Done(step=self.step, result=self._result(results, seconds)))
        return True

    def _has(self, one: _Set, example: Example) -> bool:
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
        sampler = make_sampler(subject.policy, subject.names, self.directory, spec, self.world)
        self._sampler = sampler
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
        self, one: _Set, subject: Subject | None, examiner: Examiner
    ) -> Iterator[Callable[[], list[Asked]]]:
        """What is left to ask of a set, a round at a time; nothing is asked before it is called."""
        todo = [e for e in one.problems if not self._has(one, e)]
        if subject is None or not todo:
            return
        spec, samples = self.spec, self.spec.samples_of(one.ref)
        params = self._params
        tokenizer = subject.policy.tokenizer
        template = resolve_template(spec.template_of(one.ref), tokenizer)
        shown_as = template.model_dump()
        self.world.first(lambda: self.kept.note_template(one.number, shown_as))
        prompts = {e.id: prompt_tokens(e.problem, template, tokenizer) for e in todo}
        room = subject.policy.context - params.max_new_tokens
        too_long = [e for e in todo if not 0 < len(prompts[e.id]) <= room]
        if len(too_long) == len(one.problems):
            raise EngineError(
                f"no problem of {one.label} leaves room for {params.max_new_tokens} tokens of "
                f"answer in the model's context of {subject.policy.context}",
                code="no_data",
                param="sampling.max_new_tokens",
            )
        if too_long:
            self.events.emit(
                Log(
                    level="warning",
                    message=f"{one.label}: {len(too_long)} problems left out, which leave no "
                    f"room for {params.max_new_tokens} tokens of answer in the model's context of "
                    f"{subject.policy.context}: {', '.join(e.id for e in too_long[:10])}",
                )
            )
            yield lambda: [Asked(e, []) for e in too_long]
        fitting = [e for e in todo if 0 < len(prompts[e.id]) <= room]
        at_once = max(1, spec.sampling.batch_size // samples)
        for start in range(0, len(fitting), at_once):
            some = fitting[start : start + at_once]
            yield lambda some=some: examiner.ask(  # type: ignore[misc]
                some,
                [prompts[e.id] for e in some],
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

    def _round(self, one: _Set, ask: Callable[[], list[Asked]], examiner: Examiner) -> None:
        began = time.monotonic()
        asked = ask()
        sampled = time.monotonic()
        self.world.first(lambda: self.kept.add(one.number, asked))
        if not self.world.is_first:
            self.kept.remember(one.number, asked)
        judged = examiner.judge(asked)
        one.judged += judged
        answers = [answer for each in judged for answer in each.answers]
        figures = {
            "time/step": time.monotonic() - began,
            "time/sampling": sampled - began,
            "tokens": float(sum(answer.tokens for answer in answers)),
            "completions/mean_length": mean([float(a.tokens) for a in answers]),
            "completions/clipped_ratio": mean([float(a.truncated) for a in answers]),
        }
        if len(one.judged) < len(one.problems):  # how it stands so far
            figures[f"eval/{one.label}/pass@1"] = _so_far(one.judged)
        self.events.emit(Metric(step=self.step, metrics=dict(figures)))
        if self.world.any(time.monotonic() - self._saved > SNAPSHOT_SECONDS):
            self._save()

    def _finish(self, one: _Set) -> SetScores:
        """Reports a set that has been asked to its end."""
        found = set_scores(
            one.judged,
            samples=self.spec.samples_of(one.ref),
            pass_at=self.spec.pass_at,
            seed=self.spec.seed,
        )
        self.events.emit(Metric(step=self.step, metrics=_figures(one.label, found)))
        shown_of = [each for each in one.judged if each.answers]
        for sample in shown(
            self.step,
            "eval",
            [each.example for each in shown_of],
            [each.answers[0].text for each in shown_of],
            [each.verdicts[0] for each in shown_of],
        ):
            self.events.emit(sample)
        return found

    # ------------------------------------------------------------------ what is kept

    def _kept(self) -> KeptAnswers:
        """The answers that are there: of this directory, of its newest checkpoint, or of the
        evaluation that is graded anew. Every rank has them; rank 0 writes."""
        source = source_of(self.spec, [one.sha256 for one in self.sets])
        checkpoints = self.directory / "checkpoints"

        def bring() -> None:
            sweep(checkpoints)
            folder, torn = newest_whole(checkpoints)
            for damaged in torn:
                set_aside(damaged)
            kept = KeptAnswers(self.directory / COMPLETIONS, source)
            if folder is not None:
                kept.take_from(folder / COMPLETIONS)
            if self.spec.completions_of is not None:
                kept.take_from(self.directory / FOLDER / COMPLETIONS)

        self.world.first(bring)
        return KeptAnswers(self.directory / COMPLETIONS, source)

    def _save(self) -> None:
        """A checkpoint: the answers, and how each problem of each set went."""
        step = self.step
        folder = self.directory / "checkpoints" / step_folder(step)

        def write(temporary: Path) -> None:
            judged = [_in_order(one) for one in self.sets]
            self.kept.write_graded(temporary / COMPLETIONS, judged)
            content = {
                one.label: {
                    "data_sha256": one.sha256,
                    "problems": [score.model_dump() for score in problem_scores(some)],
                }
                for one, some in zip(self.sets, judged, strict=True)
            }
            (temporary / PROBLEMS).write_text(json.dumps(content, ensure_ascii=False))

        def save() -> None:
            publish(folder, write, expected_bytes=(self.directory / COMPLETIONS).stat().st_size)
            prune(folder.parent, 2)

        self.world.first(save)
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
            completions_of=spec.completions_of,
            seconds=seconds,
            environment=self.environment,
            benchmarks=[
                SetReport(
                    name=one.label,
                    split=one.ref.split,
                    data_sha256=one.sha256,
                    temperature=params.temperature,
                    top_p=params.top_p,
                    max_new_tokens=params.max_new_tokens,
                    template=self.kept.templates.get(one.number)
                    or spec.template_of(one.ref).model_dump(),
                    **found.model_dump(),
                )
                for one, found in zip(self.sets, results, strict=True)
            ],
        ).model_dump(mode="json")


class _Nobody:
    """A sampler where nothing is left to sample."""

    def sync(self, *_: object) -> dict[str, float]:
        return {}

    def sample(self, *_: object, **__: object) -> list[Any]:
        raise AssertionError("every problem has its answers")

    def close(self) -> None:
        """Nothing is held."""


def _in_order(one: _Set) -> list[Judged]:
    """What was judged so far, in the order of the set."""
    judged = {each.example.id: each for each in one.judged}
    return [judged[e.id] for e in one.problems if e.id in judged]


def _so_far(judged: Sequence[Judged]) -> float:
    values = [v.value for one in judged for v in one.verdicts if v.value is not None]
    return mean([float(value) for value in values])


def _figures(label: str, found: SetScores) -> dict[str, float | None]:
    """The scores under the names that the metrics stream uses."""
    figures: dict[str, float | None] = {}
    for name, score in found.scores.items():
        figures[f"eval/{label}/{name}"] = score.value
        figures[f"eval/{label}/{name}/low"] = score.low
        figures[f"eval/{label}/{name}/high"] = score.high
    for name, count in found.outcomes.model_dump().items():
        figures[f"eval/{label}/{name}"] = float(count)
    figures[f"eval/{label}/truncation_rate"] = found.truncation_rate
    return figures
