"""Pause, resume, retry, priorities and projects, as the API answers."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.store import Store
from tests.api.conftest import BRIDGE, Worker, problem


def post(client: TestClient, job: str, verb: str, status: int = 200) -> dict[str, Any]:
    response = client.post(f"/jobs/{job}/{verb}")
    assert response.status_code == status, response.text
    body: dict[str, Any] = response.json()
    return body


def test_a_job_is_paused_and_resumed(client: TestClient, worker: Worker, job: str) -> None:
    attempt = worker.claim(job)
    for _ in range(2):
        body = post(client, job, "pause")
        assert (body["status"], body["wanted"]) == ("pausing", "pause")
    worker.store.release(job, attempt)
    assert client.get(f"/jobs/{job}").json()["status"] == "paused"
    body = post(client, job, "resume")
    assert (body["status"], body["wanted"], body["waiting_for"]) == (
        "queued",
        "run",
        "a worker: none is running",
    )


def test_what_cannot_be_is_409_with_what_can(client: TestClient, worker: Worker, job: str) -> None:
    worker.store.finish(job, worker.claim(job), "succeeded", result={})
    body = problem(client.post(f"/jobs/{job}/pause"), 409, "cannot_pause")
    assert body["allowed"] == ["fork"]
    assert "succeeded and cannot be paused" in body["detail"]
    problem(client.post(f"/jobs/{job}/retry"), 409, "cannot_retry")


@pytest.mark.parametrize("verb", ["pause", "resume", "retry", "fork", "cancel"])
def test_steering_an_unknown_job_is_404(client: TestClient, verb: str) -> None:
    problem(client.post(f"/jobs/job_nobody/{verb}"), 404, "unknown_job")


def test_a_failed_job_is_retried(client: TestClient, worker: Worker, job: str) -> None:
    error = {"category": "infra", "code": "disk_full", "message": "full"}
    worker.store.finish(job, worker.claim(job), "failed", error=error)
    body = post(client, job, "retry")
    assert (body["status"], body["error"], body["retries"]) == ("queued", None, 1)
    assert post(client, job, "retry")["retries"] == 1


def test_priority_is_given_at_submission_and_changed_while_it_waits(
    client: TestClient, worker: Worker
) -> None:
    job = client.post("/jobs?priority=5", json=BRIDGE).json()
    assert job["priority"] == 5
    changed = client.patch(f"/jobs/{job['id']}", json={"priority": -3})
    assert changed.json()["priority"] == -3
    body = problem(client.patch(f"/jobs/{job['id']}", json={"priority": 101}), 422)
    assert body["param"] == "priority"
    problem(client.patch(f"/jobs/{job['id']}", json={"name": "x"}), 422)
    worker.claim(job["id"])
    problem(client.patch(f"/jobs/{job['id']}", json={"priority": 9}), 409, "not_waiting")
    problem(client.post("/jobs?priority=1000", json=BRIDGE), 422)


# --------------------------------------------------------------------------- projects


def test_projects_are_made_listed_and_changed(client: TestClient) -> None:
    made = client.post("/projects", json={"id": "maths", "name": "Maths", "max_running": 1})
    assert made.status_code == 201
    assert made.headers["location"] == "/projects/maths"
    assert [p["id"] for p in client.get("/projects").json()["data"]] == ["default", "maths"]
    problem(client.post("/projects", json={"id": "maths", "name": "M"}), 409, "project_exists")
    changed = client.put("/projects/maths", json={"name": "Maths", "gpu_hours": 2.5}).json()
    assert (changed["max_running"], changed["gpu_hours"]) == (None, 2.5)
    assert client.get("/projects/maths").json() == changed
    problem(client.put("/projects/nobody", json={"name": "x"}), 404, "unknown_project")
    problem(client.post("/projects", json={"name": "x", "id": "Not An Id"}), 422)
    assert client.post("/projects", json={"name": "x"}).json()["id"].startswith("proj_")


def test_the_header_chooses_the_project_and_narrows_the_list(client: TestClient) -> None:
    client.post("/projects", json={"id": "maths", "name": "Maths"})
    mine = {"Bridge-Project": "maths"}
    ours = client.post("/jobs", json=BRIDGE).json()
    theirs = client.post("/jobs", json=BRIDGE, headers=mine).json()
    assert (ours["project"], theirs["project"]) == ("default", "maths")
    listed = client.get("/jobs", headers=mine).json()["data"]
    assert [job["id"] for job in listed] == [theirs["id"]]
    assert len(client.get("/jobs").json()["data"]) == 2
    for response in (
        client.get("/jobs", headers={"Bridge-Project": "nobody"}),
        client.post("/jobs", json=BRIDGE, headers={"Bridge-Project": "nobody"}),
    ):
        assert "'nobody'" in problem(response, 404, "unknown_project")["detail"]


def test_a_waiting_job_says_what_it_waits_for(client: TestClient, store: Store) -> None:
    def waits(**change: Any) -> str:
        body = client.post("/jobs", json=BRIDGE | change).json()
        said = client.get(f"/jobs/{body['id']}").json()["waiting_for"]
        listed = {job["id"]: job["waiting_for"] for job in client.get("/jobs").json()["data"]}
        assert said == listed[body["id"]] == body["waiting_for"]
        return str(said)

    assert waits() == "a worker: none is running"
    store.announce_worker("w", ["any", "cpu"], gpus=0, slots=1, seconds=60)
    assert waits() == "a free worker"
    assert waits(resources={"gpus": 1}) == "a worker with a GPU that serves the queue gpu"
    assert waits(resources={"gpus": 2}) == "a worker with 2 GPUs that serves the queue gpu:2"
    client.put("/projects/default", json={"name": "d", "max_running": 1})
    assert store.claim_next("w", 60)
    assert waits() == "the project's quota of 1 running job"
    store.announce_worker("w", ["any", "gpu"], gpus=1, slots=1, seconds=60)
    client.put("/projects/default", json={"name": "d", "gpu_hours": 0})
    used_up = "the project's quota of 0 GPU hours, which are used up"
    assert waits(resources={"gpus": 1}) == used_up


@pytest.mark.parametrize(
    ("runtime", "resources", "queue"),
    [
        ({}, {}, "any"),
        ({"device": "cpu"}, {}, "cpu"),
        ({"device": "cuda"}, {}, "gpu"),
        ({}, {"gpus": 0}, "cpu"),
        ({}, {"gpus": 1}, "gpu"),
        ({"device": "cuda"}, {"gpus": 8}, "gpu:8"),
    ],
)
def test_the_queue_is_what_the_job_needs(
    client: TestClient, runtime: dict[str, str], resources: dict[str, int], queue: str
) -> None:
    body = client.post("/jobs", json=BRIDGE | {"runtime": runtime, "resources": resources})
    assert body.json()["queue"] == queue


@pytest.mark.parametrize(("device", "gpus"), [("cpu", 1), ("cuda", 0)])
def test_gpus_that_the_device_denies_are_refused(
    client: TestClient, device: str, gpus: int
) -> None:
    spec = BRIDGE | {"runtime": {"device": device}, "resources": {"gpus": gpus}}
    assert problem(client.post("/jobs", json=spec), 422)["param"] == "resources.gpus"
