"""Evaluations over the API: what is accepted, and what they begin with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from bridge_engine import events as ev
from bridge_engine.evaluation.answers import COMPLETIONS
from bridge_engine.state.checkpoint import MANIFEST, is_whole, sha256_of
from bridge_engine.state.initial_parameters import FOLDER
from service.artifacts import ArtifactStore
from service.settings import Settings
from service.store import Artifact, Store
from service.store.artifacts import publication
from tests.api.conftest import BRIDGE, Worker, connect, problem
from tests.api.evaluating import CARD, EVAL, TEMPLATE, finish, post, replace_adapter, trained
from worker.fetch import fetch

__all__ = ["trained"]  # a fixture

# --------------------------------------------------------------------------- what is accepted


def test_an_evaluation_is_queued_with_every_default_of_its_preset(client: TestClient) -> None:
    made = post(client, preset="simplerl", benchmarks="arithmetic", sampling={"samples": 2})
    assert (made["kind"], made["method"], made["model"]) == ("eval", "eval", "bridge-tiny")
    assert (made["status"], made["adapter"], made["steps"]) == ("queued", None, 250)
    sampling = made["spec"]["sampling"]
    assert (sampling["temperature"], sampling["top_p"], sampling["samples"]) == (1.0, 0.95, 2)
    assert sampling["max_new_tokens"] == 192  # three quarters of the context, not 16,000
    assert [j["id"] for j in client.get("/jobs?kind=eval").json()["data"]] == [made["id"]]
    assert client.get("/jobs?kind=train").json()["data"] == []


def test_presets_ask_aime_as_often_as_their_convention_does(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"id": "a", "problem": "1+1?", "answer": "2"}
    for name in ("aime24", "amc23"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setenv("BRIDGE_DATA_DIR", str(tmp_path))

    def samples(**changes: Any) -> list[int | None]:
        made = post(client, benchmarks="aime24,amc23", model="smollm2-135m-instruct", **changes)
        return [one["samples"] for one in made["spec"]["benchmarks"]]

    assert samples(preset="simplerl") == [32, None]
    assert samples(preset="luffy") == [32, 32]
    assert samples(preset="luffy", sampling={"samples": 4}) == [None, None]
    assert samples(preset="qwen2.5-math") == [None, None]


def test_a_dry_run_tells_what_it_would_cost(client: TestClient, store: Store) -> None:
    body = {**EVAL, "sampling": {"samples": 8, "temperature": 1.0, "max_new_tokens": 100}}
    answer = client.post("/jobs?dry_run=true", json=body)
    assert answer.status_code == 200, answer.text
    costs = answer.json()["estimates"]
    assert (costs["steps"], costs["rollouts"], costs["max_tokens"]) == (4, 32, 3200)
    assert costs["memory_bytes"] > costs["memory"]["base"] > 0
    assert 0 < costs["seconds"]["cpu_core"] < 60
    assert store.list_jobs()[0] == []


def test_a_dry_run_warns_of_problems_that_the_adapter_was_trained_on(
    client: TestClient, trained: str, settings: Settings
) -> None:
    card = settings.run_dir(trained.partition("@")[0]) / "adapters/step-000002/bridge.json"
    demos = {"name": "arithmetic", "split": "demos", "kinds": ["add3"]}
    card.write_text(json.dumps({**CARD, "data": {"demos": demos}}))

    def warnings(of: dict[str, Any], benchmark: str | dict[str, Any]) -> list[str]:
        body = {"kind": "eval", "benchmarks": [benchmark], **of}
        answer = client.post("/jobs?dry_run=true", json=body)
        assert answer.status_code == 200, answer.text
        found: list[str] = answer.json()["warnings"]
        return found

    adapter, base = {"adapter": trained}, {"model": "bridge-tiny"}
    (warning,) = warnings(adapter, "arithmetic/demos")
    assert f"data.demos (arithmetic/demos), which {trained} was trained on" in warning
    assert warnings(adapter, {**demos, "kinds": ["times"]}) == []
    assert warnings(adapter, "arithmetic/dev") == []
    assert warnings(base, "arithmetic/demos") == []


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"kind": "evil"}, "kind", "unknown_job_kind"),
        ({"benchmarks": []}, "benchmarks", "too_short"),
        ({"benchmarks": ["gsm8kk"]}, "benchmarks.0.name", "unknown_dataset"),
        ({"benchmarks": ["arithmetic/tset"]}, "benchmarks.0.split", "unknown_split"),
        ({"benchmarks": "ds_none"}, "benchmarks.0.name", "unknown_dataset"),
        ({"benchmarks": [{"name": "arithmetic", "limitt": 1}]}, "benchmarks.0.limitt", None),
        ({"model": "../etc"}, "model", "path_refused"),
        ({"model": "bridge-tiniest"}, "model", "unknown_model"),
        ({"adapter": "job_0@1"}, "adapter", "unknown_adapter"),
        ({"adapter": "../x"}, "adapter", "string_pattern_mismatch"),
        ({"completions_of": "job_0"}, "completions_of", "unknown_job"),
        ({"sampling": {"samples": 4}}, "sampling.temperature", "impossible_combination"),
        ({"sampling": {"max_new_tokens": 256}}, "sampling.max_new_tokens", "longer_than_context"),
        ({"template": {"kind": "chat"}}, "template.kind", "no_chat_template"),
        ({"pass_at": [2]}, "pass_at", "too_few_samples"),
        ({"pass_at": [1] * 33}, "pass_at", "too_long"),
        ({"benchmarks": ["arithmetic", "arithmetic/dev"]}, "benchmarks", "impossible_combination"),
        ({"method": "rl"}, "method", "unknown_field"),
        ({"runtime": {"device": "cpu"}, "resources": {"gpus": 1}}, "resources.gpus", None),
    ],
)
def test_what_cannot_be_evaluated_is_refused_with_the_field(
    client: TestClient, store: Store, changes: dict[str, Any], param: str, code: str | None
) -> None:
    body = problem(client.post("/jobs", json={**EVAL, **changes}), 422, code)
    assert body["param"] == param, body
    assert store.list_jobs()[0] == []


# --------------------------------------------------------------------------- what it begins with


def test_an_adapter_is_named_for_ever_and_lies_in_the_run_directory(
    client: TestClient, settings: Settings, trained: str
) -> None:
    made = post(client, adapter=f"{trained.partition('@')[0]}@best", model=None)
    assert made["spec"]["adapter"] == trained
    assert made["spec"]["model"] == "bridge-tiny"
    # its own template and limit, so that its scores are those of its training
    assert made["spec"]["template"] == TEMPLATE
    assert made["spec"]["sampling"]["max_new_tokens"] == 24
    folder = settings.run_dir(made["id"]) / FOLDER
    assert is_whole(folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == b"weights"
    assert client.put("/adapters/aliases/good", json={"adapter": trained}).status_code == 200
    assert post(client, adapter="good")["spec"]["adapter"] == trained


@pytest.mark.parametrize("name", ["{job}@latest", "{job}@best", "{job}", "good", "{job}@2"])
def test_a_request_that_is_sent_again_makes_no_other_job_whatever_the_name_means_now(
    client: TestClient, settings: Settings, worker: Worker, store: Store, trained: str, name: str
) -> None:
    client.put("/adapters/aliases/good", json={"adapter": trained})
    body = {**EVAL, "adapter": name.format(job=trained.partition("@")[0])}
    headers = {"Idempotency-Key": "once"}
    made = client.post("/jobs", json=body, headers=headers).json()
    assert made["spec"]["adapter"] == trained
    replace_adapter(settings, worker, store, trained)
    client.put("/adapters/aliases/good", json={"adapter": trained.replace("@2", "@4")})
    again = client.post("/jobs", json=body, headers=headers)
    assert (again.status_code, again.json()["id"]) == (201, made["id"])
    assert again.headers["Idempotent-Replayed"] == "true"
    other = client.post("/jobs", json={**body, "seed": 1}, headers=headers)
    problem(other, 409, "idempotency_key_reused")


def test_an_evaluation_can_be_forked_when_its_adapter_is_gone(
    client: TestClient, settings: Settings, worker: Worker, store: Store, trained: str
) -> None:
    made = post(client, adapter=trained)
    replace_adapter(settings, worker, store, trained)
    gone = client.post("/jobs", json={**EVAL, "adapter": trained})
    assert problem(gone, 422, "adapter_gone")["param"] == "adapter"
    forked = client.post(f"/jobs/{made['id']}/fork", json={"overrides": {"seed": 3}})
    assert forked.status_code == 201, forked.text
    assert forked.json()["spec"]["adapter"] == trained
    folder = settings.run_dir(forked.json()["id"]) / FOLDER
    assert is_whole(folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == b"weights"
    other = {"overrides": {"adapter": trained.replace("@2", "@4")}}
    assert client.post(f"/jobs/{made['id']}/fork", json=other).status_code == 201


def test_an_adapter_of_another_base_is_refused(client: TestClient, trained: str) -> None:
    asked = {**EVAL, "adapter": trained, "model": "smollm2-135m-instruct"}
    body = problem(client.post("/jobs", json=asked), 422, "wrong_base")
    assert (body["param"], body["allowed"]) == ("model", ["bridge-tiny"])


def test_an_adapter_that_was_made_elsewhere_is_fetched_and_published_for_the_worker(
    settings: Settings, store: Store, worker: Worker, trained: str, tmp_path: Path
) -> None:
    artifacts = ArtifactStore(f"file://{tmp_path / 'shared'}")
    job_id = trained.partition("@")[0]
    here = settings.run_dir(job_id) / "adapters" / "step-000002"
    sha256 = sha256_of(here / MANIFEST)
    prefix = publication(job_id, "adapters/step-000002", 1, sha256)
    stored = artifacts.put(here, prefix)
    attempt = store.get_job(job_id).attempt
    row = Artifact("adapters/step-000002", 2, prefix, sha256, stored.bytes)
    event = worker.checkpoint(2, accuracy=0.5)
    event.sha256, event.seq, event.time = sha256_of(here / "adapter_model.safetensors"), 9, 1.7e9
    store.append_events(job_id, attempt, [event], [row])
    shutil.rmtree(settings.run_dir(job_id))
    shared = settings.model_copy(update={"artifacts_url": f"file://{tmp_path / 'shared'}"})
    with connect(shared) as client:
        made = post(client, adapter=trained)
    elsewhere = tmp_path / "elsewhere"
    fetch(elsewhere, store.get_job(made["id"]), store, artifacts, lambda work: work())
    assert is_whole(elsewhere / FOLDER)
    assert (elsewhere / FOLDER / "adapter_model.safetensors").read_bytes() == b"weights"


def test_a_run_that_went_on_elsewhere_leaves_no_answers_behind(
    client: TestClient, settings: Settings, store: Store, worker: Worker, tmp_path: Path
) -> None:
    job_id = post(client)["id"]
    worker.emit(job_id, worker.claim(job_id), ev.Phase(phase="evaluating", steps=4))
    run = settings.run_dir(job_id)
    run.mkdir(parents=True)
    for name in (COMPLETIONS, "spec.json"):  # and no events: those in the database are another's
        (run / name).write_text("{}\n")
    artifacts = ArtifactStore(f"file://{tmp_path / 'shared'}")
    fetch(run, store.get_job(job_id), store, artifacts, lambda work: work())
    assert [path.name for path in run.iterdir()] == ["spec.json"]


def test_an_evaluation_is_no_place_to_start_training_from(
    client: TestClient, settings: Settings, worker: Worker
) -> None:
    made = post(client)
    finish(settings, worker, made["id"], [1, 0, 0, 1])
    body = problem(
        client.post("/jobs", json={**BRIDGE, "init": {"job": made["id"]}}),
        422,
        "not_a_training_job",
    )
    assert body["param"] == "init.job"
    asked = client.post(f"/jobs/{made['id']}/fork", json={"from_checkpoint": "latest"})
    assert problem(asked, 422, "not_a_training_job")["param"] == "from_checkpoint"
    forked = client.post(f"/jobs/{made['id']}/fork", json={"overrides": {"seed": 7}})
    assert forked.status_code == 201, forked.text
    assert (forked.json()["kind"], forked.json()["spec"]["seed"]) == ("eval", 7)
    problem(client.get(f"/adapters/{made['id']}"), 404, "unknown_adapter")
