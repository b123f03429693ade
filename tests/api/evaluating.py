"""An adapter to evaluate, and what a worker and its engine leave of an evaluation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from bridge_engine import events as ev
from bridge_engine.evaluation.answers import COMPLETIONS, PROBLEMS
from bridge_engine.evaluation.report import (
    EvaluationResult,
    Outcomes,
    ProblemScore,
    Score,
    SetReport,
)
from bridge_engine.state.checkpoint import publish, sha256_of
from service.settings import Settings
from service.store import Store
from tests.api.conftest import Worker

EVAL: dict[str, Any] = {
    "kind": "eval",
    "model": "bridge-tiny",
    "benchmarks": [{"name": "arithmetic", "limit": 4}],
}


CARD = {"base_model": "bridge-tiny", "template": {"kind": "plain"}, "max_new_tokens": 24}


TEMPLATE = {"kind": "plain", "system": None, "suffix": ""}


@pytest.fixture
def trained(settings: Settings, worker: Worker, job: str) -> str:
    """The name of an adapter whose folder is really there."""
    event = worker.checkpoint(2, accuracy=0.5)

    def write(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
        (folder / "adapter_config.json").write_text("{}")
        (folder / "bridge.json").write_text(json.dumps(CARD))

    folder = settings.run_dir(job) / str(event.adapter)
    publish(folder, write)
    event.sha256 = sha256_of(folder / "adapter_model.safetensors")
    worker.emit(job, worker.claim(job), event)
    return f"{job}@2"


def replace_adapter(settings: Settings, worker: Worker, store: Store, trained: str) -> None:
    """What becomes of an adapter's job: it saves a better one, and the old one's files go."""
    job = trained.partition("@")[0]
    event = worker.checkpoint(4, accuracy=0.9)
    old, new = (settings.run_dir(job) / f"adapters/step-00000{n}" for n in (2, 4))
    shutil.copytree(old, new)
    shutil.rmtree(old)
    event.sha256 = sha256_of(new / "adapter_model.safetensors")
    worker.emit(job, store.get_job(job).attempt, event)


def post(client: TestClient, **changes: Any) -> dict[str, Any]:
    response = client.post("/jobs", json={**EVAL, **changes})
    assert response.status_code == 201, response.text
    made: dict[str, Any] = response.json()
    return made


def finish(
    settings: Settings,
    worker: Worker,
    job_id: str,
    rights: list[int],
    limit: int = 24,
    label: str = "arithmetic",
    samples: int = 1,
) -> None:
    """What a worker and its engine leave of an evaluation in which these problems went so: right
    answers to each."""
    store, attempt = worker.store, worker.claim(job_id)
    job = store.get_job(job_id)
    scores = [
        ProblemScore(
            id=str(n),
            sha256="0" * 16,
            judged=samples,
            right=right,
            majority=float(2 * right > samples) if samples > 1 else None,
        )
        for n, right in enumerate(rights)
    ]

    def write(folder: Path) -> None:
        content = {label: {"problems": [one.model_dump() for one in scores]}}
        (folder / PROBLEMS).write_text(json.dumps(content))
        lines = [{"source": {}}, *({"id": one.id, "answers": []} for one in scores)]
        (folder / COMPLETIONS).write_text("".join(json.dumps(line) + "\n" for line in lines))

    step, share = len(rights), sum(rights) / (len(rights) * samples)
    names = ["pass@1", *([f"{kind}@{samples}" for kind in ("avg", "pass", "maj")] * (samples > 1))]
    path = f"checkpoints/step-{step:06d}"
    publish(settings.run_dir(job_id) / path, write)
    worker.emit(
        job_id,
        attempt,
        ev.Phase(phase="evaluating", steps=step),
        ev.Metric(step=step, metrics={f"eval/{label}/pass@1": share}),
        ev.Checkpoint(step=step, path=path),
    )
    result = EvaluationResult(
        model=job.model,
        adapter=job.spec["adapter"],
        preset="bridge",
        grader={"name": "math", "tolerance": None, "version": "2"},
        seed=0,
        engine=job.spec["sampling"]["engine"],
        completions_of=None,
        seconds=1.0,
        environment={"device": "cpu"},
        benchmarks=[
            SetReport(
                name=label,
                split="dev",
                data_sha256="0" * 64,
                temperature=0.0,
                top_p=1.0,
                max_new_tokens=limit,
                template=TEMPLATE,
                problems=step,
                left_out=0,
                samples=samples,
                scores={
                    name: Score(value=share, low=0.0, high=1.0, problems=step, interval="wilson")
                    for name in names
                },
                outcomes=Outcomes(right=sum(rights), wrong=step - sum(rights)),
                reasons={},
                truncation_rate=0.0,
                mean_tokens=8.0,
                by_kind={},
                by_level={},
            )
        ],
    )
    store.finish(job_id, attempt, "succeeded", result=result.model_dump(mode="json"))
