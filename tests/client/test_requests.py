"""What the client promises about every request: retries, errors, idempotency, paging."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import json
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import httpx
import psutil
import pytest

from bridge_client import (
    APIStatusError,
    AsyncClient,
    BridgeError,
    Client,
    ConnectionError,
    SpecError,
    _core,
)
from bridge_client._core import Retry, retry_after
from bridge_engine.spec.train import TrainSpec
from tests.client.flaky import Answer, flaky, hang_up, say

JOB = json.dumps({"id": "job_1", "status": "queued", "method": "sft", "steps": 5, "new_field": 1})
SPEC = {"method": "sft", "data": {"demos": "arithmetic"}}


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "jittered", lambda delay: 0.01)


def test_a_post_cut_off_by_the_network_is_sent_again_with_the_same_idempotency_key() -> None:
    with flaky(hang_up, hang_up, say(201, JOB)) as server, Client(server.url) as client:
        assert client.submit(SPEC).id == "job_1"
    keys = [headers["idempotency-key"] for _, _, headers, _ in server.requests]
    assert len(keys) == 3
    assert len(set(keys)) == 1


def test_two_submissions_carry_different_keys() -> None:
    with flaky(say(201, JOB)) as server, Client(server.url) as client:
        client.submit(SPEC)
        client.submit(SPEC)
    first, second = (headers["idempotency-key"] for _, _, headers, _ in server.requests)
    assert first != second


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_service_is_asked_again_when_it_says(status: int) -> None:
    busy = say(status, '{"code": "busy"}', Retry_After="0.2")
    with flaky(busy, say(200, JOB)) as server, Client(server.url) as client:
        begun = time.monotonic()
        client.job("job_1")
    assert 0.2 <= time.monotonic() - begun < 120
    assert len(server.requests) == 2


def test_it_gives_up_after_two_retries() -> None:
    with (
        flaky(say(503, '{"code": "starting", "detail": "the database is asleep"}')) as server,
        Client(server.url) as client,
        pytest.raises(APIStatusError, match="asleep") as caught,
    ):
        client.job("job_1")
    assert caught.value.code == "starting"
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 404, 409, 422, 500])
def test_other_statuses_are_never_repeated(status: int) -> None:
    with (
        flaky(say(status, "{}")) as server,
        Client(server.url) as client,
        pytest.raises(APIStatusError),
    ):
        client.submit(SPEC)
    assert len(server.requests) == 1


def test_an_upload_that_may_have_arrived_is_not_sent_twice(tmp_path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"problem": "1+1?", "answer": "2"}\n')
    with (
        flaky(hang_up, say(201, '{"id": "ds_1"}')) as server,
        Client(server.url) as client,
        pytest.raises(ConnectionError),
    ):
        client.upload(file)
    assert len(server.requests) == 1


def test_an_upload_sent_again_is_sent_whole(tmp_path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"problem": "1+1?", "answer": "2"}\n')
    busy = say(503, "{}", Retry_After="0")
    with flaky(busy, say(201, '{"id": "ds_1"}')) as server, Client(server.url) as client:
        assert client.upload(file).id == "ds_1"
    assert all(file.read_bytes() in body for *_, body in server.requests)
    assert b'filename="data.jsonl"' in server.requests[1][3]


def test_an_upload_is_waited_for_however_long_it_is_checked(tmp_path: Path) -> None:
    """While every other request has an end to its patience."""
    file = tmp_path / "data.jsonl"
    file.write_text('{"problem": "1+1?", "answer": "2"}\n')
    checked = say(201, '{"id": "ds_1"}')

    def slow(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.5)
        with contextlib.suppress(BrokenPipeError):  # the one that waits for nothing has left
            checked(handler)

    with flaky(slow) as server, Client(server.url, timeout=0.2, retries=0) as client:
        assert client.upload(file).id == "ds_1"
        with pytest.raises(ConnectionError, match="did not answer in time"):
            client.job("job_1")


@pytest.mark.parametrize("answer", [say(201, '{"id": "ds_1"}'), say(422, "{}"), hang_up])
@pytest.mark.filterwarnings("error")
def test_an_uploaded_file_is_closed_however_it_ends(tmp_path: Path, answer: Answer) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"problem": "1+1?", "answer": "2"}\n')

    def open_files() -> list[str]:
        return [found.path for found in psutil.Process().open_files()]

    with flaky(answer) as server, Client(server.url) as client:
        with contextlib.suppress(BridgeError):
            client.upload(file)
        with _core.upload(file).arguments():
            assert str(file) in open_files()
        assert str(file) not in open_files()
        del client
        gc.collect()  # an unclosed file would warn now


def test_an_answer_that_is_not_bridges_is_one_sentence() -> None:
    """Another program on the port, or a service of an older version."""
    for body in ("<html>hello</html>", "[]", '{"id": 5}', '"text"'):
        with (
            flaky(say(200, body)) as server,
            Client(server.url) as client,
            pytest.raises(BridgeError, match="cannot be read") as caught,
        ):
            client.job("job_1")
        assert "\n" not in str(caught.value)


def test_samples_come_page_after_page() -> None:
    def page(ids: list[int], following: str | None) -> str:
        rows = [{"id": i, "step": 9 - i, "source": "eval"} for i in ids]
        return json.dumps({"data": rows, "has_more": following is not None, "next": following})

    async def collect(url: str) -> list[int | None]:
        async with AsyncClient(url) as client:
            return [sample.id async for sample in client.samples("job_1")]

    answers = say(200, page([1, 2], "2")), say(200, page([3], None))
    with flaky(*answers) as server, Client(server.url) as client:
        found = client.samples("job_1", step=4, page_size=2)
        assert server.requests == []
        assert [sample.id for sample in found] == [1, 2, 3]
    asked = [path.partition("?")[2] for _, path, *_ in server.requests]
    assert asked == ["limit=2&step=4", "after=2&limit=2&step=4"]
    with flaky(*answers) as server:
        assert asyncio.run(collect(server.url)) == [1, 2, 3]


def test_a_spec_that_json_cannot_hold_is_refused_before_it_is_sent() -> None:
    for value in (float("inf"), float("nan"), {1, 2}, b"bytes", "\ud800"):
        with (
            Client("http://127.0.0.1:9") as client,
            pytest.raises(SpecError, match="JSON"),
        ):
            client.submit({**SPEC, "seed": value})


def test_no_service_is_told_in_a_sentence_that_says_what_to_do() -> None:
    with (
        Client("http://127.0.0.1:9") as client,
        pytest.raises(ConnectionError, match="bridge up") as caught,
    ):
        client.job("job_1")
    assert "http://127.0.0.1:9" in str(caught.value)


def test_a_problem_body_becomes_a_typed_error() -> None:
    problem = {
        "title": "Invalid spec",
        "detail": "steps must be at least 1",
        "code": "greater_than_equal",
        "param": "steps",
        "request_id": "req_7",
        "errors": [{"param": "steps", "message": "…"}, {"param": "seed", "message": "…"}],
    }
    with (
        flaky(say(422, json.dumps(problem), "application/problem+json")) as server,
        Client(server.url) as client,
        pytest.raises(APIStatusError) as caught,
    ):
        client.submit(SPEC)
    error = caught.value
    assert (error.status, error.code, error.param) == (422, "greater_than_equal", "steps")
    assert error.request_id == "req_7"
    assert [item["param"] for item in error.errors] == ["steps", "seed"]
    assert "steps must be at least 1" in str(error)


@pytest.mark.parametrize("body", ["<html>bad gateway</html>", "", "[1]"])
def test_an_answer_that_is_no_problem_body_is_still_an_error_with_words(body: str) -> None:
    with (
        flaky(say(502, body, "text/html")) as server,
        Client(server.url) as client,
        pytest.raises(APIStatusError) as caught,
    ):
        client.job("job_1")
    assert caught.value.detail
    assert caught.value.status == 502


def test_pages_are_followed_to_the_last_and_fetched_only_when_needed() -> None:
    def page(ids: list[str], more: bool) -> str:
        rows = [{"id": i, "status": "queued"} for i in ids]
        return json.dumps({"data": rows, "has_more": more, "next": ids[-1] if more else None})

    answers = say(200, page(["a", "b"], True)), say(200, page(["c"], False))
    with flaky(*answers) as server, Client(server.url) as client:
        jobs = client.jobs(page_size=2)
        assert next(jobs).id == "a"
        assert len(server.requests) == 1
        assert [job.id for job in jobs] == ["b", "c"]
    assert "after=b" in server.requests[1][1]
    assert len(server.requests) == 2


def test_results_are_frozen_and_keep_fields_of_a_newer_service() -> None:
    with flaky(say(200, JOB)) as server, Client(server.url) as client:
        job = client.job("job_1")
    assert job.new_field == 1
    with pytest.raises(ValueError, match="frozen"):
        job.status = "succeeded"  # type: ignore[misc]


def test_a_spec_means_the_same_as_mapping_object_and_file(tmp_path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("method: sft\ndata: {demos: arithmetic}\noptimizer: {teacher_lr: 3e-4}\n")
    mapping = {**SPEC, "optimizer": {"teacher_lr": 3e-4}}
    with flaky(say(201, JOB)) as server, Client(server.url) as client:
        for spec in (mapping, TrainSpec.model_validate(mapping), file, str(file)):
            client.submit(spec)
    sent = [TrainSpec.model_validate_json(body) for *_, body in server.requests]
    assert all(spec == sent[0] for spec in sent)
    assert json.loads(server.requests[2][3])["optimizer"]["teacher_lr"] == 3e-4


def test_retry_after_is_read_as_seconds_or_date_and_bounded() -> None:
    def response(value: str) -> httpx.Response:
        date = "Wed, 21 Oct 2026 07:28:00 GMT"
        return httpx.Response(503, headers={"retry-after": value, "date": date})

    assert retry_after(response("2.5")) == 2.5
    assert retry_after(response("Wed, 21 Oct 2026 07:28:05 GMT")) == 5
    assert retry_after(response("-3")) == 0
    assert retry_after(response("99999")) == 60
    assert retry_after(response("soon")) is None


def test_a_timeout_counts_as_a_lost_connection_and_is_tried_again() -> None:
    tries = 0

    def slow(request: httpx.Request) -> httpx.Response:
        nonlocal tries
        tries += 1
        raise httpx.ReadTimeout("", request=request)

    with (
        Client("http://x", transport=httpx.MockTransport(slow)) as client,
        pytest.raises(ConnectionError) as caught,
    ):
        client.job("job_1")
    assert tries == 3
    assert "did not answer in time" in str(caught.value)
    assert "bridge up" not in str(caught.value)  # it runs; it is slow


def test_pauses_grow_and_never_leave_their_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for _ in range(50):
        retry = Retry(_core.job("j"), "http://x")
        first = retry.after_error(httpx.ConnectError("refused"))
        second = retry.after_error(httpx.ConnectError("refused"))
        assert 0.25 <= first <= 0.5 <= second <= 1.0


def test_steering_requests_say_what_they_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    with flaky(say(200, JOB)) as server, Client(server.url, project="maths") as client:
        for verb in ("cancel", "pause", "resume", "retry"):
            getattr(client, verb)("job_1")
        client.fork("job_1", {"steps": 3}, from_checkpoint="best", idempotency_key="k")
        client.prioritize("job_1", 7)
        client.submit(SPEC, priority=-1)
    lines = [f"{method} {path}" for method, path, _, _ in server.requests]
    assert lines == [
        *(f"POST /jobs/job_1/{verb}" for verb in ("cancel", "pause", "resume", "retry", "fork")),
        "PATCH /jobs/job_1",
        "POST /jobs?priority=-1",
    ]
    assert {headers["bridge-project"] for _, _, headers, _ in server.requests} == {"maths"}
    fork, patch = server.requests[4], server.requests[5]
    assert fork[2]["idempotency-key"] == "k"
    assert json.loads(fork[3]) == {"overrides": {"steps": 3}, "from_checkpoint": "best"}
    assert json.loads(patch[3]) == {"priority": 7}
    monkeypatch.setenv("BRIDGE_PROJECT", "other")
    with flaky(say(200, JOB)) as server, Client(server.url) as client:
        client.job("job_1")
    assert server.requests[0][2]["bridge-project"] == "other"


def test_the_async_client_is_the_sync_one_awaited() -> None:
    """Same methods, same parameters: whoever knows one knows the other."""

    def methods(cls: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(member).parameters)
            for name, member in vars(cls).items()
            if inspect.isfunction(member) and not name.startswith("__")
        }

    assert methods(Client) == methods(AsyncClient)


def test_the_async_client_retries_pages_and_fails_alike() -> None:
    async def use(url: str) -> str:
        async with AsyncClient(url) as client:
            job = await client.submit(SPEC)
            with pytest.raises(APIStatusError):
                await client.job("nobody")
            return job.id

    with flaky(hang_up, say(201, JOB), say(404, "{}")) as server:
        assert asyncio.run(use(server.url)) == "job_1"
    assert len(server.requests) == 3


@pytest.mark.parametrize("name", ["../healthz", "a/b", "a?b#c", "ü"])
def test_a_name_is_one_part_of_the_path_whatever_is_in_it(name: str) -> None:
    with flaky(say(200, JOB)) as server, Client(server.url) as client:
        client.job(name)
    path = server.requests[0][1]
    assert path.startswith("/jobs/")
    assert path.count("/") == 2
    assert "?" not in path


def test_answers_are_graded_by_the_service() -> None:
    grades = {
        "grader": {"name": "numeric"},
        "version": "1",
        "data": [{"verdict": "right", "reason": "equal", "detail": "…", "stated": "5"}],
        "right": 1,
    }
    items = [{"gold": "5", "answer": "#5"}]
    with flaky(say(200, json.dumps(grades))) as server, Client(server.url) as client:
        found = client.grade(items, grader="numeric")
        client.grade(items)
    assert (found.data[0].verdict, found.data[0].stated, found.right) == ("right", "5", 1)
    sent = [json.loads(body) for *_, body in server.requests]
    assert sent == [{"items": items, "grader": "numeric"}, {"items": items}]
