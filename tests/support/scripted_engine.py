"""An engine that trains nothing: it writes the events of a run as a script says.

It keeps the real engine's manners (resume, SIGTERM, parent pipe, exit statuses), so that the worker
can be tested in milliseconds, and breaks them where the script tells it to. The script is JSON in
the job's name; all times in seconds:

    step_seconds   time a step takes (0.02)
    kill_at        dies by SIGKILL after this step, the first time it gets there
    kill_always    dies by SIGKILL after this step, every time
    exit_at        leaves with status 3 and no word after this step, every time
    fail_at        reports figures that are not numbers, then an error, after this step
    hang_at        stops doing anything after this step, and makes the file RUN/hung
    hold           [STEP, FILE]: goes no further than this step until there is the file (or until it
                   is told to stop): whoever wants to meet a run in its middle need not hurry
    eat_at         takes memory after this step until there is none, every time
    full_at        reports that the disk is full after this step, every time
    lose_at        reports that a rank was lost after this step, the first time it gets there
    ignore_term    does not hear SIGTERM
    weight_bytes   size of an adapter's weights, beyond a few (0)
    child          starts a child process of its own that would outlive it; its pid: RUN/child.pid
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bridge_engine import events as ev
from bridge_engine.process import failpoints, lifeline
from bridge_engine.state.checkpoint import prune, publish, sha256_of, step_folder, step_folders


def reward(step: int) -> float:
    """The figure of a step: a function of the step alone, as in a run that resumes exactly."""
    return (step * 37 % 100) / 100


class ScriptedEngine:
    """One process of a scripted run."""

    def __init__(self, spec: dict[str, Any], run: Path) -> None:
        self.run = run
        self.steps: int = spec["steps"]
        self.every: int = spec["checkpoint"]["every"]
        self.keep: int = spec["checkpoint"]["keep"]
        self.script: dict[str, Any] = json.loads(spec["name"] or "{}")
        self.writer = ev.EventWriter(run)
        self.stopping = False

    def main(self) -> int:
        """Runs to the end; the exit status."""
        if self.script.get("ignore_term"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        else:
            signal.signal(signal.SIGTERM, self._on_term)
        (self.run / "engine.pid").write_text(str(os.getpid()))
        (self.run / "devices").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
        if self.script.get("child"):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            (self.run / "child.pid").write_text(str(child.pid))
        step = self._resume()
        self.writer.emit(ev.Phase(phase="training"))
        while step < self.steps:
            self._hold(step)
            time.sleep(self.script.get("step_seconds", 0.02))
            step += 1
            self._report(step)
            if (failed := self._misbehave(step)) is not None:
                return failed
            if step % self.every == 0 or step == self.steps or self.stopping:
                self._save(step)
            if self.stopping and step < self.steps:
                self.writer.emit(ev.Stopped(step=step))
                return ev.EXIT_STOPPED
        self.writer.emit(ev.Done(step=step, result={"best_step": step, "accuracy_after": 0.5}))
        return ev.EXIT_DONE

    def _hold(self, step: int) -> None:
        at, file = self.script.get("hold") or (self.steps, "")
        while step >= at and not self.stopping and not os.path.exists(file):
            time.sleep(0.02)

    def _on_term(self, *_: object) -> None:
        self.stopping = True

    def _resume(self) -> int:
        saved = step_folders(self.run / "checkpoints")
        step = int(saved[-1].name.removeprefix("step-")) if saved else 0
        if self.writer.path.exists():
            self.writer.emit(ev.Resume(step=step))
        return step

    def _report(self, step: int) -> None:
        self.writer.emit(ev.Metric(step=step, metrics={"reward": reward(step), "tokens": step}))
        sample = {"source": "rollout", "problem": f"{step}+0=", "completion": str(step)}
        self.writer.emit(ev.Sample(step=step, gold=str(step), reward=1.0, **sample))

    def _save(self, step: int) -> None:
        name = step_folder(step)
        publish(self.run / "adapters" / name, lambda folder: self._export(folder, step))
        publish(self.run / "checkpoints" / name, lambda folder: self._state(folder, step))
        prune(self.run / "checkpoints", self.keep)
        failpoints.reached("between_checkpoint_and_row")
        weights = self.run / "adapters" / name / "adapter_model.safetensors"
        self.writer.emit(
            ev.Checkpoint(
                step=step,
                path=f"checkpoints/{name}",
                adapter=f"adapters/{name}",
                sha256=sha256_of(weights),
                rank=8,
                accuracy=reward(step),
            )
        )

    def _state(self, folder: Path, step: int) -> None:
        (folder / "state.json").write_text(json.dumps({"step": step}))

    def _export(self, folder: Path, step: int) -> None:
        weights = f"weights of step {step}".encode() + b"." * self.script.get("weight_bytes", 0)
        (folder / "adapter_model.safetensors").write_bytes(weights)
        (folder / "adapter_config.json").write_text("{}")

    def _misbehave(self, step: int) -> int | None:
        script, marker = self.script, self.run / "killed"
        if script.get("kill_always") == step or (
            script.get("kill_at") == step and not marker.exists()
        ):
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if script.get("exit_at") == step:
            print("a last line on the way out", flush=True)
            return 3
        if script.get("fail_at") == step:
            self.writer.emit(ev.Metric(step=step, metrics={"reward": float("nan")}))
            message = "the loss is not a number"
            self.writer.emit(
                ev.Failed(
                    step=step,
                    category="user",
                    code="not_finite",
                    message=message,
                    param="optimizer.student_lr",
                )
            )
            return ev.EXIT_FAILED
        if script.get("full_at") == step:
            full = {"category": "infra", "code": "disk_full", "message": "full"}
            self.writer.emit(ev.Failed(step=step, retryable=True, **full))
            return ev.EXIT_FAILED
        if script.get("lose_at") == step and not marker.exists():
            marker.touch()
            lost = {"category": "infra", "code": "rank_lost", "message": "rank 1 ended"}
            self.writer.emit(ev.Failed(step=None, retryable=True, **lost))
            return ev.EXIT_FAILED
        eaten = []
        while script.get("eat_at") == step:
            eaten.append(b"x" * (1 << 22))
        if script.get("hang_at") == step:
            (self.run / "hung").touch()
        while script.get("hang_at") == step:
            time.sleep(0.1)
        return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["run"])
    parser.add_argument("spec", type=Path)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--parent-pipe", type=int, required=True)
    parser.add_argument("--deadline", type=int, required=True)
    given = parser.parse_args()
    lifeline.hold(given.parent_pipe, given.deadline)
    faulthandler.register(signal.SIGUSR1)
    raise SystemExit(ScriptedEngine(json.loads(given.spec.read_text()), given.dir).main())
