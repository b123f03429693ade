"""What a request that is handed on to vLLM costs, holds and gives back; over the same fake as
`test_vllm_backend.py`."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import httpx
import pytest

from service.errors import ApiError
from service.generate.answers import AnswerStream
from service.generate.asking import AT_ONCE
from service.generate.serving import Serving
from service.settings import Settings
from tests.api.conftest import problem
from tests.api.house import House, Service
from tests.api.vllm_house import ask, house, save, served, service, text, vllm
from tests.support.fake_vllm import FakeVllm
from tests.support.waiting import until

__all__ = ["house", "served", "service", "vllm"]  # fixtures

STREAM = {"model": "bridge-tiny", "prompt": "1", "stream": True}


def places(service: Service) -> int:
    """Free ones."""
    return int(service.app.state.generations._value)


# --------------------------------------------------------------------------- places


def test_a_stream_holds_its_place_to_its_end(service: Service, vllm: FakeVllm) -> None:
    vllm.go_on = threading.Event()
    with httpx.stream("POST", f"{service.url}/v1/completions", json=STREAM, timeout=120) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert places(service) == AT_ONCE - 1
        vllm.go_on.set()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    until(lambda: places(service) == AT_ONCE)


def test_who_leaves_a_stream_gives_the_place_back(service: Service, vllm: FakeVllm) -> None:
    vllm.go_on = threading.Event()
    with httpx.stream("POST", f"{service.url}/v1/completions", json=STREAM, timeout=120) as answer:
        next(answer.iter_lines())
    until(lambda: places(service) == AT_ONCE and vllm.gone)


def test_who_leaves_before_the_answer_gives_the_place_back(
    service: Service, vllm: FakeVllm
) -> None:
    ask(service, model="bridge-tiny")  # from here on it is known which base is served
    vllm.hangs = threading.Event()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{service.url}/generate", json={**STREAM, "stream": False}, timeout=0.5)
    until(lambda: places(service) == AT_ONCE)
    vllm.hangs.set()


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_unknown_query_parameters_are_refused(service: Service, path: str) -> None:
    answer = httpx.post(f"{service.url}{path}?strem=1", json=STREAM, timeout=120)
    assert answer.status_code in (400, 422)
    assert "strem" in answer.text
    assert places(service) == AT_ONCE


# --------------------------------------------------------------------------- what it costs


def test_a_base_model_that_is_served_needs_no_look_at_the_database(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_look(*_: Any) -> None:
        raise AssertionError("the database was asked")

    assert ask(service, model="bridge-tiny").status_code == 200  # its server says what it has
    monkeypatch.setattr(Serving, "_found", no_look)
    assert text(ask(service, model="bridge-tiny")) == "bridge-tiny"


def test_requests_share_a_connection_and_streams_leave_theirs(
    service: Service, vllm: FakeVllm
) -> None:
    for number in range(6):
        body = {**STREAM, "stream": number % 2 == 0}
        assert httpx.post(f"{service.url}/v1/completions", json=body, timeout=120).is_success
        until(lambda: places(service) == AT_ONCE)
    assert len(vllm.peers) == 1


def test_an_adapters_request_goes_by_the_registry_as_it_is_now(
    settings: Settings, service: Service, weights: dict[str, Path]
) -> None:
    """Nothing of a name is remembered: others write to the registry too."""
    house = House(settings, service.store, weights)
    first = save(house, 2, "one")
    assert text(ask(service, adapter=f"{house.job}@latest")) == first
    second = save(house, 4, "two")
    assert text(ask(service, adapter=f"{house.job}@latest")) == second
    assert text(ask(service, adapter=f"{house.job}@2")) == first
    problem(ask(service, adapter=f"{house.job}@3"), 404, "unknown_adapter")


# --------------------------------------------------------------------------- streams


def read(*contents: bytes, error: Exception | None = None) -> list[list[str] | str]:
    """The texts that come at once, and the code of the error at the end."""

    arriving = iter(contents)

    async def readany() -> bytes:
        content = next(arriving, None)
        if content is None and error is not None:
            raise error
        return content or b""

    async def all_of_it() -> list[list[str] | str]:
        body = SimpleNamespace(readany=readany, _read_nowait=lambda most: b"")
        response = SimpleNamespace(content=body)
        found: list[list[str] | str] = []
        try:
            async for chunks in AnswerStream(cast(aiohttp.ClientResponse, response)).chunks():
                found.append([str(chunk["choices"][0]["text"]) for chunk in chunks])
        except ApiError as refusal:
            found.append(refusal.code)
        return found

    return asyncio.run(all_of_it())


def lines(texts: Sequence[str], ended: bool = False) -> bytes:
    chunks = [{"choices": [{"index": 0, "text": text, "finish_reason": None}]} for text in texts]
    told = [json.dumps(chunk, ensure_ascii=False) for chunk in chunks] + ["[DONE]"] * ended
    return "".join(f"data: {one}\n\n" for one in told).encode()


def test_chunks_that_came_together_are_handed_on_together() -> None:
    assert read(lines("ab"), lines("c"), lines("d", ended=True)) == [["a", "b"], ["c"], ["d"]]


def test_a_chunk_may_come_in_any_pieces() -> None:
    whole = lines(["é", "\u2028", "𝛌"], ended=True)
    pieces = [whole[i : i + 1] for i in range(len(whole))]
    assert read(*pieces) == [["é"], ["\u2028"], ["𝛌"]]
    assert read(whole.replace(b"\n", b"\r\n").rstrip()) == [["é", "\u2028", "𝛌"]]


def test_what_came_before_an_error_is_handed_on_before_it() -> None:
    failed = b'data: {"error": {"message": "out of memory"}}\n\n'
    assert read(lines("ab") + failed + lines("c")) == [["a", "b"], "inference_failed"]
    assert read(lines("a") + b"data: {\n\n") == [["a"], "inference_interrupted"]
    assert read(lines("a") + b"data: \xff\n\n") == [["a"], "inference_interrupted"]


def test_an_answer_that_breaks_off_is_none() -> None:
    assert read(lines("a")) == [["a"], "inference_interrupted"]
    assert read(lines("a"), error=aiohttp.ClientPayloadError("gone"))[-1] == "inference_interrupted"
