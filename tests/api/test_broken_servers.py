"""Inference servers that break off, talk nonsense or point elsewhere: nobody waits for ever, and
what came is handed on. Over raw sockets, for what no server does by itself."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from fastapi import APIRouter, Depends

from service.errors import ApiError
from service.generate import answers, connections
from service.generate.asking import AskingRoute, Body
from service.generate.backend import InferenceBackend

SOON = 120.0
"""Seconds; where it hangs it hangs for as long as a server may be silent."""
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
STREAM = OK + b"Transfer-Encoding: chunked\r\n\r\n"
ONE = b'data: {"choices":[{"text":"a","index":0,"finish_reason":null}]}\n\n'
DONE = b"data: [DONE]\n\n"
NO_CHUNK = b"zz\r\nabc\r\n"

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(content), content)


def says(*parts: bytes, wait: float = 0.0) -> Script:
    """To every request these bytes, one after the other, and then it hangs up."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(wait)

    return script


@contextlib.asynccontextmanager
async def backend_of(script: Script) -> AsyncIterator[InferenceBackend]:
    """A client of a server that follows the script."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await script(reader, writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    backend = InferenceBackend(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "a key")
    try:
        yield backend
    finally:
        await backend.close()
        server.close()


def streamed(script: Script, slowly: float = 0.0) -> tuple[int, ApiError | None]:
    """(chunks that were handed on, what ended them)."""

    async def read() -> tuple[int, ApiError | None]:
        count = 0
        async with backend_of(script) as backend:
            stream = await backend.stream("/v1/completions", {})
            try:
                async for chunks in stream.chunks():
                    count += len(chunks)
                    await asyncio.sleep(slowly)
            except ApiError as error:
                return count, error
            finally:
                await stream.aclose()
        return count, None

    return asyncio.run(asyncio.wait_for(read(), SOON))


def test_a_whole_answer_that_stops_being_http_ends_at_once() -> None:
    async def ask() -> None:
        script = says(STREAM + chunk(b'{"choices":'), NO_CHUNK, wait=0.05)
        async with backend_of(script) as backend:
            with pytest.raises(ApiError) as caught:
                await backend.complete("/v1/completions", {})
        assert caught.value.status == 503

    asyncio.run(asyncio.wait_for(ask(), SOON))


def test_a_stream_that_stops_being_http_is_handed_on_to_there_and_ended() -> None:
    count, error = streamed(says(STREAM + chunk(ONE), NO_CHUNK, wait=0.05))
    assert count == 1
    assert error is not None
    assert error.code == "inference_interrupted"
    assert "(the connection ended)" in error.detail  # and no word of what aiohttp calls it


def test_what_came_before_a_connection_broke_reaches_a_slow_reader() -> None:
    parts = [STREAM + chunk(ONE), b"".join(chunk(ONE) for _ in range(20))]
    count, error = streamed(says(*parts, wait=0.05), slowly=0.3)
    assert count == 21
    assert error is not None
    assert error.code == "inference_interrupted"


def test_an_answer_that_has_ended_is_whole_though_the_connection_breaks() -> None:
    assert streamed(says(STREAM + chunk(ONE), chunk(DONE), wait=0.05), slowly=0.3) == (1, None)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b'data: {"error":"no memory"}\n\n', "inference_failed"),
        (b"data: []\n\n", "inference_interrupted"),
        (b'data: {"usage":{}}\n\n', "inference_interrupted"),
        (b"data: " + b"[" * 100_000 + b"\n\n", "inference_interrupted"),
        (b"data: {\n\n", "inference_interrupted"),
        (b"data: " + b"x" * 3000, "inference_interrupted"),
    ],
    ids=["an error's text", "a list", "no choices", "too deep", "no JSON", "a line without end"],
)
def test_nonsense_in_a_stream_ends_it_clearly(
    content: bytes, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "_LONGEST_LINE", 200_000 if len(content) > 3100 else 2000)
    count, error = streamed(says(STREAM + chunk(ONE), chunk(content), wait=0.05))
    assert count == 1
    assert error is not None
    assert error.code == code


def test_no_redirect_is_followed_nor_the_key_shown_elsewhere() -> None:
    asked: list[bytes] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 302 Found\r\nLocation: /v1/secret\r\nContent-Length: 0\r\n\r\n")

    async def look() -> bool:
        async with backend_of(script) as backend:
            return await backend.healthy()

    assert not asyncio.run(asyncio.wait_for(look(), SOON))
    assert [head.split()[1] for head in asked] == [b"/health"]


def test_a_busy_server_may_say_later_in_any_words() -> None:
    async def ask(after: bytes) -> str | None:
        head = b"HTTP/1.1 429 Busy\r\nRetry-After: %b\r\nContent-Length: 0\r\n\r\n" % after
        async with backend_of(says(head)) as backend:
            with pytest.raises(ApiError) as caught:
                await backend.complete("/v1/completions", {})
        return (caught.value.headers or {}).get("Retry-After")

    assert asyncio.run(ask(b"7")) == "7"
    assert asyncio.run(ask(b"\xff\xfe")) == "2"
    assert asyncio.run(ask(b"Fri, 31 Dec 1999 23:59:59 GMT")) == "2"


WHOLE = OK + b'Content-Length: 14\r\n\r\n{"choices":[]}'


def answering(asked: list[int], then: Script, connections: int = 9) -> Script:
    """Answers the first request of each of so many connections, and lets `then` have the next one;
    notes which connection each came by."""
    numbers = itertools.count(1)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = next(numbers)
        for answer in (True, False)[number > connections :]:
            await reader.readuntil(b"\r\n\r\n")
            await reader.readuntil(b"}")
            asked.append(number)
            if answer:
                writer.write(WHOLE)
        await then(reader, writer)

    return script


async def closes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """As who had closed before the request came."""


async def resets(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The same, where the request came by the time the close is seen."""
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


