"""POST /generate over the real inference process: what a request asks for, what it is refused, and
what a stream says."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from service.generate.asking import AT_ONCE
from service.settings import Settings
from tests.api.conftest import BRIDGE, connect, problem
from tests.api.house import House
from tests.api.local_house import PROMPT, ask, client, house, text

__all__ = ["client", "house"]  # fixtures

pytestmark = pytest.mark.timeout(900)  # the first of them waits for inference to start
_turn = {"role": "user", "content": "1+1?"}


def test_base_model_answers_bare(client: TestClient) -> None:
    body = ask(client, model="bridge-tiny").json()
    assert body["object"] == "generation"
    assert (body["model"], body["adapter"]) == ("bridge-tiny", None)
    assert body["choices"][0]["finish_reason"] in ("stop", "length")
    usage = body["usage"]
    assert usage["prompt_tokens"] == len(PROMPT)  # one character is one token
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_prompt_gets_the_template_of_the_training_unless_raw(
    client: TestClient, house: House
) -> None:
    house.save(2, "one")  # its template puts a question mark after the problem
    problem_alone = PROMPT.removesuffix("?")
    templated = ask(client, adapter=house.job, prompt=problem_alone)
    assert text(templated) == text(ask(client, adapter=house.job, prompt=PROMPT, raw=True))
    assert templated.json()["usage"]["prompt_tokens"] == len(PROMPT)
    raw = ask(client, adapter=house.job, prompt=problem_alone, raw=True)
    assert raw.json()["usage"]["prompt_tokens"] == len(problem_alone)


def test_sampling_is_repeatable_by_its_seed(client: TestClient) -> None:
    wanted = {"model": "bridge-tiny", "temperature": 1.0, "n": 3, "seed": 5}
    first = ask(client, **wanted).json()["choices"]
    assert [choice["index"] for choice in first] == [0, 1, 2]
    assert ask(client, **wanted).json()["choices"] == first


def test_a_seed_may_be_negative(client: TestClient) -> None:
    wanted = {"model": "bridge-tiny", "temperature": 1.0, "n": 8}
    least, other = -(2**63), -2
    first = ask(client, **wanted, seed=least).json()["choices"]
    assert ask(client, **wanted, seed=least).json()["choices"] == first
    assert ask(client, **wanted, seed=other).json()["choices"] != first
    problem(ask(client, **wanted, seed=least - 1), 422)
    same = {**wanted, "prompt": PROMPT, "seed": other, "max_tokens": 12}
    answers = [client.post("/v1/completions", json=same).json()["choices"] for _ in range(2)]
    assert answers[0] == answers[1]


def test_stop_text_ends_the_completion(client: TestClient) -> None:
    whole = text(ask(client, model="bridge-tiny"))
    cut = ask(client, model="bridge-tiny", stop=whole[2])
    assert text(cut) == whole[: whole.index(whole[2])]
    assert cut.json()["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "1"}, "adapter"),
        ({"model": "bridge-tiny"}, "prompt"),
        ({"model": "bridge-tiny", "prompt": "1", "messages": [_turn]}, "messages"),
        ({"model": "bridge-tiny", "raw": True, "messages": [_turn]}, "raw"),
        ({"model": "bridge-tiny", "prompt": "1", "temprature": 1}, "temprature"),
        ({"model": "bridge-tiny", "prompt": "1", "temperature": -1}, "temperature"),
        ({"model": "bridge-tiny", "prompt": "1", "n": 0}, "n"),
        ({"model": "bridge-tiny", "prompt": "1", "max_tokens": 0}, "max_tokens"),
        ({"model": "bridge-tiny", "prompt": "1", "max_tokens": 100_000}, "max_tokens"),
        ({"model": "bridge-tiny", "prompt": ""}, "prompt"),
        ({"model": "bridge-tiny", "messages": [_turn]}, "messages"),
        ({"model": "bridge-tiny", "messages": [{"role": "me", "content": ""}]}, "messages.0.role"),
    ],
)
def test_wrong_request_is_422_at_its_field(
    client: TestClient, body: dict[str, Any], param: str
) -> None:
    found = problem(client.post("/generate", json=body), 422)
    assert found["param"] == param, found
    if param == "temprature":
        assert found["nearest"] == "temperature"


def test_without_inference_generation_is_503_and_the_rest_works(
    settings: Settings, client: TestClient
) -> None:
    with connect(settings) as lonely:  # nothing listens at its address
        response = ask(lonely, model="bridge-tiny")
        told = problem(response, 503, "inference_unreachable")["detail"]
        assert "under `bridge up` it is started again by itself, else start `python -m" in told
        assert int(response.headers["retry-after"]) > 0
        assert lonely.post("/jobs", json=BRIDGE).status_code == 201


def test_too_many_generations_at_once_are_429_and_leave_no_trace(client: TestClient) -> None:
    places = client.app.state.generations  # type: ignore[attr-defined]
    for _ in range(AT_ONCE):
        assert places.acquire(blocking=False)
    response = ask(client, model="bridge-tiny")
    problem(response, 429, "too_many_generations")
    assert int(response.headers["retry-after"]) > 0
    for _ in range(AT_ONCE):
        places.release()
    for _ in range(AT_ONCE + 1):  # refusals and errors give their place back
        ask(client, model="nobody")
    assert text(ask(client, model="bridge-tiny"))


def test_slow_body_takes_no_generations_place(client: TestClient, http: httpx.Client) -> None:
    places = client.app.state.generations  # type: ignore[attr-defined]
    free: list[int] = []

    def slowly() -> Iterator[bytes]:
        yield b'{"model": "bridge-tiny", '
        time.sleep(0.5)  # the request has long begun
        free.append(places._value)
        yield b'"prompt": "1+1?", "max_tokens": 2}'

    headers = {"Content-Type": "application/json"}
    assert http.post("/generate", content=slowly(), headers=headers).status_code == 200
    assert free == [AT_ONCE]


def plain(text: str) -> str:
    return "".join(letter for letter in text if letter.isascii())


def events_of(response: Any) -> list[Any]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    found = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert found.pop() == "[DONE]"
    return [json.loads(data) for data in found]


def test_a_stream_says_in_pieces_what_the_answer_says_at_once(
    client: TestClient, house: House
) -> None:
    house.save(2, "one")
    wanted = {"adapter": house.job, "temperature": 1.0, "n": 2, "seed": 3, "logprobs": 2}
    whole = ask(client, **wanted).json()
    chunks = events_of(ask(client, stream=True, **wanted))
    assert {chunk["adapter"] for chunk in chunks} == {f"{house.job}@2"}
    assert [chunk.get("usage") for chunk in chunks] == [None] * (len(chunks) - 1) + [whole["usage"]]
    assert chunks[-1]["choices"] == []
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert len(mine) > 2, "it came in pieces"
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        told = [entry for c in mine for entry in c["logprobs"] or []]
        assert [e["token"] for e in told] == [e["token"] for e in choice["logprobs"]]
        # a token may be part of a character: it has no text of its own
        assert plain("".join(e["token"] for e in told)) == plain(choice["text"])
        assert all(e["logprob"] <= e["top_logprobs"][0]["logprob"] for e in told)


def test_a_prompt_at_fault_is_a_problem_even_where_a_stream_was_asked_for(
    client: TestClient,
) -> None:
    refused = ask(client, model="bridge-tiny", prompt="1" * 5000, stream=True)
    problem(refused, 422, "cannot_generate")
