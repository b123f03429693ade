"""POST /jobs: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from bridge_engine.spec import checks as spec_checks
from bridge_engine.spec import job as job_spec
from bridge_engine.spec.checks import check_spec
from service.store import Store
from tests.api.conftest import BRIDGE, problem

DATA = BRIDGE["data"]
YAML = """\
method: {name: bridge, lambda: 0.3}
data: {prompts: arithmetic, demos: arithmetic/demos, eval: arithmetic}
optimizer: {student_lr: 3e-4}
steps: 7
"""


def post(client: TestClient, spec: Any, **query: Any) -> Any:
    return client.post("/jobs", json=spec, params=query)


def test_accepted_job_is_queued_with_every_default_filled_in(client: TestClient) -> None:
    response = post(client, BRIDGE)
    assert response.status_code == 201
    job = response.json()
    assert response.headers["location"] == f"/jobs/{job['id']}"
    assert (job["object"], job["status"], job["wanted"]) == ("job", "queued", "run")
    assert (job["step"], job["steps"], job["attempt"]) == (0, 10, 0)
    assert job["spec"]["data"]["demos"]["split"] == "demos"
    assert job["spec"]["data"]["eval"]["split"] == "dev"
    assert job["spec"]["method"]["lambda"] == 0.5
    assert job["spec"]["eval"]["max_new_tokens"] == 64
    assert client.get(response.headers["location"]).json() == job


def test_resolved_spec_can_be_posted_again_and_stays_the_same(client: TestClient) -> None:
    first = post(client, BRIDGE).json()["spec"]
    assert post(client, first).json()["spec"] == first


@pytest.mark.parametrize("media_type", ["application/yaml", "text/yaml; charset=utf-8"])
def test_yaml_means_the_same_as_json(client: TestClient, media_type: str) -> None:
    response = client.post("/jobs", content=YAML, headers={"Content-Type": media_type})
    assert response.status_code == 201, response.text
    spec = response.json()["spec"]
    assert spec["method"]["lambda"] == 0.3
    assert spec["optimizer"]["student_lr"] == 3e-4  # YAML 1.1 would read a text
    assert spec["steps"] == 7


def test_dry_run_answers_the_spec_and_estimates_and_queues_nothing(
    client: TestClient, store: Store
) -> None:
    response = post(client, BRIDGE, dry_run=True)
    assert response.status_code == 200
    body = response.json()
    assert body["spec"] == post(client, BRIDGE).json()["spec"]
    assert len(store.list_jobs()[0]) == 1  # that of the line above
    estimates = body["estimates"]
    assert estimates["steps"] == 10
    assert estimates["rollouts"] == 10 * 8 * 8
    assert estimates["max_tokens"] == 640 * 64 + 10 * 16 * body["spec"]["sft"]["max_tokens"]
    assert estimates["exported_rank"] == 16
    assert estimates["memory_bytes"] > 4 * estimates["model_parameters"]


def test_estimated_adapter_parameters_are_those_of_the_model(client: TestClient) -> None:
    from bridge_engine.models.catalog import resolve_model

    config = resolve_model("bridge-tiny").config
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = 8 * (2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + ffn))
    one = config["num_hidden_layers"] * layer
    bridge = post(client, BRIDGE, dry_run=True).json()["estimates"]
    sft = post(client, BRIDGE | {"method": "sft"}, dry_run=True).json()["estimates"]
    assert (bridge["adapter_parameters"], sft["adapter_parameters"]) == (3 * one, one)
    assert sft["rollouts"] == 0


# --------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("change", "param", "given", "nearest"),
    [
        ({"method": "bridg"}, "method", "bridg", "bridge"),
        ({"model": "bridge-tini"}, "model", "bridge-tini", "bridge-tiny"),
        ({"data": DATA | {"eval": "arithmetik"}}, "data.eval.name", "arithmetik", "arithmetic"),
        ({"data": DATA | {"eval": "arithmetic/devs"}}, "data.eval.split", "devs", "dev"),
        ({"stepps": 5}, "stepps", "stepps", "steps"),
        ({"rollout": {"group_sise": 4}}, "rollout.group_sise", "group_sise", "group_size"),
        ({"optimizer": {"name": "adamv"}}, "optimizer.name", "adamv", "adamw"),
    ],
)
def test_unknown_name_is_refused_with_field_given_allowed_and_nearest(
    client: TestClient, change: dict[str, Any], param: str, given: str, nearest: str
) -> None:
    body = problem(post(client, BRIDGE | change), 422)
    assert body["param"] == param
    assert body["given"] == given
    assert body["nearest"] == nearest
    assert nearest in body["allowed"]
    assert nearest in body["detail"]


@pytest.mark.parametrize(
    "model", ["../secrets", "/etc", "https://example.org/model", "~/x", "a/b/c"]
)
def test_model_is_a_name_and_never_a_place(client: TestClient, model: str) -> None:
    assert problem(post(client, BRIDGE | {"model": model}), 422)["param"] == "model"


def test_every_field_at_fault_is_named(client: TestClient) -> None:
    spec = BRIDGE | {"steps": 0, "rollout": {"group_size": 1}, "lora": {"rank": 0}, "colour": 1}
    body = problem(post(client, spec), 422)
    named = {error["param"] for error in body["errors"]}
    assert named == {"steps", "rollout.group_size", "lora.rank", "colour"}


# --------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"data": {"prompts": "arithmetic"}}, "data.demos"),
        ({"data": {"demos": "arithmetic"}}, "data.prompts"),
        ({"method": "sft", "data": {"prompts": "arithmetic"}}, "data.demos"),
        ({"rollout": {"group_size": 1}}, "rollout.group_size"),
        ({"method": {"name": "bridge", "lambda": 1.1}}, "method.lambda"),
        ({"method": {"name": "bridge", "lambda": -0.1}}, "method.lambda"),
        ({"method": {"name": "bridge", "lambda": {"start": 0, "end": 2}}}, "method.lambda.end"),
        ({"rollout": {"max_new_tokens": 100_000}}, "rollout.max_new_tokens"),
        ({"sft": {"max_tokens": 100_000}}, "sft.max_tokens"),
        ({"lora": {"rank": 0}}, "lora.rank"),
        ({"steps": 0}, "steps"),
        ({"seed": -1}, "seed"),
        ({"data": DATA | {"eval": "arithmetic/train"}}, "data.eval"),
        ({"name": "x" * 201}, "name"),
        ({"steps": "many"}, "steps"),
        ({"data": "arithmetic"}, "data"),
        ({"data": None}, "data"),
        ({"method": 3}, "method"),
        ({"method": {"lambda": 0.5}}, "method"),
        ({"method": []}, "method"),
        ({"method": None}, "method"),
        ({"data": DATA | {"demos": []}}, "data.demos"),
        ({"data": DATA | {"demos": {"name": 5}}}, "data.demos.name"),
    ],
)
def test_impossible_spec_is_refused_at_the_field_to_change(
    client: TestClient, store: Store, change: dict[str, Any], param: str
) -> None:
    text = json.dumps(BRIDGE | change)
    response = client.post("/jobs", content=text, headers={"Content-Type": "application/json"})
    body = problem(response, 422)
    assert body["param"] == param, body
    assert store.list_jobs()[0] == []


def test_dataset_without_solutions_cannot_be_demos(client: TestClient) -> None:
    rows = b'{"problem": "1+1?", "answer": "2"}\n'
    dataset = client.post("/datasets", content=rows).json()
    spec = BRIDGE | {"data": DATA | {"demos": dataset["id"]}}
    body = problem(post(client, spec), 422, "no_solutions")
    assert body["param"] == "data.demos.name"
    prompts = BRIDGE | {"data": DATA | {"prompts": dataset["id"]}}
    assert post(client, prompts).status_code == 201


@pytest.mark.parametrize("first", [0, 1])
def test_demos_some_of_which_lack_solutions_are_refused_with_the_counts(
    client: TestClient, store: Store, first: int
) -> None:
    rows = [
        {"problem": "1+1?", "answer": "2", "solution": "1+1=2"},
        {"problem": "2+1?", "answer": "3"},
        {"problem": "2+2?", "answer": "4", "solution": "2+2=4"},
    ]
    text = "\n".join(json.dumps(row) for row in rows[first:] + rows[:first])
    dataset = client.post("/datasets", content=text).json()
    demos = BRIDGE | {"data": DATA | {"demos": dataset["id"]}}
    body = problem(post(client, demos), 422, "incomplete_solutions")
    assert body["param"] == "data.demos"
    assert "1 of the 3 rows" in body["detail"]
    assert len(body["errors"]) == 1
    assert store.list_jobs()[0] == []
    assert post(client, BRIDGE | {"data": DATA | {"prompts": dataset["id"]}}).status_code == 201
    problem(post(client, demos, dry_run=True), 422, "incomplete_solutions")


def test_uploads_of_which_nothing_can_be_used_are_refused_before_they_are_queued(
    client: TestClient, store: Store
) -> None:
    def upload(problem: str) -> str:
        row = {"problem": problem, "answer": "1", "solution": "#1"}
        dataset: str = client.post("/datasets", content=json.dumps(row)).json()["id"]
        return dataset

    long, short, other = upload("1+" * 2_000_000 + "1"), upload("1+0?"), upload("2-1?")
    for method, data, param, code in (
        ("sft", {"demos": long}, "data.demos", "no_data"),
        ("rl", {"prompts": long}, "data.prompts", "no_data"),
        ("luffy", {"prompts": short, "demos": other}, "data.prompts", "no_pairs"),
    ):
        for dry_run in (True, False):
            refusal = post(client, {"method": method, "data": data}, dry_run=dry_run)
            assert problem(refusal, 422, code)["param"] == param
    assert store.list_jobs()[0] == []
    fits = {"method": "luffy", "data": {"prompts": short, "demos": short}}
    assert post(client, fits).status_code == 201


def test_unknown_uploaded_dataset_is_refused(client: TestClient) -> None:
    spec = BRIDGE | {"data": DATA | {"prompts": "ds_gone"}}
    assert problem(post(client, spec), 422)["param"] == "data.prompts.name"


# --------------------------------------------------------------------------- broken bodies


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"method": "bridge",}', "line 1, column 21"),
        ('{\n "method": \n}', "line 3, column 1"),
        ("{", "line 1, column 2"),
        ('{"steps": NaN}', "NaN"),
        ('{"steps": %s}' % ("9" * 5000), "digits"),
        ("[" * 100_000, "nested"),
    ],
)
def test_broken_json_is_400_and_says_where(client: TestClient, text: str, place: str) -> None:
    response = client.post("/jobs", content=text, headers={"Content-Type": "application/json"})
    assert place in problem(response, 400, "broken_json")["detail"]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("method: [bridge\nsteps: 3", "line 2"),
        ("a: &x 1\nb: *x", "aliases are not accepted here at line 2, column 4"),
        ("steps: !!int many", "YAML"),
        ("x: !!python/object/apply:os.system [true]", "line 1"),
        ("[" * 5000, "YAML"),
    ],
)
def test_broken_yaml_is_400_and_says_where(client: TestClient, text: str, place: str) -> None:
    response = client.post("/jobs", content=text, headers={"Content-Type": "application/yaml"})
    assert place in problem(response, 400, "broken_yaml")["detail"]


def test_body_that_is_not_utf8_is_400(client: TestClient) -> None:
    response = client.post(
        "/jobs", content=b'{"name": "\xff"}', headers={"Content-Type": "application/json"}
    )
    problem(response, 400, "broken_encoding")


@pytest.mark.parametrize(
    ("path", "kind", "text", "param"),
    [
        ("/jobs", "json", r'{"method": "bridge", "name": "a\ud800"}', "name"),
        ("/jobs", "json", r'{"steps": 3, "template": {"system": "a\ud800"}}', "template"),
        ("/jobs", "json", r'{"\uDfFf": 1}', r"\udfff"),
        ("/jobs", "json", r'["\ude00\ud83d"]', None),
        ("/jobs", "yaml", r'{"name": "\ud800"}', "name"),
        ("/jobs", "yaml", r'name: "\ud800"', "name"),
        ("/jobs", "yaml", r'name: "\U0000d800"', "name"),
        ("/generate", "json", r'{"model": "bridge-tiny", "prompt": "\ud800"}', "prompt"),
        ("/generate", "json", r'{"model": "bridge-tiny", "stop": ["\ud800"]}', "stop"),
        ("/v1/completions", "json", r'{"model": "\ud800", "prompt": "1"}', "model"),
        ("/v1/completions", "json", r'{"model": "m", "\ud800": "1"}', r"\ud800"),
        ("/v1/chat/completions", "json", r'{"messages": [{"content": "\ud800"}]}', "messages"),
    ],
)
def test_half_a_character_is_400_and_says_where(
    client: TestClient, path: str, kind: str, text: str, param: str | None
) -> None:
    response = client.post(path, content=text, headers={"Content-Type": f"application/{kind}"})
    assert response.status_code == 400, response.text
    body = response.json()
    body = body.get("error", body)  # OpenAI's, under /v1
    assert (body["code"], body.get("param")) == ("broken_encoding", param)
    assert "half of a surrogate pair, after" in response.text


@pytest.mark.parametrize("name", [r"\ud83d\ude00", r"\\ud800", "\U0001f600"])
def test_whole_characters_pass_however_they_are_written(client: TestClient, name: str) -> None:
    text = json.dumps(BRIDGE)[:-1] + f', "name": "{name}"}}'
    response = client.post("/jobs", content=text, headers={"Content-Type": "application/json"})
    assert response.json()["name"] == json.loads(f'"{name}"')


@pytest.mark.parametrize("text", ["", "[]", "3", '"bridge"', "null"])
def test_body_that_is_no_object_is_422(client: TestClient, text: str) -> None:
    response = client.post("/jobs", content=text, headers={"Content-Type": "application/json"})
    problem(response, 422, "not_an_object")


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_infinite_figure_is_refused_and_can_be_answered(client: TestClient, value: str) -> None:
    text = YAML.replace("steps: 7", f"lora: {{alpha: {value}}}\nrl: {{kl_coef: {value}}}\nsteps: 0")
    response = client.post("/jobs", content=text, headers={"Content-Type": "application/yaml"})
    problem(response, 422)


def test_body_over_a_megabyte_is_413(client: TestClient) -> None:
    spec = BRIDGE | {"name": "x" * 1_000_001}
    problem(post(client, spec), 413, "body_too_large")

    def chunks() -> Any:  # no Content-Length to go by
        yield from [b" " * 100_000] * 11

    headers = {"Content-Type": "application/json"}
    problem(client.post("/jobs", content=chunks(), headers=headers), 413, "body_too_large")


def test_form_body_is_415_and_says_what_to_send(client: TestClient) -> None:
    """What curl sends by itself, and what a foreign web page may send without being asked."""
    for media_type in ("application/x-www-form-urlencoded", "text/plain"):
        response = client.post("/jobs", content="{}", headers={"Content-Type": media_type})
        assert "application/yaml" in problem(response, 415)["detail"]


@pytest.mark.parametrize("path", ["/jobs", "/generate"])
def test_body_of_no_stated_type_is_415(client: TestClient, path: str) -> None:
    """A web page's `fetch` without Content-Type is sent without asking, wherever the page is."""
    body = problem(client.post(path, content=json.dumps(BRIDGE)), 415, "unsupported_media_type")
    assert "application/json" in body["detail"]
    problem(client.post(path), 422, "not_an_object")  # nothing at all is no type to name


