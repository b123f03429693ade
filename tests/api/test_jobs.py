"""The routes under /jobs that read and cancel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from bridge_engine import events as ev
from bridge_engine.spec.train import TrainSpec
from service.jobs import logs
from service.settings import Settings
from service.store import Store
from tests.api.conftest import BRIDGE, Worker, problem

SUBPATHS = ["", "/metrics", "/events", "/samples", "/checkpoints", "/logs", "/attempts"]


@pytest.mark.parametrize("subpath", SUBPATHS)
def test_unknown_job_is_404_everywhere(client: TestClient, subpath: str) -> None:
    body = problem(client.get(f"/jobs/job_nobody{subpath}"), 404, "unknown_job")
    assert "job_nobody" in body["detail"]
    for odd in ("a%00b", "%F0%9F%92%A9", "..%2F..", "x" * 3000):
        problem(client.get(f"/jobs/{odd}{subpath}"), 404)


def test_cancelling_an_unknown_job_is_404(client: TestClient) -> None:
    problem(client.post("/jobs/job_nobody/cancel"), 404, "unknown_job")


def test_running_job_shows_its_step_latest_figures_and_adapter(
    client: TestClient, worker: Worker, job: str
) -> None:
    attempt = worker.claim(job)
    worker.emit(
        job,
        attempt,
        ev.Metric(step=1, metrics={"reward": 0.25, "gain": float("nan")}),
        ev.Metric(step=2, metrics={"reward": 0.5}),
        worker.checkpoint(2, accuracy=0.4),
    )
    body = client.get(f"/jobs/{job}").json()
    assert (body["status"], body["attempt"], body["step"]) == ("running", 1, 2)
    assert body["latest"] == {"reward": 0.5, "gain": None}
    assert body["adapter"] == f"{job}@2"
    assert body["started_at"].endswith("Z")


def test_finished_job_shows_result_or_error(
    client: TestClient, store: Store, worker: Worker, job: str
) -> None:
    failed = store.create_job(TrainSpec.model_validate(BRIDGE), total_steps=10)[0].id
    store.finish(job, worker.claim(job), "succeeded", result={"accuracy_after": 0.7})
    error = {
        "category": "oom",
        "code": "out_of_memory",
        "message": "lower runtime.micro_batch",
        "param": "runtime.micro_batch",
        "retryable": False,
    }
    store.finish(failed, worker.claim(failed), "failed", error=error)
    done = client.get(f"/jobs/{job}").json()
    assert (done["status"], done["result"]) == ("succeeded", {"accuracy_after": 0.7})
    assert done["finished_at"] is not None
    assert client.get(f"/jobs/{failed}").json()["error"] == error


def test_listing_pages_through_every_job_once_newest_first(
    client: TestClient, store: Store
) -> None:
    spec = TrainSpec.model_validate(BRIDGE)
    ids = [store.create_job(spec, total_steps=10)[0].id for _ in range(7)]
    seen: list[str] = []
    after: str | None = None
    while True:
        params = {"limit": 3} | ({"after": after} if after else {})
        page = client.get("/jobs", params=params).json()
        seen += [job["id"] for job in page["data"]]
        store.create_job(spec, total_steps=10)  # newcomers do not move the pages
        after = page["next"]
        assert page["has_more"] == (after is not None)
        if after is None:
            break
    assert seen == ids[::-1]


def test_listing_filters_by_status_method_and_name(client: TestClient, store: Store) -> None:
    def create(**change: object) -> str:
        return store.create_job(TrainSpec.model_validate(BRIDGE | change), total_steps=1)[0].id

    named, rl = create(name="mine"), create(method="rl")
    store.request_cancel(rl)

    def listed(**params: str) -> list[str]:
        return [job["id"] for job in client.get("/jobs", params=params).json()["data"]]

    assert listed(status="queued") == [named]
    assert listed(status="cancelled") == listed(method="rl") == [rl]
    assert listed(name="mine") == [named]
    assert listed(name="nobody's") == []


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("status=done", "status"),
        ("limit=0", "limit"),
        ("limit=many", "limit"),
        ("after=%00", "after"),
        ("name=a%00", "name"),
    ],
)
def test_wrong_query_parameter_is_422_and_named(client: TestClient, query: str, param: str) -> None:
    body = problem(client.get(f"/jobs?{query}"), 422)
    assert body["param"] == param
    if param == "status":
        assert "succeeded" in body["allowed"]


def test_cancelling_is_idempotent_and_never_undoes_an_end(
    client: TestClient, store: Store, worker: Worker, job: str
) -> None:
    queued = store.create_job(TrainSpec.model_validate(BRIDGE), total_steps=10)[0].id
    for _ in range(2):
        assert client.post(f"/jobs/{queued}/cancel").json()["status"] == "cancelled"
    attempt = worker.claim(job)
    for _ in range(2):
        body = client.post(f"/jobs/{job}/cancel").json()
        assert (body["status"], body["wanted"]) == ("cancelling", "cancel")
    store.finish(job, attempt, "succeeded", result={})
    assert client.post(f"/jobs/{job}/cancel").json()["status"] == "succeeded"


def test_metrics_are_series_that_can_be_chosen_cut_and_thinned(
    client: TestClient, worker: Worker, job: str
) -> None:
    attempt = worker.claim(job)
    figures = [{"reward": s / 100, "kl": 0.0, "time/step": 1.0} for s in range(1, 101)]
    figures[41]["reward"] = 9.0  # an outlier that thinning must not lose
    events = [ev.Metric(step=s, metrics=dict(f)) for s, f in enumerate(figures, 1)]
    worker.emit(job, attempt, *events)
    url = f"/jobs/{job}/metrics"
    everything = client.get(url).json()
    assert everything["job_id"] == job
    assert set(everything["metrics"]) == {"reward", "kl", "time/step"}
    assert everything["metrics"]["reward"][:2] == [[1, 0.01], [2, 0.02]]
    for query in ("keys=reward,time/step", "keys=reward&keys=time/step"):
        assert set(client.get(f"{url}?{query}").json()["metrics"]) == {"reward", "time/step"}
    late = client.get(url, params={"after_step": 98, "keys": "reward"}).json()["metrics"]
    assert late == {"reward": [[99, 0.99], [100, 1.0]]}
    thin = client.get(url, params={"max_points": 10}).json()["metrics"]["reward"]
    assert len(thin) <= 10
    assert [42, 9.0] in thin
    problem(client.get(url, params={"max_points": 1}), 422)
    problem(client.get(url, params={"after_step": 10**30}), 422)


def test_samples_and_checkpoints_come_back_as_they_were_reported(
    client: TestClient, worker: Worker, job: str
) -> None:
    attempt = worker.claim(job)
    words = {"problem": "1+1?", "completion": "1+1=2#2", "gold": "2"}
    worker.emit(
        job,
        attempt,
        ev.Sample(step=1, source="rollout", reward=1.0, **words),
        ev.Sample(step=2, source="eval", reward=None, **words),
        worker.checkpoint(1, accuracy=0.5),
        worker.checkpoint(2, accuracy=0.3),
    )
    samples = client.get(f"/jobs/{job}/samples").json()["data"]
    assert [sample["step"] for sample in samples] == [2, 1]
    assert isinstance(samples[1].pop("id"), int)
    assert samples[1] == {"step": 1, "source": "rollout", "reward": 1.0, **words}
    only = client.get(f"/jobs/{job}/samples", params={"step": 2, "limit": 1}).json()["data"]
    assert only == [samples[0]]
    checkpoints = client.get(f"/jobs/{job}/checkpoints").json()["data"]
    shown = [(c["step"], c["adapter"], c["accuracy"], c["best"]) for c in checkpoints]
    assert shown == [(1, f"{job}@1", 0.5, True), (2, f"{job}@2", 0.3, False)]


def test_samples_are_paged_to_the_last_one_and_each_comes_once(
    client: TestClient, worker: Worker, job: str
) -> None:
    attempt = worker.claim(job)
    words = {"problem": "1+1?", "gold": "2", "reward": 1.0}
    written = [
        ev.Sample(step=step, source="rollout", completion=f"{step}.{n}", **words)
        for step in (1, 2, 3)
        for n in range(5)
    ]
    worker.emit(job, attempt, *written)
    url = f"/jobs/{job}/samples"
    seen: list[str] = []
    params: dict[str, object] = {"limit": 4}
    while True:
        page = client.get(url, params=params).json()
        seen += [sample["completion"] for sample in page["data"]]
        assert page["has_more"] == (page["next"] is not None) == (len(seen) < 15)
        if not page["has_more"]:
            break
        assert page["next"] == str(page["data"][-1]["id"])
        worker.emit(job, attempt, ev.Sample(step=4, source="rollout", completion="new", **words))
        params["after"] = page["next"]
    assert seen == [f"{step}.{n}" for step in (3, 2, 1) for n in range(5)]
    exact = client.get(url, params={"step": 2, "limit": 5}).json()
    assert (len(exact["data"]), exact["has_more"], exact["next"]) == (5, False, None)


def test_cursor_of_another_jobs_sample_is_404(
    client: TestClient, store: Store, worker: Worker, job: str
) -> None:
    sample = ev.Sample(step=1, source="eval", problem="1+1?", completion="2", gold="2", reward=1.0)
    worker.emit(job, worker.claim(job), sample)
    cursor = client.get(f"/jobs/{job}/samples").json()["data"][0]["id"]
    other = store.create_job(TrainSpec.model_validate(BRIDGE), total_steps=10)[0].id
    response = client.get(f"/jobs/{other}/samples", params={"after": cursor})
    assert str(cursor) in problem(response, 404, "unknown_sample")["detail"]


def test_metric_that_cannot_come_is_404_with_those_there_are(
    client: TestClient, store: Store, worker: Worker, job: str
) -> None:
    url = f"/jobs/{job}/metrics"

    def ask(keys: str, **query: object) -> Any:
        return client.get(url, params={"keys": keys, **query})

    assert ask("nope").json()["metrics"] == {}  # too early to know
    attempt = worker.claim(job)
    worker.emit(job, attempt, ev.Metric(step=1, metrics={"reward": 0.1, "kl": 0.0}))
    body = problem(ask("reward,rewards"), 404, "unknown_metric")
    assert (body["given"], body["nearest"]) == ("rewards", "reward")
    assert body["allowed"] == ["kl", "reward"]
    assert body["detail"].endswith("'rewards'; did you mean 'reward'? It has: kl, reward")
    assert problem(ask("nothing/of/it"), 404)["detail"].endswith(
        "'nothing/of/it'. It has: kl, reward"
    )
    # What a running job may still report is waited for, what has no later steps is just empty.
    assert set(ask("reward,accuracy,sft/nll").json()["metrics"]) == {"reward"}
    assert ask("reward", after_step=5).json()["metrics"] == {}
    store.finish(job, attempt, "succeeded", result={})
    assert problem(ask("accuracy"), 404, "unknown_metric")["allowed"] == ["kl", "reward"]


def test_attempts_tell_every_workers_try(
    client: TestClient, store: Store, worker: Worker, job: str
) -> None:
    store.release(job, worker.claim(job))
    worker.claim(job)
    attempts = client.get(f"/jobs/{job}/attempts").json()["data"]
    assert [a["attempt"] for a in attempts] == [1, 2]
    assert [a["outcome"] for a in attempts] == ["released", None]
    assert attempts[0]["worker_id"] == "worker-1"


def test_logs_are_the_last_lines_as_plain_text(
    client: TestClient, settings: Settings, job: str
) -> None:
    url = f"/jobs/{job}/logs"
    assert client.get(url).text == ""  # not begun yet
    folder = settings.run_dir(job)
    folder.mkdir(parents=True)
    (folder / "engine.log").write_bytes(b"one\n<script>\nbroken \xff\nlast\n")
    response = client.get(url, params={"tail": 3})
    assert response.text == "<script>\nbroken \\xff\nlast\n"
    assert response.headers["content-type"].startswith("text/plain")
    assert response.headers["x-content-type-options"] == "nosniff"
    problem(client.get(url, params={"tail": 0}), 422)


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("block", [1, 7, 64])
def test_tail_is_the_last_lines_whatever_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, end: str
) -> None:
    monkeypatch.setattr(logs, "BLOCK", block)
    lines = [f"line {n}" for n in range(20)]
    path = tmp_path / "log"
    path.write_text("\n".join(lines) + end)
    for count in (1, 3, 19, 20, 21):
        assert logs.tail(path, count) == "\n".join(lines[-count:]) + end
    path.write_text("")
    assert logs.tail(path, 5) == ""
