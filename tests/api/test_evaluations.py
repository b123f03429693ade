"""Evaluations over the API: what is accepted, what they begin with, what their scores say."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from bridge_client import models as client_models
from bridge_engine import events as ev
from bridge_engine.checkpoint import MANIFEST, is_whole, publish, sha256_of
from bridge_engine.evaluation.answers import COMPLETIONS, PROBLEMS
from bridge_engine.evaluation.report import (
    EvaluationResult,
    Outcomes,
    ProblemScore,
    Score,
    SetReport,
)
from bridge_engine.initial_parameters import FOLDER
from bridge_engine.spec import TrainSpec
from service.artifacts import ArtifactStore
from service.evaluations import routes
from service.evaluations.scores import Scores
from service.settings import Settings
from service.store import Artifact, Store
from service.store.artifacts import publication
from tests.api.conftest import BRIDGE, Worker, connect, problem
from worker.fetch import fetch

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


# --------------------------------------------------------------------------- scores


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