def test_spec_is_checked_once_a_request(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each check may ask the hub and read files."""
    checks: list[object] = []

    def counted(spec: Any) -> Any:
        checks.append(spec)
        return check_spec(spec)

    for module in (spec_checks, job_spec):
        monkeypatch.setattr(module, "check_spec", counted)
    assert post(client, BRIDGE).status_code == 201
    assert len(checks) == 1


# --------------------------------------------------------------------------- idempotency


def test_same_key_and_spec_answer_the_first_job(client: TestClient, store: Store) -> None:
    headers = {"Idempotency-Key": "k1"}
    first = client.post("/jobs", json=BRIDGE, headers=headers)
    second = client.post("/jobs", json=BRIDGE, headers=headers)
    assert second.status_code == 201
    assert second.json()["id"] == first.json()["id"]
    assert second.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    assert len(store.list_jobs()[0]) == 1


def test_same_key_with_another_spec_is_409(client: TestClient) -> None:
    headers = {"Idempotency-Key": "k1"}
    client.post("/jobs", json=BRIDGE, headers=headers)
    response = client.post("/jobs", json=BRIDGE | {"seed": 1}, headers=headers)
    problem(response, 409, "idempotency_key_reused")


def test_overlong_idempotency_key_is_422(client: TestClient) -> None:
    response = client.post("/jobs", json=BRIDGE, headers={"Idempotency-Key": "k" * 256})
    assert "idempotency-key" in problem(response, 422)["param"].lower()


# --------------------------------------------------------------------------- no database


def test_unreachable_database_is_503_and_says_what_to_do(
    client: TestClient, store: Store, tmp_path: Path
) -> None:
    store.close()
    for file in tmp_path.glob("bridge.db*"):
        file.unlink(missing_ok=True)  # who closes the database last takes some along
    body = problem(post(client, BRIDGE), 503, "database_not_migrated")
    assert "migrate" in body["detail"]
    problem(client.get("/jobs"), 503)
    problem(client.get("/jobs/job_x"), 503)
