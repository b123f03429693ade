"""The engine as a process of its own: `python -m bridge_engine run SPEC --dir RUN`."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bridge_engine.events import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EventReader
from bridge_engine.state.checkpoint import is_whole
from bridge_engine.state.tensor_files import load_tensors
from tests.support.waiting import until

pytestmark = pytest.mark.integration
HELD_ENGINE = Path(__file__).parents[1] / "support" / "held_engine.py"

SPEC = {
    "method": "bridge",
    "model": "bridge-tiny",
    "data": {
        "prompts": "arithmetic",
        "demos": {"name": "arithmetic", "limit": 32},
        "eval": {"name": "arithmetic", "limit": 20},
    },
    "steps": 8,
    "seed": 3,
    "rollout": {"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 48},
    "sft": {"batch_size": 4},
    "eval": {"every": 4},
    "checkpoint": {"every": 2, "keep": 2},
}


class Engine:
    """Starts the engine on a spec in a directory, and reads what it left."""

    def __init__(self, folder, **changes):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.spec = folder / "spec.yaml"
        self.spec.write_text(yaml.safe_dump({**SPEC, **changes}))
        self.run_dir = folder / "run"

    def start(self, *arguments, hold=None, **options):
        """`hold`: the step that it waits after until it is told to stop, so that it is met in the
        middle however slow the test is."""
        engine = ["-m", "bridge_engine"]
        if hold is not None:
            engine = [str(HELD_ENGINE)]
            never = self.folder / "never"
            options["env"] = {**os.environ, "HOLD": f"{hold}:{never}"}
        return subprocess.Popen(
            [
                *(sys.executable, *engine, "run", str(self.spec), "--dir", str(self.run_dir)),
                *arguments,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )

    def finish(self):
        process = self.start()
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    def events(self):
        return EventReader(self.run_dir / "events.jsonl").read(limit=10_000)

    def wait_for_step(self, process, step):
        def reached():
            ended = process.poll() is not None  # looked at first: it may get there and end
            found = any(e.type == "metric" and e.step >= step for e in self.events())
            assert found or not ended, process.communicate()[0]
            return found

        until(reached, otherwise=f"step {step} never came")

    def adapter_hash(self, step):
        path = self.run_dir / "adapters" / f"step-{step:06d}" / "adapter_model.safetensors"
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def metrics(self):
        """Figures by step, less the clock's."""
        lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    engine = Engine(tmp_path_factory.mktemp("undisturbed"))
    status, output = engine.finish()
    assert status == EXIT_DONE, output
    return engine


def test_a_run_leaves_figures_checkpoints_and_an_adapter(undisturbed):
    events = undisturbed.events()
    assert [e.seq for e in events] == list(range(1, len(events) + 1))
    assert [e.step for e in events if e.type == "metric"] == list(range(9))
    assert [e.step for e in events if e.type == "checkpoint"] == [2, 4, 6, 8]
    assert [m["step"] for m in undisturbed.metrics()] == list(range(9))
    done = events[-1]
    assert done.type == "done"
    assert {"accuracy_before", "accuracy_after", "accuracy_after_ci", "best_step"} <= set(
        done.result
    )
    figures = {k for e in events if e.type == "metric" for k in e.metrics}
    assert {"reward", "gain", "lambda", "sft/nll", "accuracy", "entropy"} <= figures
    assert {"grad_norm/student", "grad_norm/teacher", "grad_norm/shadow"} <= figures
    kept = sorted(p.name for p in (undisturbed.run_dir / "checkpoints").iterdir())
    assert kept == ["step-000006", "step-000008"]


