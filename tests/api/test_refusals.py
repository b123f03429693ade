"""Every refusal says which part of the request is at fault, by one shape and by its real name, and
nothing is taken for what it is not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.store import Store
from tests.api.conftest import BRIDGE, Worker, problem
from tests.api.test_datasets import GOOD, jsonl

ASK = {"model": "bridge-tiny", "prompt": "1"}
CHAT = {"model": "bridge-tiny", "messages": [{"role": "user", "content": "1"}]}


def mistyped(id: str) -> str:
    return id[:-1] + ("x" if id[-1] != "x" else "y")


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/jobs/nope", "job_id"),
        ("/jobs/nope/events", "job_id"),
        ("/datasets/nope", "dataset_id"),
        ("/projects/nope", "project_id"),
        ("/adapters/nope", "name"),
        ("/adapters/nope/download", "name"),
        ("/adapters?job_id=nope", "job_id"),
    ],
)
def test_what_is_not_there_is_named_by_its_part_of_the_address(
    client: TestClient, path: str, param: str
) -> None:
    body = problem(client.get(path), 404)
    assert (body["param"], body["given"]) == (param, "nope")


def test_what_is_not_there_is_named_by_its_header_or_field(client: TestClient) -> None:
    assert problem(client.delete("/adapters/aliases/nope"), 404)["param"] == "name"
    refused = client.get("/jobs", headers={"Bridge-Project": "nope"})
    assert problem(refused, 404)["param"] == "Bridge-Project"
    key = {"Idempotency-Key": "k"}
    assert client.post("/jobs", json=BRIDGE, headers=key).status_code == 201
    reused = client.post("/jobs", json=BRIDGE | {"steps": 3}, headers=key)
    assert problem(reused, 409, "idempotency_key_reused")["param"] == "Idempotency-Key"
    long = client.post("/jobs", json=BRIDGE, headers={"Idempotency-Key": "k" * 300})
    assert problem(long, 422)["param"] == "Idempotency-Key"


def test_a_mistyped_job_is_told_the_nearest_and_a_deleted_one_no_other(
    client: TestClient, store: Store, job: str, worker: Worker
) -> None:
    other = client.post("/jobs", json=BRIDGE).json()["id"]
    body = problem(client.get(f"/jobs/{mistyped(job)}"), 404, "unknown_job")
    assert body["nearest"] == job
    assert body["detail"].endswith(f"did you mean {job!r}?")
    worker.emit(job, worker.claim(job), worker.checkpoint(1))
    named = problem(client.get(f"/adapters/{mistyped(job)}@1"), 404)
    assert named["nearest"] == f"{job}@1"
    client.post(f"/jobs/{other}/cancel")
    client.delete(f"/jobs/{other}")
    assert "nearest" not in problem(client.get(f"/jobs/{other}"), 404)
    assert "nearest" not in problem(client.get(f"/adapters/{other}@1"), 404)
    asked = client.post("/generate", json={"model": f"{other}@1", "prompt": "1"})
    assert "nearest" not in problem(asked, 404)


@pytest.mark.parametrize(
    ("method", "path", "arguments", "param"),
    [
        ("POST", "/jobs", {"json": [1]}, "body"),
        ("GET", "/jobs/{job}/events", {"headers": {"Last-Event-ID": "x"}}, "Last-Event-ID"),
        ("POST", "/datasets", {"files": [("file", b"{}"), ("file", b"{}")]}, "file"),
        ("POST", "/datasets", {"content": b"\x1f\x8b123"}, "file"),
        ("POST", "/datasets", {"content": b"PAR1"}, "file"),
        ("POST", "/datasets", {"content": b"\xff\n"}, "file"),
        ("POST", "/generate", {"json": {"model": "bridge-tiny"}}, "prompt"),
    ],
)
def test_every_422_lists_the_fields_at_fault(
    client: TestClient, job: str, method: str, path: str, arguments: Any, param: str
) -> None:
    body = problem(client.request(method, path.format(job=job), **arguments), 422)
    assert body["param"] == body["errors"][0]["param"] == param
    assert body["errors"][0]["code"] == body["code"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        *(("/generate", ASK | {k: v}, k) for k, v in [("n", "2"), ("n", True), ("stream", "yes")]),
        *(("/v1/completions", ASK | {k: v}, k) for k, v in [("logprobs", True), ("n", "2")]),
        *(("/v1/completions", ASK | {k: v}, k) for k, v in [("max_tokens", "9"), ("seed", "1")]),
        *(("/v1/chat/completions", CHAT | {k: v}, k) for k, v in [("stream", 1), ("top_p", "1")]),
        ("/v1/chat/completions", CHAT | {"logprobs": "true"}, "logprobs"),
        ("/projects", {"name": "p", "max_running": "3"}, "max_running"),
        ("/projects", {"name": "p", "gpu_hours": True}, "gpu_hours"),
        ("/jobs/{job}/fork", {"priority": "3"}, "priority"),
    ],
)
def test_values_of_another_type_are_not_taken_for_what_they_look_like(
    client: TestClient, job: str, path: str, body: dict[str, Any], param: str
) -> None:
    answer = client.post(path.format(job=job), json=body)
    told = answer.json()["error"] if path.startswith("/v1") else problem(answer, 422)
    assert told["param"] == param


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/jobs", '{"steps": 1, "method": "sft", "steps": 2}'),
        ("/generate", '{"model": "bridge-tiny", "prompt": "1", "model": "x"}'),
        ("/graders/run", '{"items": [{"gold": "1", "answer": "1", "gold": "2"}]}'),
    ],
)
def test_a_key_twice_in_a_body_is_refused_by_its_name(
    client: TestClient, path: str, body: str
) -> None:
    answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
    refused = problem(answer, 400, "duplicate_key")
    assert refused["param"] in ("steps", "model", "gold")
    assert repr(refused["param"]) in refused["detail"]


def test_a_parameter_twice_is_refused_unless_it_takes_several(client: TestClient, job: str) -> None:
    body = problem(client.get("/jobs?limit=1&limit=2"), 422, "repeated_parameter")
    assert body["param"] == "limit"
    problem(client.post("/jobs?dry_run=true&dry_run=false", json=BRIDGE), 422)
    assert client.get(f"/jobs/{job}/metrics?keys=a&keys=b").status_code == 200


CONTROL = ["a\nb", "a\x00c", "\x1b[31mred", "a\x85b", "a\u2028b", "a\u202eb"]


@pytest.mark.parametrize("name", CONTROL)
def test_no_name_holds_a_control_character(client: TestClient, name: str) -> None:
    """A list in a terminal would be torn by it, or carry out what it says."""
    rows = jsonl(GOOD)
    refused = [
        client.post("/datasets", content=rows, params={"name": name}),
        client.post("/datasets", files={"file": ("a.jsonl", rows)}, data={"name": name}),
        client.post("/projects", json={"name": name}),
        client.put("/projects/default", json={"name": name}),
    ]
    for answer in refused:
        body = problem(answer, 422, "control_character")
        assert body["param"] == "name"
        assert "is U+" in body["detail"]
    assert client.get("/datasets").json()["data"] == []


def test_names_of_every_language_are_taken(client: TestClient) -> None:
    for name in ("Übung 1", "数学", "👩‍🏫 lesson", "תרגול"):
        answer = client.post("/datasets", content=jsonl(GOOD), params={"name": name})
        assert answer.status_code == 201, answer.text
        assert answer.json()["name"] == name


def test_control_characters_of_a_files_name_are_left_out(client: TestClient) -> None:
    boundary = "xyzzy"
    content = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="a\x1b[31mb.jsonl"'
        f"\r\n\r\n{jsonl(GOOD).decode()}\r\n--{boundary}--\r\n"
    )
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    dataset = client.post("/datasets", content=content, headers=headers).json()
    assert (dataset["filename"], dataset["name"]) == ("a[31mb.jsonl", "a[31mb")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/adapters/aliases/a%20b", {"adapter": "x"}),
        ("POST", "/projects", {"name": "p", "id": "A b"}),
        ("POST", "/generate", ASK | {"prompt": None, "messages": []}),
        ("POST", "/v1/chat/completions", CHAT | {"messages": []}),
        ("POST", "/graders/run", {"items": []}),
        ("POST", "/graders/run", f'{{"items": [{"9" * 6000}]}}'),
    ],
)
def test_no_refusal_speaks_of_patterns_and_insides(
    client: TestClient, method: str, path: str, body: Any
) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    headers = {"Content-Type": "application/json"}
    answer = client.request(method, path, content=content, headers=headers)
    assert answer.status_code in (400, 422)
    for inside in ("pattern", "after validation", "set_int_max", "^["):
        assert inside not in answer.text


@pytest.mark.parametrize(
    "body", [{"adapter": "n" * 3000}, {"adapter": "x", "n" * 3000: 1}, {"adapter": ["ä\n" * 2000]}]
)
def test_what_was_given_is_not_echoed_at_length(client: TestClient, body: Any) -> None:
    answer = client.put("/adapters/aliases/tutor", json=body)
    assert answer.status_code in (404, 422)
    assert len(answer.content) < 2000
    nowhere = problem(client.get("/" + "j" * 3000), 404, "unknown_path")
    assert len(json.dumps(nowhere)) < 1000
    long = problem(client.get("/jobs/" + "j" * 3000), 404)
    assert long["given"] == "j" * 200 + "… (3000 characters)"
    assert len(json.dumps(long)) < 1500


def test_a_base_model_asked_for_as_an_adapter_is_told_how(client: TestClient) -> None:
    body = problem(client.post("/generate", json={"adapter": "bridge-tiny", "prompt": "1"}), 404)
    assert body["detail"] == "'bridge-tiny' is a base model and no adapter; name it as `model`"
