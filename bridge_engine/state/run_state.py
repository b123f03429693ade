"""What a run must remember to go on: progress, parameters, optimisers; and what it gives away."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bridge_engine.distributed.ranks import World
from bridge_engine.distributed.sharding import gathered, whole
from bridge_engine.errors import EngineError
from bridge_engine.evaluate import Score
from bridge_engine.events import Checkpoint
from bridge_engine.export import AdapterCard, write_exports
from bridge_engine.methods import Method
from bridge_engine.metrics import Metrics
from bridge_engine.parameters import ParameterSet
from bridge_engine.policy import Policy
from bridge_engine.spec.identity import spec_document
from bridge_engine.spec.train import TemplateSpec, TrainSpec
from bridge_engine.state.checkpoint import (
    is_whole,
    newest_whole,
    prune,
    publish,
    set_aside,
    step_folder,
    sweep,
)
from bridge_engine.state.initial_parameters import unfit
from bridge_engine.state.tensor_files import load_tensors, save_tensors


@dataclass
class Progress:
    """How far a run has come, and what it has measured."""

    step: int = 0
    """Finished optimisation steps."""
    seconds: float = 0.0
    """Wall-clock seconds spent in steps, over all attempts."""
    before: list[float] | None = None
    """[accuracy, low, high] of the untrained policy on the held-out problems."""
    after: list[float] | None = None
    """The same at the latest measurement."""
    best: list[float] | None = None
    best_step: int | None = None
    eval_n: int = 0
    measured_at: int | None = None
    """Step of the latest measurement."""
    student_alone: list[float] | None = None
    """[accuracy, low, high] of the student without its teacher at the latest measurement."""
    skipped: int = 0
    """Updates passed over because they came out NaN or infinite."""
    skipped_in_a_row: int = 0
    num_rollouts: int = 0
    """Completions sampled for training, those that dynamic sampling threw away included."""
    num_updates: int = 0
    """Times that an optimiser has moved the student."""

    @property
    def spent(self) -> Metrics:
        """What methods are compared by, beside seconds."""
        return {"num_rollouts": self.num_rollouts, "num_updates": self.num_updates}

    @property
    def accuracy(self) -> float | None:
        """Held-out accuracy of the current step, if it was measured."""
        return self.after[0] if self.after and self.measured_at == self.step else None

    @property
    def student_accuracy(self) -> float | None:
        """That of the student without its teacher, if it was measured at the current step."""
        alone = self.student_alone
        return alone[0] if alone and self.measured_at == self.step else None

    def measured(self, score: Score) -> None:
        """Takes in a measurement made at the current step."""
        if not score.judged:
            return  # nothing is known, which is not an accuracy of 0
        figures = [score.accuracy, *score.interval]
        self.eval_n, self.measured_at = score.judged, self.step
        if self.step == 0:
            self.before = figures
            return
        self.after = figures
        if self.best is None or figures[0] >= self.best[0]:  # of equals the latest
            self.best, self.best_step = figures, self.step

    def result(self, spec: TrainSpec) -> dict[str, Any]:
        """What the finished run has to show (`Done.result`)."""
        result: dict[str, Any] = {
            "method": spec.method.name,
            "last_step": self.step,
            "seconds": round(self.seconds, 3),
            **self.spent,
        }
        if self.before and self.after and self.best:
            result |= {
                "eval_n": self.eval_n,
                "accuracy_before": self.before[0],
                "accuracy_before_ci": self.before[1:],
                "accuracy_after": self.after[0],
                "accuracy_after_ci": self.after[1:],
                "best_step": self.best_step,
                "best_accuracy": self.best[0],
            }
        if self.student_alone:
            result |= {
                "accuracy_student_alone": self.student_alone[0],
                "accuracy_student_alone_ci": self.student_alone[1:],
            }
        if self.skipped:
            result["skipped_steps"] = self.skipped
        return result


class RunState:
    """Saves and restores a run in its directory."""

    def __init__(
        self,
        directory: Path,
        spec: TrainSpec,
        policy: Policy,
        method: Method[Any],
        sets: Mapping[str, ParameterSet],
        template: TemplateSpec,
        data_sha256: Mapping[str, str] | None = None,
        world: World | None = None,
    ) -> None:
        """`data_sha256`: of each set of problems, by its role (`TrainingData.hashes`)."""
        self.root = directory
        self.checkpoints = directory / "checkpoints"
        self.exports = directory / "adapters"
        self.models = directory / "models"
        self.spec = spec
        self.policy = policy
        self.method = method
        self.sets = sets
        self.template = template
        self.data_sha256 = dict(data_sha256 or {})
        self.world = world or World()

    def save(self, progress: Progress) -> Checkpoint:
        """Publishes the exported adapter and the resumable state of the current step, in this
        order: whoever resumes from a state finds its adapter. Saving again changes nothing.

        Every rank calls it, for what they hold in shards; rank 0 writes.
        """
        further = self.method.options.optimizers
        first = self.world.is_first
        tensors = {
            name: gathered(parameters.state(values=name not in further), keep=first)
            for name, parameters in self.sets.items()
        }
        with whole(self.policy, "student"):
            return self.world.first(lambda: self._write(progress, tensors))

    def _write(self, progress: Progress, tensors: Mapping[str, dict[str, Tensor]]) -> Checkpoint:
        folder = self.checkpoints / step_folder(progress.step)
        size = sum(t.nbytes for state in tensors.values() for t in state.values())

        def write(temporary: Path) -> None:
            for name, state in tensors.items():
                save_tensors(temporary / f"{name}.safetensors", state)
            document = {
                "spec": self._spec_document(),
                "data_sha256": self.data_sha256,
                "progress": asdict(progress),
                "method": self.method.state(),
            }
            (temporary / "state.json").write_text(json.dumps(document, indent=1))

        card = AdapterCard(
            base_model=self.spec.model,
            method=self.spec.method.name,
            step=progress.step,
            rank=0,
            template=self.template.model_dump(),
            max_new_tokens=self.spec.rollout.max_new_tokens,
            eval_max_new_tokens=self.spec.eval.max_new_tokens,
            accuracy=progress.accuracy,
            end_tokens=list(self.policy.eos_ids),
            data={role: ref.model_dump() for role, ref in self.spec.trained_on().items()},
        )
        best = progress.accuracy is not None and progress.best_step == progress.step
        exports = write_exports(
            self.policy,
            self.spec,
            self.root,
            card,
            student_accuracy=progress.student_accuracy,
            whole_model=best or progress.step == self.spec.steps,
        )
        publish(folder, write, expected_bytes=size)
        prune(self.checkpoints, self.spec.checkpoint.keep, progress.best_step)
        return Checkpoint(
            step=progress.step,
            path=str(folder.relative_to(self.root)),
            accuracy=progress.accuracy,
            best=best,
            student_accuracy=progress.student_accuracy,
            template=self.template.model_dump(),
            **asdict(exports),
        )

    def resume(self) -> tuple[Progress | None, list[Path]]:
        """(progress of the newest whole checkpoint, parameters restored; damaged newer ones).

        Every rank reads the folder that rank 0 found whole.
        """
        folder, torn = self.world.first(self._newest)
        if folder is None:
            return None, torn
        document = json.loads((folder / "state.json").read_text())
        self._refuse_other_spec(document["spec"])
        self._refuse_other_data(document.get("data_sha256", {}))
        for name, parameters in self.sets.items():
            parameters.load(load_tensors(folder / f"{name}.safetensors"))
        self.method.load(document.get("method", {}))
        return Progress(**document["progress"]), torn

    def start_from(self, folder: Path) -> list[str]:
        """Takes another run's parameters from its checkpoint; the sets it has none of, which stay
        as they are. Optimisers, progress and the order of data are a new run's.

        Raises EngineError (`init_missing`, `init_damaged`, `init_does_not_fit`).
        """
        if not self.world.first(folder.is_dir):
            raise EngineError(
                f"the spec's init names a checkpoint, and {folder} is not there; the service puts "
                "it there for its jobs, a run started by hand needs a copy of one of the folders "
                "in another run's checkpoints/",
                code="init_missing",
                param="init",
            )
        if not self.world.first(lambda: is_whole(folder)):
            raise EngineError(
                f"the checkpoint in {folder}, from which the run should start, is damaged; fork "
                "from another step",
                code="init_damaged",
                param="init.step",
            )
        document = json.loads((folder / "state.json").read_text())
        if errors := unfit(TrainSpec.model_validate(document["spec"]), self.spec):
            raise EngineError(errors[0].message, code=errors[0].code, param=errors[0].param)
        fresh = []
        for name, parameters in self.sets.items():
            if name in self.method.options.optimizers:
                continue  # a further optimiser of tensors that another set has
            file = folder / f"{name}.safetensors"
            if self.world.first(file.is_file):
                parameters.take_values(load_tensors(file))
            elif name == "shadow":
                parameters.toward(self.sets["student"], 1.0)
                fresh.append("shadow (a copy of the student)")
            else:
                fresh.append(name)
        return fresh

    def _newest(self) -> tuple[Path | None, list[Path]]:
        """The same of the folders alone; what crashes left behind is cleared away."""
        for parent in (self.checkpoints, self.exports, self.models):
            sweep(parent)
        folder, torn = newest_whole(self.checkpoints)
        for damaged in torn:
            set_aside(damaged)
        return folder, torn

    def _spec_document(self) -> dict[str, Any]:
        return spec_document(self.spec)

    def _refuse_other_spec(self, saved: dict[str, Any]) -> None:
        # through the model, so that a field which is new since then has its default
        saved = spec_document(TrainSpec.model_validate(saved))
        now = self._spec_document()
        differing = sorted(k for k in {*saved, *now} if saved.get(k) != now.get(k))
        if differing:
            shown = "; ".join(f"{k}: {saved.get(k)} → {now.get(k)}" for k in differing)
            raise EngineError(
                "the run directory holds checkpoints of another spec; use another directory. "
                f"Differences: {shown}",
                code="spec_changed",
                param=differing[0],
            )

    def _refuse_other_data(self, saved: dict[str, str]) -> None:
        now = self.data_sha256
        differing = sorted(role for role in saved if role in now and saved[role] != now[role])
        if differing:
            shown = "; ".join(f"data.{r}: {saved[r][:12]} → {now[r][:12]}" for r in differing)
            raise EngineError(
                "the run directory holds checkpoints of the same spec with other data: the rows "
                "of a set are not what they were. Put the old ones back, or use another directory. "
                f"SHA-256 {shown}",
                code="data_changed",
                param=f"data.{differing[0]}",
            )
