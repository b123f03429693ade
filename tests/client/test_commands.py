"""What single commands say, against a service whose answers are written down."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from bridge_client import APIStatusError, AsyncClient, Client
from bridge_client.home import Home, Process, State
from tests.client.flaky import Answer, flaky, say
from tests.client.test_usage import bridge

PROBLEM = "application/problem+json"


def routes(**answers: Answer | dict[str, Any]) -> Answer:
    """A service by the last part of what is asked for; `DELETE` and other methods by their name."""

    def act(handler: BaseHTTPRequestHandler) -> None:
        name = handler.path.partition("?")[0].rpartition("/")[2]
        answer = answers.get(handler.command) or answers.get(name) or say(404, '{"code": "none"}')
        (answer if callable(answer) else say(200, json.dumps(answer)))(handler)

    return act


def job(**fields: Any) -> dict[str, Any]:
    return {"id": "job_1", "status": "succeeded", "method": "sft", "model": "m", **fields}


@pytest.mark.parametrize("result", [{}, {"accuracy_before": None, "accuracy_after": None}])
def test_a_job_that_measured_no_accuracy_shows_none(result: dict[str, Any]) -> None:
    with flaky(say(200, json.dumps(job(result={"seconds": 3, **result})))) as server:
        done = bridge("jobs", "show", "job_1", url=server.url)
    assert "accuracy" not in done.stdout
    assert "?" not in done.stdout


def test_a_job_that_measured_accuracy_once_shows_it() -> None:
    with flaky(say(200, json.dumps(job(result={"accuracy_after": 0.5})))) as server:
        done = bridge("jobs", "show", "job_1", url=server.url)
    assert "held-out accuracy ? → 50.0 %" in done.stdout


def watched(events: list[dict[str, Any]], **fields: Any) -> list[str]:
    """What `bridge jobs watch` says of these events outside a terminal."""
    messages = "".join(
        f"id: {seq}\nevent: {event['type']}\ndata: {json.dumps(event)}\n\n"
        for seq, event in enumerate(events, start=1)
    )
    stream = say(200, messages + "event: end\ndata:\n\n", "text/event-stream")
    with flaky(routes(job_1=job(**fields), events=stream)) as server:
        done = bridge("jobs", "watch", "job_1", url=server.url)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()[1:]


def metric(step: int, **metrics: float) -> dict[str, Any]:
    return {"type": "metric", "step": step, "metrics": metrics}


def test_a_watched_evaluation_tells_each_score_and_no_empty_line() -> None:
    one, two = {"eval/gsm8k/pass@1": 0.5}, {"eval/svamp/pass@1": 0.25}
    events = [
        {"type": "phase", "phase": "evaluating", "steps": 20},
        metric(5, **one),
        metric(10),  # the first set is asked through, its scores follow
        metric(10, **{"eval/gsm8k/pass@1": 0.6, "eval/gsm8k/pass@1/low": 0.4}),
        metric(20),
        metric(20, **two, **{"eval/svamp/pass@1/low": 0.1}),
    ]
    lines = watched(events, kind="eval", steps=20)
    assert [line for line in lines if line.startswith("problem")] == [
        "problem  5/20  gsm8k/pass@1 50.0 %",
        "problem 10/20  gsm8k/pass@1 60.0 %",
        "problem 20/20  svamp/pass@1 25.0 %",
    ]


def test_a_step_without_figures_has_no_blanks_at_its_end() -> None:
    lines = watched([metric(1), metric(2, reward=0.5)], steps=2)
    assert lines == ["step 1/2", "step 2/2  reward 0.50"]


def test_a_job_that_has_not_ended_is_not_asked_about_before_it_is_deleted() -> None:
    for status in ("running", "cancelling", "queued"):
        with flaky(routes(job_1=job(status=status))) as server:
            done = bridge("jobs", "delete", "job_1", url=server.url, text=b"y\n")
        assert done.returncode == 1
        assert "Delete" not in done.stdout
        assert f"job_1 is {status}" in done.stderr
        assert ("bridge jobs cancel job_1" in done.stderr) == (status != "cancelling")
        assert [method for method, *_ in server.requests] == ["GET"]


def test_before_a_job_is_deleted_its_aliases_are_named() -> None:
    aliases = {
        "data": [{"name": "tutor", "adapter": "job_1@5"}, {"name": "b", "adapter": "job_11@5"}]
    }
    gone: Callable[..., None] = say(204, "")
    with flaky(routes(job_1=job(), aliases=aliases)) as server:
        done = bridge("jobs", "delete", "job_1", url=server.url, text=b"n\n")
    assert "alias tutor" in done.stdout
    assert done.returncode == 1
    assert {method for method, *_ in server.requests} == {"GET"}
    with flaky(routes(job_1=job(), aliases=aliases, DELETE=gone)) as server:
        assert bridge("jobs", "delete", "job_1", url=server.url, text=b"y\n").returncode == 0
    assert server.requests[-1][0] == "DELETE"


def test_a_project_that_is_there_already_is_changed_with_a_command() -> None:
    there = say(409, '{"code": "project_exists", "detail": "PUT /projects/maths changes it"}')
    with flaky(there) as server:
        done = bridge("projects", "create", "maths", url=server.url)
    assert done.returncode == 1
    assert "bridge projects update maths" in done.stderr
    assert "PUT" not in done.stderr


def test_a_project_is_named_by_its_name_where_that_can_be_an_id() -> None:
    made = say(201, '{"id": "maths"}')

    async def create(url: str) -> None:
        async with AsyncClient(url) as client:
            await client.create_project("maths")

    with flaky(made) as server, Client(server.url) as client:
        client.create_project("maths")
        asyncio.run(create(server.url))
        bridge("projects", "create", "maths", url=server.url)
        client.create_project("Maths & Physics")
        client.create_project("maths", id="m")
    sent = [json.loads(body) for *_, body in server.requests]
    assert [project.get("id") for project in sent] == ["maths", "maths", "maths", None, "m"]


def test_another_program_at_the_address_is_told_as_one() -> None:
    for body in ('{"detail": "Not Found"}', '{"error": {"message": "x", "code": 404}}', "<html>"):
        with flaky(say(404, body)) as server:
            done = bridge("jobs", "list", url=server.url)
            assert done.returncode == 1
            assert f"another program answers at {server.url}" in done.stderr
            assert "BRIDGE_URL" in done.stderr
    refused = '{"code": "unknown_job", "detail": "there is no job \'x\'"}'
    with (
        flaky(say(404, refused, PROBLEM)) as server,
        Client(server.url) as client,
        pytest.raises(APIStatusError) as caught,
    ):
        client.job("x")
    assert "another program" not in str(caught.value)


def test_a_job_that_logged_nothing_says_so() -> None:
    with flaky(say(200, "", "text/plain")) as server:
        done = bridge("jobs", "logs", "job_1", url=server.url)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "job_1 has logged nothing\n"


def test_a_list_of_mistakes_names_each_field_once(tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    file.write_text('{"method": "sft", "steps": 0, "data": {"demos": "arithmetic"}}')
    done = bridge("jobs", "submit", str(file))
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("  steps")]
    assert line.count("steps") == 1
    errors = [{"param": name, "message": f"{name}: Input should be 1"} for name in ("a.b", "c")]
    with flaky(say(422, json.dumps({"code": "x", "detail": "two", "errors": errors}))) as server:
        done = bridge("jobs", "show", "j", url=server.url)
    assert done.stderr.splitlines()[1:] == ["  a.b  Input should be 1", "  c  Input should be 1"]


def test_down_names_the_jobs_that_go_on_at_the_next_start(tmp_path: Path) -> None:
    """Of every project; where the service does not answer, it stops all the same."""
    home = Home(tmp_path)
    home.create()
    projects = {"data": [{"id": "default"}, {"id": "maths"}]}

    def running(handler: BaseHTTPRequestHandler) -> None:
        project = handler.headers["Bridge-Project"]
        there = [job(id=f"job_of_{project}", status="running")]
        say(200, json.dumps({"data": there, "has_more": False}))(handler)

    def down(url: str) -> str:
        supervisor = subprocess.Popen(["sleep", "600"])
        home.write(State(url, "http://x", Process.of(supervisor.pid), {}, True))
        done = bridge("down", "--home", str(tmp_path))
        assert supervisor.wait(120) == -signal.SIGTERM
        assert done.returncode == 0, done.stderr
        return done.stdout

    with flaky(routes(projects=projects, jobs=running)) as server:
        told = down(server.url)
    assert told.splitlines() == [
        f"Bridge at {server.url} has stopped.",
        "job_of_default was running: it goes on at the next `bridge up`.",
        "job_of_maths was running: it goes on at the next `bridge up`.",
    ]
    assert "status=running" in server.requests[1][1]
    assert down("http://127.0.0.1:9") == "Bridge at http://127.0.0.1:9 has stopped.\n"
