"""What a request asks for is what it gets: samples, ends, counts, refusals, and a place in the
queue."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from inference.app import create_app
from inference.schemas import MOST_CHOICES
from tests.inference.house import (
    CONTEXT,
    Held,
    complete,
    load,
    reference,
    serving,
    text_of,
)


def test_seed_fixes_sampling_and_n_gives_that_many(client: Any) -> None:
    ask = {"temperature": 1.0, "n": 4, "seed": 7}
    first = complete(client, "plain", **ask).json()["choices"]
    complete(client, "plain", temperature=1.0, seed=None)  # other traffic between the two
    second = complete(client, "plain", **ask).json()["choices"]
    assert first == second
    assert [choice["index"] for choice in first] == [0, 1, 2, 3]
    assert len({choice["text"] for choice in first}) > 1
    other = complete(client, "plain", **(ask | {"seed": 8})).json()["choices"]
    assert other != first


def test_without_a_seed_each_request_draws_anew(client: Any) -> None:
    ask = {"temperature": 1.0, "n": 8, "seed": None}
    first, second = (complete(client, "plain", **ask).json()["choices"] for _ in range(2))
    assert [choice["text"] for choice in first] != [choice["text"] for choice in second]


def test_tiny_top_p_is_greedy(client: Any) -> None:
    greedy = text_of(complete(client, "plain"))
    assert text_of(complete(client, "plain", temperature=1.0, top_p=1e-6)) == greedy


def test_stop_string_ends_the_text_before_itself(client: Any) -> None:
    whole = text_of(complete(client, "plain"))
    stop = whole[3:5]
    body = complete(client, "plain", stop=[stop]).json()
    assert body["choices"][0]["text"] == whole[: whole.index(stop)]
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == whole.index(stop) + len(stop)


def test_usage_counts_tokens_and_finish_reason_tells_the_limit(client: Any) -> None:
    body = complete(client, "plain", max_tokens=2).json()
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    assert body["choices"][0]["finish_reason"] == "length"


def test_end_of_text_token_finishes_with_stop(client: Any) -> None:
    body = complete(client, "plain", temperature=2.0, n=32, seed=1, max_tokens=40).json()
    ended = [c for c in body["choices"] if c["finish_reason"] == "stop"]
    assert ended
    assert all(len(choice["text"]) < 40 for choice in ended)
    assert "<eos>" not in json.dumps(body)


def test_too_long_is_refused_with_the_numbers(client: Any) -> None:
    prompt = complete(client, "plain", "1" * CONTEXT)
    assert prompt.status_code == 400
    assert str(CONTEXT) in prompt.json()["error"]["message"]
    asked = complete(client, "plain", "1" * 40, max_tokens=9)
    assert asked.status_code == 400
    assert "at most 8" in asked.json()["error"]["message"]
    assert complete(client, "plain", "1" * 40, max_tokens=8).status_code == 200
    assert complete(client, "plain", "1" * 40, max_tokens=None).status_code == 200


def test_unknown_model_field_and_value_have_vllms_error_shape(client: Any) -> None:
    unknown = complete(client, "nobody")
    assert unknown.status_code == 404
    assert set(unknown.json()["error"]) == {"message", "type", "param", "code"}
    assert complete(client, "plain", "").status_code == 400
    assert complete(client, "plain", top_p=0).status_code == 400
    field = complete(client, "plain", best_of=3)
    assert field.status_code == 400
    assert field.json()["error"]["param"] == "best_of"


def test_chat_uses_the_models_template_and_needs_one(client: Any, house: Path) -> None:
    body = {"messages": [{"role": "user", "content": "12+3-5?"}], "temperature": 0}
    chat = client.post(
        "/v1/chat/completions", json={"model": "chatty", "max_tokens": 16} | body
    ).json()
    expected = reference(house, "chatty", None, "12+3-5?=")
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": expected}
    refused = client.post("/v1/chat/completions", json={"model": "plain"} | body)
    assert refused.status_code == 400
    told = refused.json()["error"]["message"]
    assert "no chat template" in told
    assert told.endswith("give it a prompt instead.")  # whichever route was asked


def test_models_lists_bases_and_adapters_with_their_parent(client: Any, house: Path) -> None:
    load(client, "J@1", house / "one")
    listed = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert set(listed) == {"plain", "J@1"}
    assert listed["J@1"]["parent"] == "plain"
    assert listed["J@1"]["max_model_len"] == CONTEXT
    assert client.get("/health").status_code == client.head("/health").status_code == 200


def test_full_queue_answers_429_with_a_time_to_come_back(
    house: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(lambda name: house / name, waiting=1, device="cpu")
    with serving(app) as client, ThreadPoolExecutor(1) as pool:
        held = Held(app, monkeypatch)
        first = pool.submit(complete, client, "plain")
        held.waiting(1)
        refused = complete(client, "plain")
        held.release()
        assert refused.status_code == 429
        assert refused.json()["error"]["message"].startswith("1 request is waiting already;")
        assert int(refused.headers["Retry-After"]) > 0
        assert first.result().status_code == 200
        assert complete(client, "plain").status_code == 200


def test_a_request_of_many_prompts_is_one_in_line(
    house: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it could not be had while any other waits, and nobody else while it does."""
    app = create_app(lambda name: house / name, waiting=3, device="cpu")
    with serving(app) as client, ThreadPoolExecutor(3) as pool:
        held = Held(app, monkeypatch)
        prompts = ["1+1?"] * MOST_CHOICES
        answers = []
        for prompt in ("1+1?", prompts, "2+2?"):
            answers.append(pool.submit(complete, client, "plain", prompt))
            held.waiting(len(answers))
        assert complete(client, "plain").status_code == 429
        held.release()
        assert [len(a.result().json()["choices"]) for a in answers] == [1, len(prompts), 1]


def test_waiting_generations_never_keep_the_health_check_waiting(
    house: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(lambda name: house / name, waiting=64, device="cpu")
    with serving(app) as client, ThreadPoolExecutor(60) as pool:
        held = Held(app, monkeypatch)
        waiting = [pool.submit(complete, client, "plain") for _ in range(60)]  # more than threads
        held.waiting(60)
        assert client.get("/health").json()["waiting"] == 60
        held.release()
        assert {answer.result().status_code for answer in waiting} == {200}


def test_each_request_is_one_line_of_the_log_with_what_was_wrong(
    client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="bridge_http.requests")
    id = client.get("/health").headers["x-request-id"]
    complete(client, "nobody")
    good, refused = (r.message for r in caplog.records if r.name == "bridge_http.requests")
    assert re.fullmatch(rf"{id} GET /health 200 \S+ ms", good)
    assert re.fullmatch(r"\S+ POST /v1/completions 404 \S+ ms NotFoundError", refused)
