"""Streamed answers in the SDK and on the command line: whole, broken off, side by side."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from typer.testing import CliRunner

from bridge_client import APIStatusError, AsyncClient, Client, ConnectionError, _core
from bridge_client.cli import app
from tests.client.flaky import flaky, hang_up, say, stream


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "jittered", lambda delay: 0.01)


def chunk(text: str, finish: str | None = None) -> str:
    choice = {"index": 0, "text": text, "finish_reason": finish}
    body = {"id": "gen_1", "adapter": "job_1@2", "model": "m", "choices": [choice]}
    return f"data: {json.dumps(body)}\n\n"


WHOLE = chunk("one ") + chunk("two", "stop") + "data: [DONE]\n\n"
PROBLEM = {"status": 502, "code": "inference_interrupted", "detail": "stopped in the middle"}
BROKEN = chunk("one ") + f"event: error\ndata: {json.dumps(PROBLEM)}\n\n"


def sync_texts(url: str) -> list[str]:
    with Client(url) as client:
        return [c.text for c in client.stream("1+1?", adapter="job_1", seed=7)]


def async_texts(url: str) -> list[str]:
    async def run() -> list[str]:
        async with AsyncClient(url) as client:
            return [c.text async for c in client.stream("1+1?", adapter="job_1", seed=7)]

    return asyncio.run(run())


both = pytest.mark.parametrize("texts", [sync_texts, async_texts])


@both
def test_a_stream_gives_the_answer_in_pieces(texts: Any) -> None:
    with flaky(stream(WHOLE)) as server:
        assert texts(server.url) == ["one ", "two"]
    body = json.loads(server.requests[0][3])
    assert body == {"prompt": "1+1?", "adapter": "job_1", "seed": 7, "stream": True}


@both
def test_a_service_that_is_busy_is_asked_again_before_the_stream_begins(texts: Any) -> None:
    busy = say(503, '{"code": "busy"}', Retry_After="0.05")
    with flaky(busy, stream(WHOLE)) as server:
        assert texts(server.url) == ["one ", "two"]
    assert len(server.requests) == 2


@both
@pytest.mark.parametrize(
    "answer", [stream(chunk("one ")), stream(chunk("one "), torn=True), hang_up]
)
def test_a_stream_without_its_end_is_an_error_and_is_not_asked_again(
    texts: Any, answer: Any
) -> None:
    with flaky(answer) as server, pytest.raises(ConnectionError, match="not whole"):
        texts(server.url)
    assert len(server.requests) == 1


@both
def test_a_stream_that_says_why_it_stops_raises_that(texts: Any) -> None:
    with flaky(stream(BROKEN)) as server, pytest.raises(APIStatusError) as stopped:
        texts(server.url)
    assert stopped.value.code == "inference_interrupted"


def chat(server: Any, *arguments: str, typed: str = "") -> Any:
    return CliRunner().invoke(app, ["--url", server.url, "chat", *arguments], input=typed)


def test_chat_writes_the_answer() -> None:
    with flaky(stream(WHOLE)) as server:
        result = chat(server, "job_1", "1+1?")
    assert result.exit_code == 0, result.output
    assert result.output == "one two\n"


def test_chat_reads_questions_and_keeps_the_turns_of_a_conversation() -> None:
    with flaky(stream(WHOLE)) as server:
        result = chat(server, "job_1", "--conversation", typed="first\nsecond\n\nnever\n")
    assert result.output == "one two\none two\n"
    asked = [json.loads(body)["messages"] for _, _, _, body in server.requests]
    assert [[turn["content"] for turn in turns] for turns in asked] == [
        ["first"],
        ["first", "one two", "second"],
    ]


def test_chat_shows_two_side_by_side() -> None:
    with flaky(stream(WHOLE)) as server:
        result = chat(server, "job_1", "1+1?", "--against", "bridge-tiny")
    assert result.output == "job_1:\none two\n\nbridge-tiny:\none two\n\n"
    assert {json.loads(body)["model"] for _, _, _, body in server.requests} == {
        "job_1",
        "bridge-tiny",
    }


def test_chat_that_breaks_off_says_so_and_fails() -> None:
    with flaky(stream(BROKEN)) as server:
        result = chat(server, "job_1", "1+1?", "--against", "bridge-tiny")
    assert result.exit_code == 1
    assert "stopped in the middle" in result.output
