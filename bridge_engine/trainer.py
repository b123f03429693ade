"""The training loop: explore, step, measure, save. The same for every method."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch

from bridge_engine.data.template import resolve_template
from bridge_engine.data.training import TrainingData
from bridge_engine.distributed.ranks import World
from bridge_engine.distributed.sharding import is_shard, shard
from bridge_engine.endings import ending_warning
from bridge_engine.errors import EngineError, NonFinite
from bridge_engine.events import Done, EventWriter, Log, Metric, Phase, Resume, Stopped
from bridge_engine.exploration import Explorer
from bridge_engine.groups import RolloutGroup
from bridge_engine.methods import make_method
from bridge_engine.metrics import Metrics
from bridge_engine.parameters import ParameterSet
from bridge_engine.policy import Policy
from bridge_engine.process import failpoints
from bridge_engine.process.memory import is_out_of_memory, out_of_memory
from bridge_engine.rewards import Verifier
from bridge_engine.rollout import make_sampler
from bridge_engine.seeding import epoch_draw, generator
from bridge_engine.spec.train import TrainSpec
from bridge_engine.state.initial_parameters import FOLDER
from bridge_engine.state.run_state import Progress, RunState
from bridge_engine.token_objectives import TokenObjectives

UNJUDGED_WARNING = 0.05
"""Share of a step's answers that the verifier may fail to judge before it is said aloud."""
WARNINGS = 3
"""Times that one and the same trouble is said aloud by one process."""


