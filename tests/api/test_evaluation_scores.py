"""What the scores of evaluations say over the API, one by one, compared, and graded anew."""

from __future__ import annotations

import asyncio
import shutil
from typing import Any

import pytest
from fastapi.testclient import TestClient

from bridge_client import models as client_models
from bridge_engine import events as ev
from bridge_engine.evaluation.answers import COMPLETIONS
from bridge_engine.spec.train import TrainSpec
from bridge_engine.state.initial_parameters import FOLDER
from service.evaluations import routes
from service.evaluations.scores import Scores
from service.settings import Settings
from service.store import Store
from tests.api.conftest import BRIDGE, Worker, problem
from tests.api.evaluating import finish, post, trained

__all__ = ["trained"]  # a fixture


def test_scores_come_with_the_end_and_say_how_they_came_about(
    client: TestClient, settings: Settings, worker: Worker, job: str
) -> None:
    made = post(client)
    problem(client.get(f"/jobs/{job}/scores"), 409, "not_an_evaluation")
    problem(client.get(f"/jobs/{made['id']}/scores"), 409, "evaluation_not_finished")
    finish(settings, worker, made["id"], [1, 0, 1, 1, 0])
    shown = client.get(f"/jobs/{made['id']}").json()
    assert (shown["step"], shown["steps"]) == (5, 5)  # the data had one more than was thought
    assert shown["latest"]["eval/arithmetic/pass@1"] == 0.6
    scores = client.get(f"/jobs/{made['id']}/scores").json()
    assert scores["job_id"] == made["id"]
    (one,) = scores["benchmarks"]
    assert one["scores"]["pass@1"]["value"] == 0.6
    assert one["outcomes"] == {
        "right": 3,
        "wrong": 2,
        "format_error": 0,
        "truncated": 0,
        "unjudged": 0,
    }
    answers = client.get(f"/jobs/{made['id']}/completions")
    assert answers.headers["content-type"] == "application/jsonl"
    assert len(answers.text.splitlines()) == 6


def test_the_client_has_a_field_for_all_that_scores_say() -> None:
    assert set(Scores.model_fields) - {"kind"} <= set(client_models.Scores.model_fields)


def test_two_evaluations_are_compared_problem_by_problem(
    client: TestClient, settings: Settings, worker: Worker
) -> None:
    ours, theirs = (post(client)["id"] for _ in range(2))
    finish(settings, worker, ours, [1, 1, 0, 1])
    finish(settings, worker, theirs, [0, 1, 0, 0, 1, 1], limit=48)
    found = client.get(f"/jobs/{ours}/scores", params={"against": theirs}).json()["against"]
    assert found["job_id"] == theirs
    apart = found["benchmarks"]["arithmetic"]
    # of the four problems that both were asked
    assert (apart["problems"], apart["ours"], apart["theirs"]) == (4, 0.75, 0.25)
    assert (apart["difference"], apart["better"], apart["worse"]) == (0.5, 2, 0)
    assert apart["low"] <= 0.5 <= apart["high"]
    assert found["settings"] == {"benchmarks.arithmetic.max_new_tokens": [24, 48]}
    assert found["others"] == {}
    unknown = client.get(f"/jobs/{ours}/scores", params={"against": "job_0"})
    assert problem(unknown, 422, "unknown_job")["param"] == "against"
    waiting = post(client)["id"]
    early = client.get(f"/jobs/{ours}/scores", params={"against": waiting})
    assert problem(early, 422, "evaluation_not_finished")["param"] == "against"


