"""An evaluation's answers, as they come over a connection that breaks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from bridge_client import APIStatusError, AsyncClient, Client, _core

ANSWERS = [{"id": str(n), "answers": [{"text": f"\u2028 {n} \n é"}]} for n in range(40)]
"""With characters that are line ends to some."""
LINES = [{"source": {}}, {"benchmark": 0, "template": {}}, *ANSWERS]
BODY = b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in LINES)


class Broken(httpx.SyncByteStream, httpx.AsyncByteStream):
    """So many bytes, in small pieces, and no more."""

    def __init__(self, much: int) -> None:
        self.much = much

    def __iter__(self) -> Iterator[bytes]:
        for place in range(0, self.much, 7):
            yield BODY[place : min(place + 7, self.much)]
        if self.much < len(BODY):
            raise httpx.ReadError("gone")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece


def service(*tries: int) -> httpx.MockTransport:
    """Answers each request with so many bytes of the body."""
    waiting = list(tries)

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path != "/jobs/job_1/completions":
            return httpx.Response(404, json={"code": "not_found", "detail": "no such job"})
        return httpx.Response(200, stream=Broken(waiting.pop(0)))

    return httpx.MockTransport(answer)


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "jittered", lambda delay: 0.0)


@pytest.mark.parametrize("tries", [(len(BODY),), (900, 300, len(BODY)), (10, len(BODY))])
def test_every_answer_comes_once_over_connections_that_break(tries: tuple[int, ...]) -> None:
    with Client("http://x", transport=service(*tries)) as client:
        assert list(client.completions("job_1")) == ANSWERS

    async def collected() -> list[Any]:
        async with AsyncClient("http://x", transport=service(*tries)) as client:
            return [one async for one in client.completions("job_1")]

    assert asyncio.run(collected()) == ANSWERS


def test_the_first_answer_is_there_before_the_last_is_sent() -> None:
    with Client("http://x", transport=service(400, 0, 0, 0)) as client:
        assert next(client.completions("job_1")) == ANSWERS[0]


def test_what_has_no_answers_says_so() -> None:
    with Client("http://x", transport=service()) as client, pytest.raises(APIStatusError):
        next(client.completions("job_2"))
