"""A new job from a job's spec, and from its checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from bridge_engine.state.checkpoint import MANIFEST, publish, sha256_of
from service.artifacts import ArtifactStore
from service.jobs.fork import merge_patch
from service.settings import Settings
from service.store import Artifact, Store, StoreUnavailable
from service.store.artifacts import publication
from service.store.models import RemainRow
from tests.api.conftest import BRIDGE, Worker, connect, problem
from worker.fetch import fetch
from worker.sweep import sweep_remains


@pytest.fixture
def source(client: TestClient, settings: Settings, worker: Worker, store: Store) -> str:
    """A job that runs, with checkpoints at 4, 8 and 12 (8 the best), the first one deleted."""
    job_id = str(client.post("/jobs?priority=3", json=BRIDGE).json()["id"])
    attempt = worker.claim(job_id)
    for step, accuracy in ((4, 0.1), (8, 0.6), (12, 0.5)):
        worker.emit(job_id, attempt, worker.checkpoint(step, accuracy))
        if step > 4:
            folder = checkpoint(settings, job_id, step)
            folder.mkdir(parents=True)
            state = {"spec": store.get_job(job_id).spec}
            (folder / "state.json").write_text(json.dumps(state))
            (folder / "student.safetensors").write_text(f"weights {step}")
            (folder / "manifest.json").write_text("{}")
    return job_id


def checkpoint(settings: Settings, job_id: str, step: int) -> Path:
    return settings.run_dir(job_id) / "checkpoints" / f"step-{step:06d}"


def fork(client: TestClient, source: str, **body: Any) -> dict[str, Any]:
    response = client.post(f"/jobs/{source}/fork", json=body)
    assert response.status_code == 201, response.text
    made: dict[str, Any] = response.json()
    assert response.headers["location"] == f"/jobs/{made['id']}"
    return made


def test_a_fork_is_the_same_job_with_changes(client: TestClient, source: str) -> None:
    before = client.get(f"/jobs/{source}").json()
    made = fork(client, source, overrides={"steps": 7, "optimizer": {"student_lr": 1e-5}})
    assert (made["status"], made["steps"], made["step"]) == ("queued", 7, 0)
    assert made["forked_from"] == {"job": source, "step": None}
    assert made["priority"] == 3
    changed = {**before["spec"], "steps": 7}
    changed["optimizer"] = {**before["spec"]["optimizer"], "student_lr": 1e-5}
    assert made["spec"] == changed
    assert client.get(f"/jobs/{source}").json() == before


def test_an_empty_body_makes_the_same_job_once_more(client: TestClient, source: str) -> None:
    made = client.post(f"/jobs/{source}/fork").json()
    assert made["spec"] == client.get(f"/jobs/{source}").json()["spec"]
    assert made["id"] != source


@pytest.mark.parametrize(
    ("asked", "init"),
    [({}, None), ({"from_checkpoint": "best"}, 8), ({"overrides": {"steps": 7}}, None)],
)
def test_a_dry_run_of_a_fork_is_its_spec_and_queues_nothing(
    client: TestClient, settings: Settings, source: str, asked: dict[str, Any], init: int | None
) -> None:
    runs = sorted(settings.runs_dir.iterdir())
    told = client.post(f"/jobs/{source}/fork?dry_run=true", json=asked)
    assert told.status_code == 200, told.text
    assert told.json()["object"] == "dry_run"
    assert len(client.get("/jobs").json()["data"]) == 1
    assert sorted(settings.runs_dir.iterdir()) == runs
    made = fork(client, source, **asked)
    assert told.json()["spec"] == made["spec"]
    assert (made["spec"]["init"] or {"step": None})["step"] == init
    again = client.post(f"/jobs/{made['id']}/fork?dry_run=true", json={})
    assert again.json()["spec"] == made["spec"]


def test_a_dry_run_of_a_fork_refuses_what_the_fork_would(client: TestClient, source: str) -> None:
    for asked in ({"from_checkpoint": 5}, {"overrides": {"steps": 0}}, {"overrides": {"sft": 1}}):
        tried = problem(client.post(f"/jobs/{source}/fork?dry_run=true", json=asked), 422)
        made = problem(client.post(f"/jobs/{source}/fork", json=asked), 422)
        assert {**tried, "request_id": None} == {**made, "request_id": None}


@pytest.mark.parametrize(("asked", "step"), [(8, 8), ("best", 8), ("latest", 12)])
def test_the_checkpoint_it_starts_from_outlives_its_deletion(
    client: TestClient, settings: Settings, source: str, asked: object, step: int
) -> None:
    made = fork(client, source, from_checkpoint=asked)
    assert made["forked_from"] == {"job": source, "step": step}
    assert made["spec"]["init"] == {"job": source, "step": step}
    shutil.rmtree(settings.run_dir(source))
    files = {
        file.name: file.read_text() for file in (settings.run_dir(made["id"]) / "init").iterdir()
    }
    assert set(files) == {"manifest.json", "state.json", "student.safetensors"}
    assert files["student.safetensors"] == f"weights {step}"
    again = fork(client, made["id"])
    assert again["forked_from"] == {"job": made["id"], "step": None}
    assert again["spec"]["init"] == made["spec"]["init"]
    assert (settings.run_dir(again["id"]) / "init" / "manifest.json").is_file()


@pytest.mark.parametrize(("asked", "code"), [(4, "checkpoint_gone"), (5, "unknown_checkpoint")])
def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(
    client: TestClient, settings: Settings, source: str, asked: int, code: str
) -> None:
    jobs = len(list(settings.runs_dir.iterdir()))
    body = problem(client.post(f"/jobs/{source}/fork", json={"from_checkpoint": asked}), 422, code)
    assert (body["param"], body["allowed"]) == ("from_checkpoint", ["8", "12"])
    assert len(list(settings.runs_dir.iterdir())) == jobs, "nothing is left behind"


@pytest.mark.parametrize("asked", ["newest", -1, 2**40, True, 1.5, [8]])
def test_what_names_no_checkpoint_is_one_error(
    client: TestClient, source: str, asked: object
) -> None:
    body = problem(client.post(f"/jobs/{source}/fork", json={"from_checkpoint": asked}), 422)
    assert (body["param"], len(body["errors"])) == ("from_checkpoint", 1)
    spec = BRIDGE | {"init": {"job": source, "step": asked}}
    assert problem(client.post("/jobs", json=spec), 422)["param"] == "init.step"


def test_there_is_no_best_where_nothing_was_measured(client: TestClient, job: str) -> None:
    answer = client.post(f"/jobs/{job}/fork", json={"from_checkpoint": "best"})
    problem(answer, 422, "no_best_checkpoint")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"lora": {"rank": 4}}, "lora.rank"),
        ({"lora": {"alpha": 4}}, "lora.alpha"),
        ({"student": "full"}, "student.form"),
        ({"method": "rl"}, "method"),
    ],
)
def test_parameters_that_cannot_fit_are_refused_at_the_field(
    client: TestClient, source: str, change: dict[str, Any], param: str
) -> None:
    body = {"overrides": change, "from_checkpoint": 8}
    refused = problem(client.post(f"/jobs/{source}/fork", json=body), 422, "init_does_not_fit")
    assert refused["param"] == param
    fork(client, source, overrides=change)  # without the checkpoint it is a job like any other


def test_an_override_that_makes_no_sense_is_refused(client: TestClient, source: str) -> None:
    body = problem(client.post(f"/jobs/{source}/fork", json={"overrides": {"stepz": 1}}), 422)
    assert (body["param"], body["nearest"]) == ("stepz", "steps")
    problem(client.post(f"/jobs/{source}/fork", json={"override": {}}), 422)


def test_the_same_idempotency_key_is_one_fork(
    client: TestClient, settings: Settings, source: str, worker: Worker
) -> None:
    def ask() -> Any:
        headers = {"Idempotency-Key": "k"}
        body = {"from_checkpoint": "latest"}
        return client.post(f"/jobs/{source}/fork", json=body, headers=headers)

    first = ask().json()
    shutil.rmtree(settings.run_dir(source))
    again = ask()
    assert (again.json()["id"], again.headers["idempotent-replayed"]) == (first["id"], "true")
    assert sorted(p.name for p in settings.runs_dir.iterdir()) == [first["id"]]


def test_a_new_job_may_start_from_a_checkpoint_too(
    client: TestClient, settings: Settings, source: str
) -> None:
    spec = BRIDGE | {"init": {"job": source, "step": "best"}, "steps": 3}
    dry = client.post("/jobs?dry_run=true", json=spec).json()
    assert dry["spec"]["init"]["step"] == 8
    made = client.post("/jobs", json=spec).json()
    assert made["forked_from"] == {"job": source, "step": 8}
    assert (settings.run_dir(made["id"]) / "init" / "student.safetensors").is_file()
    spec = BRIDGE | {"init": {"job": "job_nobody"}}
    assert problem(client.post("/jobs", json=spec), 422, "unknown_job")["param"] == "init.job"
    spec = BRIDGE | {"init": {"job": "../../etc"}}
    problem(client.post("/jobs", json=spec), 422)


def test_merge_patch_is_rfc_7396() -> None:
    target = {"a": {"b": 1, "c": 2}, "d": [1, 2], "e": "x"}
    patch = {"a": {"b": None, "f": {"g": None, "h": 1}}, "d": [3], "e": {"i": 1}}
    assert merge_patch(target, patch) == {"a": {"c": 2, "f": {"h": 1}}, "d": [3], "e": {"i": 1}}
    assert target == {"a": {"b": 1, "c": 2}, "d": [1, 2], "e": "x"}


def test_a_fork_needs_no_disk_that_the_machines_share(
    settings: Settings, tmp_path: Path, store: Store
) -> None:
    """The source's checkpoint lies in the artifact store alone, and the worker of the new job on a
    machine that has neither run directory."""
    here = settings.model_copy(update={"artifacts_url": f"file://{tmp_path / 'shared'}"})
    artifacts = ArtifactStore(here.artifacts_url)
    worker = Worker(store)
    with connect(here) as client:
        source = str(client.post("/jobs", json=BRIDGE).json()["id"])
        attempt = worker.claim(source)
        elsewhere, event = tmp_path / "elsewhere" / "step-000004", worker.checkpoint(4, 0.5)
        state = json.dumps({"spec": store.get_job(source).spec})
        publish(elsewhere, lambda folder: (folder / "state.json").write_text(state))
        prefix = publication(source, event.path, attempt, sha256_of(elsewhere / MANIFEST))
        put = artifacts.put(elsewhere, prefix)
        event.seq, event.time = 1, 1.7e9
        row = Artifact(event.path, 4, put.prefix, put.sha256, put.bytes)
        store.append_events(source, attempt, [event], [row])

        made = store.get_job(fork(client, source, from_checkpoint="best")["id"])
        again = store.get_job(fork(client, made.id)["id"])
    artifacts.delete(prefix)
    for job in (made, again):
        run = tmp_path / "another machine" / job.id
        run.mkdir(parents=True)
        fetch(run, job, store, artifacts, lambda work: work())
        assert (run / "init" / "state.json").read_text() == state


def test_what_a_fork_published_that_was_never_written_is_swept(
    settings: Settings, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that of one that was written is not."""
    shared = settings.model_copy(update={"artifacts_url": f"file://{tmp_path / 'shared'}"})
    artifacts = ArtifactStore(shared.artifacts_url)
    with connect(shared) as client:
        job_id = str(client.post("/jobs", json=BRIDGE).json()["id"])
        worker = Worker(store)
        worker.emit(job_id, worker.claim(job_id), worker.checkpoint(4, 0.5))
        state = json.dumps({"spec": store.get_job(job_id).spec})
        publish(
            checkpoint(settings, job_id, 4),
            lambda folder: (folder / "state.json").write_text(state),
        )
        made = fork(client, job_id, from_checkpoint=4)["id"]

        def down(*_: object, **__: object) -> None:
            raise StoreUnavailable("no database", reason="unreachable")

        monkeypatch.setattr(Store, "create_job", down)
        assert client.post(f"/jobs/{job_id}/fork", json={"from_checkpoint": 4}).status_code == 503
    published = {path.name for path in (tmp_path / "shared").glob("job_*")}
    assert made in published
    assert len(published) == 2, "the row may have been written: it stays for now"
    with store.write() as session:
        session.execute(update(RemainRow).values(noted_at=1.0))
    sweep_remains(store, artifacts)
    assert [prefix for name in published for prefix in artifacts.publications(name)] == list(
        artifacts.publications(made)
    )
    assert artifacts.publications(made)