def test_an_evaluation_recorded_without_its_engine_has_that_of_its_spec(
    client: TestClient, settings: Settings, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results did not always say what had sampled, and the spec always did."""
    monkeypatch.setenv("BRIDGE_VLLM_URL", "http://127.0.0.1:1")
    recorded = worker.store.finish

    def before(job: str, attempt: int, status: Any, **kept: Any) -> None:
        del kept["result"]["engine"]
        recorded(job, attempt, status, **kept)

    made = [post(client, sampling={"engine": engine})["id"] for engine in ("vllm", "native")]
    for job, engine in zip(made, ("vllm", "native"), strict=True):
        with monkeypatch.context() as patch:
            patch.setattr(worker.store, "finish", before)
            finish(settings, worker, job, [1, 0])
        assert client.get(f"/jobs/{job}/scores").json()["engine"] == engine
    found = client.get(f"/jobs/{made[0]}/scores", params={"against": made[1]}).json()["against"]
    assert found["settings"] == {"engine": ["vllm", "native"]}


def test_every_score_that_two_evaluations_have_is_compared(
    client: TestClient, settings: Settings, worker: Worker
) -> None:
    ours, theirs = (post(client)["id"] for _ in range(2))
    finish(settings, worker, ours, [3, 2, 0, 1], samples=3)
    finish(settings, worker, theirs, [1, 0, 0, 0], samples=3)
    found = client.get(f"/jobs/{ours}/scores", params={"against": theirs}).json()["against"]
    others = found["others"]["arithmetic"]
    assert set(others) == {"pass@3", "maj@3"}
    assert (others["pass@3"]["ours"], others["pass@3"]["theirs"]) == (0.75, 0.25)
    assert (others["maj@3"]["difference"], others["maj@3"]["interval"]) == (0.5, "tango")
    assert found["benchmarks"]["arithmetic"]["difference"] == pytest.approx(5 / 12)


def test_scores_are_computed_off_the_event_loop(
    client: TestClient, settings: Settings, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other requests are answered meanwhile."""
    loops = []
    compared = routes.compared

    def watched(*arguments: Any) -> Any:
        loops.append(asyncio._get_running_loop())
        return compared(*arguments)

    monkeypatch.setattr(routes, "compared", watched)
    job = post(client)["id"]
    finish(settings, worker, job, [1, 0])
    assert client.get(f"/jobs/{job}/scores", params={"against": job}).status_code == 200
    assert loops == [None]


def test_sets_are_compared_by_what_they_are_however_they_are_labelled(
    client: TestClient, settings: Settings, worker: Worker
) -> None:
    ours, theirs = (post(client)["id"] for _ in range(2))
    finish(settings, worker, ours, [1, 1, 0, 1], label="arithmetic:dev")
    finish(settings, worker, theirs, [0, 1, 0, 0], limit=48)
    found = client.get(f"/jobs/{ours}/scores", params={"against": theirs}).json()["against"]
    assert found["benchmarks"]["arithmetic:dev"]["difference"] == 0.5
    assert found["settings"] == {"benchmarks.arithmetic:dev.max_new_tokens": [24, 48]}


def test_answers_are_graded_anew_as_an_evaluation_of_its_own(
    client: TestClient, settings: Settings, worker: Worker, store: Store
) -> None:
    on_gpu = {"device": "cuda", "attention": "flash_attention_2", "stall_seconds": 9.0}
    made = post(client, name="first", runtime=on_gpu, resources={"gpus": 1})
    early = client.post(f"/jobs/{made['id']}/regrade")
    problem(early, 409, "evaluation_not_finished")
    finish(settings, worker, made["id"], [1, 0])
    headers = {"Idempotency-Key": "again"}
    body = {"grader": "exact", "name": "second"}
    response = client.post(f"/jobs/{made['id']}/regrade", json=body, headers=headers)
    assert response.status_code == 201, response.text
    again = response.json()
    assert again["spec"]["completions_of"] == made["id"]
    assert again["spec"]["grader"]["name"] == "exact"
    runtime = again["spec"]["runtime"]  # no model is loaded: it waits for no GPU
    assert (runtime["device"], runtime["stall_seconds"]) == ("cpu", 9.0)
    assert (again["spec"]["resources"]["gpus"], again["queue"]) == (0, "cpu")
    assert again["forked_from"] == {"job": made["id"], "step": None}
    assert (settings.run_dir(again["id"]) / FOLDER / COMPLETIONS).is_file()
    once_more = client.post(f"/jobs/{made['id']}/regrade", json=body, headers=headers)
    assert once_more.json()["id"] == again["id"]
    wrong = client.post(f"/jobs/{made['id']}/regrade", json={"grader": "exat"})
    assert problem(wrong, 422)["nearest"] == "exact"
    others = {**again["spec"], "seed": 5}
    assert problem(client.post("/jobs", json=others), 422, "completions_do_not_fit")["param"] == (
        "seed"
    )
    shutil.rmtree(settings.run_dir(made["id"]))
    gone = client.post(f"/jobs/{made['id']}/regrade")
    problem(gone, 409, "completions_gone")
    once_more = client.post(f"/jobs/{made['id']}/regrade", json=body, headers=headers)
    assert once_more.json()["id"] == again["id"]


def test_scores_stand_in_the_card_of_the_adapter(
    client: TestClient, settings: Settings, worker: Worker, trained: str
) -> None:
    before = client.get(f"/adapters/{trained}/download").content
    assert b"## Evaluations" not in before
    made = post(client, adapter=trained)
    finish(settings, worker, made["id"], [1, 0, 1, 1])
    other = post(client)  # of the base alone
    finish(settings, worker, other["id"], [0, 0, 0, 1])
    card = client.get(f"/adapters/{trained}/download").content.decode(errors="replace")
    assert "| arithmetic | pass@1 | 75.0% | 0.0 to 100.0 | 4 problems, 1 samples" in card
    assert made["id"] in card
    assert other["id"] not in card


def test_a_problem_count_is_no_step_of_training(store: Store, worker: Worker) -> None:
    """Only what says how many steps there are changes how many there are."""
    job = store.create_job(TrainSpec.model_validate(BRIDGE), total_steps=10)[0].id
    worker.emit(job, worker.claim(job), ev.Phase(phase="training"))
    assert store.get_job(job).total_steps == 10