@pytest.mark.parametrize("ends", [closes, resets])
@pytest.mark.parametrize("streams", [False, True])
def test_a_request_that_meets_a_connection_closed_under_it_is_sent_once_more(
    ends: Script, streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "AT_ONCE_SECONDS", SOON)  # for a machine that stands still
    asked: list[int] = []

    async def ask() -> None:
        async with backend_of(answering(asked, ends)) as backend:
            await backend.complete("/v1/completions", {})
            if streams:
                await (await backend.stream("/v1/completions", {})).aclose()
            else:
                assert await backend.complete("/v1/completions", {}) == {"choices": []}

    asyncio.run(asyncio.wait_for(ask(), SOON))
    assert asked == [1, 1, 2]


def test_a_request_is_sent_again_by_a_new_connection_where_every_kept_one_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "AT_ONCE_SECONDS", SOON)
    asked: list[int] = []

    async def ask() -> None:
        async with backend_of(answering(asked, closes)) as backend:
            for _ in range(2):
                await asyncio.gather(*(backend.complete("/v1/completions", {}) for _ in range(4)))

    asyncio.run(asyncio.wait_for(ask(), SOON))
    assert sorted(asked) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8]


async def begins(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"H")


async def begins_and_resets(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(OK)
    await asyncio.sleep(0.1)
    await resets(reader, writer)


async def thinks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.5)


@pytest.mark.parametrize("ends", [begins, begins_and_resets, thinks])
def test_a_request_that_the_server_took_is_not_sent_again(
    ends: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "AT_ONCE_SECONDS", 0.2)
    asked: list[int] = []

    async def ask() -> None:
        async with backend_of(answering(asked, ends)) as backend:
            await backend.complete("/v1/completions", {})
            with pytest.raises(ApiError) as caught:
                await backend.complete("/v1/completions", {})
        assert caught.value.status == 503

    asyncio.run(asyncio.wait_for(ask(), SOON))
    assert asked == [1, 1]


def test_a_request_is_sent_twice_at_most_and_once_by_a_new_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "AT_ONCE_SECONDS", SOON)
    asked: list[int] = []

    async def ask() -> None:
        async with backend_of(answering(asked, closes, 1)) as backend:
            await backend.complete("/v1/completions", {})
            for _ in range(2):
                with pytest.raises(ApiError) as caught:
                    await backend.complete("/v1/completions", {})
                assert caught.value.status == 503

    asyncio.run(asyncio.wait_for(ask(), SOON))
    assert asked == [1, 1, 2, 3]


def test_an_unreachable_server_is_told_in_the_systems_words() -> None:
    async def ask() -> str:
        backend = InferenceBackend("http://127.0.0.1:9")
        with pytest.raises(ApiError) as caught:
            await backend.complete("/v1/completions", {})
        await backend.close()
        return str(caught.value)

    told = asyncio.run(ask())
    assert "refused" in told.lower() or "connect call failed" in told.lower()
    assert "ssl" not in told


def test_an_asking_route_is_not_made_with_a_dependency_that_it_would_not_heed() -> None:
    def key() -> None: ...

    async def ask(request: object, body: Body) -> None: ...

    router = APIRouter(route_class=AskingRoute)
    with pytest.raises(TypeError, match="key"):
        router.post("/ask", dependencies=[Depends(key)])(ask)
    router.post("/ask")(ask)
