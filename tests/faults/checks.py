"""What must hold after whatever happened, and the undisturbed runs that it is compared with."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bridge_engine.spec.train import TrainSpec
from service.store import JobRow
from service.store.status import OWNED
from tests.faults.engine import MARKS, VIOLATIONS
from tests.faults.house import REPOSITORY, House, as_json
from tests.support.jobs import spec as scripted_spec
from tests.support.scripted_engine import reward

STEPS, SEEDS = 6, (1,)
"""Of the real jobs; each seed costs a run that nothing happens to."""
SCRIPTED_STEPS = 40


def real_spec(seed: int) -> TrainSpec:
    """BRIDGE on bridge-tiny, as small as it gets."""
    return TrainSpec.model_validate(
        {
            "name": f"real {seed}",
            "method": "bridge",
            "model": "bridge-tiny",
            "data": {
                "prompts": "arithmetic",
                "demos": {"name": "arithmetic", "limit": 16},
            },
            "steps": STEPS,
            "seed": seed,
            "rollout": {"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 24},
            "sft": {"batch_size": 2},
            "checkpoint": {"every": 2, "keep": 2},
            "runtime": {"threads": 1},
        }
    )


def specs(seed: int) -> list[dict[str, Any]]:
    """The jobs of a round: one that trains, and two that only say so."""
    scripted = [scripted_spec(SCRIPTED_STEPS, every=8, step_seconds=0.1 * n) for n in (1, 2)]
    return [as_json(real_spec(SEEDS[seed % len(SEEDS)])), *map(as_json, scripted)]


class Undisturbed:
    """What the real jobs come to when nothing happens to them."""

    def __init__(self, folder: Path) -> None:
        self.adapters: dict[str, str] = {}
        self.metrics: dict[str, dict[str, list[tuple[int, float | None]]]] = {}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        for seed in SEEDS:
            path, run = folder / f"{seed}.json", folder / f"run-{seed}"
            path.write_text(real_spec(seed).model_dump_json(by_alias=True))
            command = [sys.executable, "-m", "bridge_engine", "run", str(path), "--dir", str(run)]
            subprocess.run(command, check=True, cwd=REPOSITORY, env=environment)
            name = f"real {seed}"
            self.adapters[name] = adapter_sha256(run)
            self.metrics[name] = _series(run / "metrics.jsonl")


def adapter_sha256(run: Path) -> str:
    """Of the last step's adapter."""
    path = run / "adapters" / f"step-{STEPS:06d}" / "adapter_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _series(path: Path) -> dict[str, list[tuple[int, float | None]]]:
    series: dict[str, list[tuple[int, float | None]]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        for key, value in row.items():
            if key != "step" and not key.startswith("time/"):
                series.setdefault(key, []).append((row["step"], value))
    return series


def assert_all_is_well(house: House, jobs: list[str], undisturbed: Undisturbed) -> None:
    """Everything that is promised, of these jobs and of the house."""
    for job_id in jobs:
        job = house.store.get_job(job_id)
        assert job.status == "succeeded", f"{job_id} is {job.status}: {job.error}"
        _assert_complete(house, job, undisturbed)
    met = house.home / MARKS / VIOLATIONS
    assert not met.exists(), f"two engines ran one job at once:\n{met.read_text()}"
    unknown = tracebacks((house.home / "relay.log").read_text(errors="replace"))
    assert not unknown, "the relay met what it does not know:\n" + "\n".join(unknown)
    _assert_quiet(house)


def tracebacks(log: str) -> list[str]:
    """Each traceback in a log, with the line that led to it and the error it ends with."""
    found: list[str] = []
    before, inside = "", False
    for line in log.splitlines():
        if line.startswith("Traceback"):
            found.append(f"{before}\n{line}")
            inside = True
        elif inside:
            found[-1] += f"\n{line}"
            inside = line.startswith(" ")
        before = line
    return found


def _assert_complete(house: House, job: JobRow, undisturbed: Undisturbed) -> None:
    store, name = house.store, job.name or ""
    found = {k: v for k, v in store.metrics(job.id).items() if not k.startswith("time/")}
    if name in undisturbed.adapters:
        run = house.home / "runs" / job.id
        assert found == undisturbed.metrics[name], f"{job.id}: figures are not the undisturbed ones"
        assert adapter_sha256(run) == undisturbed.adapters[name], f"{job.id}: other adapter bytes"
    else:
        steps = range(1, job.total_steps + 1)
        assert found["reward"] == [(step, reward(step)) for step in steps], job.id
        assert len(store.samples(job.id, limit=10_000)) == job.total_steps, job.id
    seqs = [event.seq for event in store.events_after(job.id, limit=100_000)]
    assert seqs == list(range(1, len(seqs) + 1)), f"{job.id}: events are missing or out of order"
    attempts = store.attempts(job.id)
    assert [a.attempt for a in attempts] == list(range(1, job.attempt + 1))
    assert all(a.outcome for a in attempts), f"{job.id}: an attempt that never ended"
    assert [a.outcome for a in attempts].count("succeeded") == 1


def _assert_quiet(house: House, seconds: float = 120) -> None:
    """Nothing runs, is leased, or waits to be sent."""
    until = time.monotonic() + seconds
    while True:
        counts = house.store.count_jobs()
        held = sum(counts.get(status, 0) for status in (*OWNED, "queued"))
        engines, messages = house.engines(), len(house.store.outbox_batch())
        if not (held or engines or messages):
            return
        assert time.monotonic() < until, f"left over: {counts}, {engines}, {messages} messages"
        time.sleep(0.2)