def test_rollouts_are_on_policy(undisturbed):
    """The sampler's log-probs are the trainer's: the ratio of the first pass is 1."""
    drifts = [m["sampler_mismatch"] for m in undisturbed.metrics() if "sampler_mismatch" in m]
    assert drifts
    assert max(drifts) < 1e-5


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_resume_is_bitwise(undisturbed, tmp_path, stop):
    engine = Engine(tmp_path)
    process = engine.start(hold=5)
    engine.wait_for_step(process, 3)
    process.send_signal(stop)
    process.communicate(timeout=120)
    assert process.returncode == (EXIT_STOPPED if stop == signal.SIGTERM else -signal.SIGKILL)
    status, output = engine.finish()
    assert status == EXIT_DONE, output
    assert any(e.type == "resume" for e in engine.events())
    assert engine.metrics() == undisturbed.metrics()
    assert engine.adapter_hash(8) == undisturbed.adapter_hash(8)
    seqs = [e.seq for e in engine.events()]
    assert seqs == list(range(1, len(seqs) + 1))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(undisturbed, tmp_path):
    engine = Engine(tmp_path)
    process = engine.start(hold=7)
    engine.wait_for_step(process, 5)
    process.kill()
    process.communicate(timeout=120)
    folders = sorted((engine.run_dir / "checkpoints").glob("step-*"))
    assert len(folders) >= 2, "more, if it was about to remove one"
    os.truncate(folders[-1] / "teacher.safetensors", 10)
    status, output = engine.finish()
    assert status == EXIT_DONE, output
    logs = [e.message for e in engine.events() if e.type == "log"]
    assert any(f"{folders[-1].name} is damaged" in message for message in logs)
    assert engine.adapter_hash(8) == undisturbed.adapter_hash(8)


def test_nan_fails_the_job_with_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    engine = Engine(
        tmp_path,
        optimizer={"student_lr": 1e30, "teacher_lr": 1e30, "max_grad_norm": None},
        checkpoint={"every": 1},
    )
    status, _ = engine.finish()
    assert status == EXIT_FAILED
    failure = engine.events()[-1]
    assert failure.type == "error"
    assert failure.category == "user"
    assert failure.code in {"non_finite", "non_finite_policy"}
    assert failure.step is not None
    assert f"step {failure.step}" in failure.message
    for folder in (engine.run_dir / "checkpoints").glob("step-*"):
        assert is_whole(folder)
        tensors = load_tensors(folder / "student.safetensors").values()
        assert all(bool(t.isfinite().all()) for t in tensors)


def test_a_run_directory_of_another_spec_is_refused_with_the_difference(undisturbed, tmp_path):
    other = Engine(tmp_path, seed=4)
    other.run_dir = undisturbed.run_dir
    size = (undisturbed.run_dir / "events.jsonl").stat().st_size
    status, _ = other.finish()
    assert status == EXIT_FAILED
    failure = undisturbed.events()[-1]
    assert failure.code == "spec_changed"
    assert "seed: 3 → 4" in failure.message
    os.truncate(undisturbed.run_dir / "events.jsonl", size)


def test_two_engines_never_share_a_run_directory(tmp_path):
    engine = Engine(tmp_path)
    first = engine.start(hold=1)
    engine.wait_for_step(first, 0)
    second = engine.start()
    output, _ = second.communicate(timeout=120)
    first.kill()
    first.communicate()
    assert second.returncode == EXIT_FAILED
    assert "another engine is running" in output


def test_an_engine_whose_parent_died_stops(tmp_path):
    engine = Engine(tmp_path, steps=100_000)
    read_end, write_end = os.pipe()
    process = engine.start("--parent-pipe", str(read_end), pass_fds=[read_end])
    os.close(read_end)
    engine.wait_for_step(process, 1)
    os.close(write_end)
    process.communicate(timeout=120)
    assert process.returncode == EXIT_FAILED


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("method: bridge\ndata: {prompts: arithmetic}", "data.demos: method bridge learns from"),
        ("method: brigde\ndata: {}", "did you mean 'bridge'"),
        ("[1, 2", "not valid YAML"),
        ("just words", "must hold a mapping"),
    ],
)
def test_a_bad_spec_is_refused_in_one_sentence_before_anything_starts(tmp_path, text, says):
    engine = Engine(tmp_path)
    engine.spec.write_text(text)
    status, output = engine.finish()
    assert status == EXIT_FAILED
    assert says in output
    assert "Traceback" not in output
    failure = engine.events()[-1]
    assert (failure.type, failure.category, failure.code) == ("error", "user", "invalid_spec")
    assert says in failure.message