class Trainer:
    """One run of one spec in one directory. `stop_requested` is asked after every step.

    A context manager: leaving it ends what it holds outside this process, the verifier's helpers
    and what a sampling server was given.
    """

    def __init__(
        self,
        spec: TrainSpec,
        directory: Path,
        events: EventWriter,
        stop_requested: Callable[[], bool] = lambda: False,
        world: World | None = None,
        accepted: Callable[[dict[str, str]], None] = lambda hashes: None,
    ) -> None:
        """`accepted` is called, on rank 0 and with the hashes of the data, once the directory is
        known to hold no checkpoint of another spec or other data."""
        self.spec = spec
        self.events = events
        self.stop_requested = stop_requested
        self.world = world or World()
        self.accepted = accepted
        self.phase = "loading"
        self._warned: dict[str, int] = {}
        self.method = make_method(spec.method)

        self.policy = Policy.load(spec.model, spec.lora, spec.runtime, spec.student)
        template = resolve_template(spec.template, self.policy.tokenizer)
        for name in self.method.options.adapters:
            self.policy.add(name, spec.seed)
        if spec.rl.kl_coef > 0:
            self.policy.keep_initial()
        shard(self.policy, self.world)
        self.sets = self._parameter_sets()
        self.data = TrainingData(spec, self.policy, template, self._warn)
        # before a checkpoint is taken up: a server is compared with the base's weights
        self.sampler = make_sampler(self.policy, spec.method.policy, directory, spec, self.world)
        self.verifier = Verifier(timeout_s=spec.rl.verifier_timeout)
        self.explorer = Explorer(
            spec, self.policy, self.data, self.sampler, self.verifier, events.emit, self.world
        )
        self.state = RunState(
            directory,
            spec,
            self.policy,
            self.method,
            self.sets,
            template,
            self.data.hashes,
            self.world,
        )

    def _parameter_sets(self) -> dict[str, ParameterSet]:
        options, optimizer = self.method.options, self.spec.optimizer
        moved = {name: name for name in options.adapters} | options.optimizers
        return {
            name: ParameterSet(
                name,
                self.policy.parameters(target),
                optimizer,
                optimizer.teacher_lr if target == "teacher" else optimizer.student_lr,
            )
            for name, target in moved.items()
        }

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.verifier.close()
        self.sampler.close()

    # ------------------------------------------------------------------ the run

    def run(self) -> bool:
        """Trains to the end (True) or until asked to stop (False, state saved)."""
        progress = self._start()
        while progress.step < self.spec.steps and not self.world.any(self.stop_requested()):
            self._enter("training")
            metrics = self._advance(progress)
            self.events.emit(Metric(step=progress.step, metrics=metrics))
            due = progress.step % self.spec.checkpoint.every == 0
            if due or self._is_last(progress) or progress.best_step == progress.step:
                self._save(progress)
        if self._is_last(progress):
            self.events.emit(Done(step=progress.step, result=progress.result(self.spec)))
            return True
        if progress.step > 0:
            self._save(progress)
        self.events.emit(Stopped(step=progress.step))
        return False

    def _save(self, progress: Progress) -> None:
        everything = [t for parameters in self.sets.values() for t in parameters.tensors]
        self.world.agree([t for t in everything if not is_shard(t)])
        saved = self.state.save(progress)
        failpoints.reached("between_checkpoint_and_row")
        self.events.emit(saved)

    def _is_last(self, progress: Progress) -> bool:
        return progress.step == self.spec.steps

    def _start(self) -> Progress:
        """Takes up the newest whole checkpoint, or measures the untrained policy and starts."""
        progress, torn = self.state.resume()
        self.world.first(lambda: self.accepted(self.data.hashes))
        for folder in torn:
            self._warn(f"checkpoint {folder.name} is damaged; going back one further")
        if progress is not None:
            self.events.emit(Resume(step=progress.step))
            # said again, should the last attempt have died between saving it and saying so
            self._save(progress)
            return progress
        if self.events.started_before:  # an earlier attempt died before its first checkpoint
            self.events.emit(Resume(step=-1))
        if self.spec.init is not None:
            fresh = self.state.start_from(self.state.root / FOLDER)
            begins = f"starts from step {self.spec.init.step} of {self.spec.init.job}"
            self.events.emit(
                Log(message=begins + (f"; begins fresh: {', '.join(fresh)}" if fresh else ""))
            )
        progress = Progress()
        metrics = self._evaluate(progress)
        if metrics:
            self.events.emit(Metric(step=0, metrics=metrics | progress.spent))
        return progress

    def _advance(self, progress: Progress) -> Metrics:
        """One step and, where one is due, an evaluation. What goes wrong says in which step."""
        began, step = time.monotonic(), progress.step + 1
        try:
            metrics = self._step(progress)
            progress.step = step
            metrics["time/step"] = time.monotonic() - began
            every = self.spec.eval.every
            if self._is_last(progress) or (every and step % every == 0):
                metrics |= self._evaluate(progress)
        except EngineError as error:
            error.step = step
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(self.spec, step) from error
        progress.seconds += time.monotonic() - began
        return metrics

    # ------------------------------------------------------------------ one step

    def _step(self, progress: Progress) -> Metrics:
        step, steps = progress.step, self.spec.steps
        metrics: Metrics = {}
        groups: list[RolloutGroup] = []
        turns = self.spec.method.turns(step, steps)
        if turns.rewards is not None:
            groups, metrics = self.explorer.explore(step, turns.rewards)
            progress.num_rollouts += int(metrics.pop("rollouts"))
            self._look_at(step, groups, metrics)
        self.method.begin(self.sets, step, steps)
        updates = list(self._updates(step, groups))
        figures: list[Metrics] = []
        for number, mini_batch in enumerate(updates):
            demos = []
            if turns.demos is not None:
                demos = epoch_draw(
                    self.data.demos,
                    self.spec.sft.batch_size,
                    seed=self.spec.seed,
                    purpose="demos",
                    step=turns.demos * len(updates) + number,
                )
            objectives = TokenObjectives(
                self.policy,
                self.method,
                self.spec,
                demos=demos,
                groups=mini_batch,
                library=self.data.demos,
                step_groups=groups,
                world=self.world,
            )
            moves = self._moves()
            try:
                figures.append(self.method.step(objectives, self.sets, step, steps))
            except NonFinite as error:
                self._skip(progress, error)
            else:
                progress.skipped_in_a_row = 0
            progress.num_updates += self._moves() - moves
        metrics = _published_names(_means(figures)) | metrics | progress.spent
        if progress.skipped:
            metrics["skipped_steps"] = float(progress.skipped)
        return metrics

    def _moves(self) -> int:
        """Times that the student was moved, by whichever of its optimisers."""
        further = self.method.options.optimizers
        return sum(
            parameters.moves
            for name, parameters in self.sets.items()
            if further.get(name, name) == "student"
        )

    def _updates(
        self, step: int, groups: Sequence[RolloutGroup]
    ) -> Iterator[Sequence[RolloutGroup]]:
        """The groups of each update of a step: all of them once, unless the spec says otherwise."""
        rl = self.spec.rl
        for epoch in range(rl.inner_epochs if groups else 1):
            parts = min(rl.mini_batches, len(groups)) if groups else 1
            if parts == 1:
                yield groups
                continue
            rng = generator(self.spec.seed, f"mini-batches/{epoch}", step)
            order = torch.randperm(len(groups), generator=rng).tolist()
            for part in range(parts):
                yield [groups[i] for i in order[part::parts]]

    def _skip(self, progress: Progress, error: NonFinite) -> None:
        """Passes over an update that came out NaN or infinite, up to the limit."""
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        limit = self.spec.optimizer.max_skipped
        if progress.skipped_in_a_row > limit:
            raise EngineError(
                f"{error.message} ({progress.skipped_in_a_row} updates in a row were skipped, "
                f"optimizer.max_skipped is {limit})",
                code="non_finite",
                param="optimizer.student_lr",
            ) from error
        self._warn(f"step {progress.step + 1}: an update was skipped: {error.message}")

    def _look_at(self, step: int, groups: Sequence[RolloutGroup], metrics: Metrics) -> None:
        """Says aloud what a person should not have to find in the figures."""
        cut = [c for g in groups for c in g.truncated]
        message = ending_warning(
            self.spec,
            step + 1,
            finished=cut.count(False),
            truncated=cut.count(True),
            ends=self.policy.tokenizer.convert_ids_to_tokens(self.policy.eos_ids),
        )
        if message:
            self._warn(message)
        unjudged = metrics["verifier/unjudged"]
        if unjudged > UNJUDGED_WARNING:
            self._warn_of(
                "unjudged",
                f"{unjudged:.0%} of a step's answers could not be judged, and were left out; see "
                "rl.verifier_timeout, and the samples for what they look like",
            )

    # ------------------------------------------------------------------ measuring

    def _evaluate(self, progress: Progress) -> Metrics:
        """Greedy accuracy on the held-out problems: of the policy, and of the student without its
        teacher; {} where there are no such problems."""
        if not self.data.held_out:
            return {}
        self._enter("evaluating")
        options = self.method.options
        score = self.explorer.measure(progress.step, options.policy, show=True)
        progress.measured(score)
        metrics = score.metrics() if score.judged else {"eval/unjudged": float(score.unjudged)}
        if self.spec.eval.student_alone and options.policy != ("student",):
            alone = self.explorer.measure(progress.step, ("student",), show=False)
            if alone.judged:
                low, high = alone.interval
                progress.student_alone = [alone.accuracy, low, high]
                metrics |= {
                    "accuracy/student_alone": alone.accuracy,
                    "accuracy/student_alone/low": low,
                    "accuracy/student_alone/high": high,
                }
        return metrics

    def _enter(self, phase: Literal["evaluating", "training"]) -> None:
        if phase != self.phase:
            self.phase = phase
            self.events.emit(Phase(phase=phase))

    def _warn(self, message: str) -> None:
        self.events.emit(Log(level="warning", message=message))

    def _warn_of(self, trouble: str, message: str) -> None:
        """Warns of a trouble that may come at every step, the first few times."""
        times = self._warned[trouble] = self._warned.get(trouble, 0) + 1
        if times <= WARNINGS:
            self._warn(message)


def _means(figures: Sequence[Metrics]) -> Metrics:
    """Each figure's mean over the updates that have it."""
    keys = dict.fromkeys(key for one in figures for key in one)
    return {
        key: sum(one[key] for one in figures if key in one) / sum(key in one for one in figures)
        for key in keys
    }


def _published_names(figures: Metrics) -> Metrics:
    """The policy's own figures go by the field's plain names."""
    plain = {
        "entropy/student": "entropy",
        "kl/student": "kl",
        "logprob_drift/student": "sampler_mismatch",
    }
    return {plain.get(key, key): value for key, value in figures.items()}
