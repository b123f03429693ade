"""The gateway in front of vLLM, over a fake of vLLM's HTTP surface (`tests/support/fake_vllm.py`):
what is loaded, what makes room, what comes back, what is refused, and what is out of reach.

`tests/vllm/test_serving.py` asks a real one.
"""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from service.generate.backend import loaded_name
from service.settings import Settings
from tests.api.conftest import problem
from tests.api.house import House, Service
from tests.api.vllm_house import (
    KEPT,
    KEY,
    ask,
    asked,
    house,
    many,
    reconcile,
    row,
    save,
    served,
    service,
    settings_for,
    text,
    vllm,
)
from tests.support.fake_vllm import CANARY, PATHS, FakeVllm
from tests.support.served import Served
from tests.support.waiting import until

__all__ = ["house", "served", "service", "vllm"]  # fixtures


# --------------------------------------------------------------------------- what is asked


def test_an_adapter_is_loaded_on_first_use_proved_and_asked_for_by_its_own_name(
    service: Service, house: House, vllm: FakeVllm
) -> None:
    digest = save(house, 2, "one")
    assert vllm.adapters == {}
    answer = ask(service, adapter=house.job)
    assert text(answer) == digest
    assert answer.json()["adapter"] == f"{house.job}@2"
    name = loaded_name(row(house, 2))
    assert list(vllm.adapters) == [name]
    assert row(house, 2).status == "ready"
    canary, question = asked(vllm, "/v1/completions")
    assert (canary["prompt"], canary["echo"]) == (CANARY["tokens"], True)
    assert (question["model"], question["prompt"]) == (name, "1+1??")


def test_nothing_is_left_to_the_models_generation_config(
    service: Service, house: House, vllm: FakeVllm
) -> None:
    save(house, 2, "one")
    ask(service, adapter=house.job, stop=["", "x"])
    question = asked(vllm, "/v1/completions")[-1]
    expected = {
        "temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1,
        "presence_penalty": 0, "frequency_penalty": 0, "max_tokens": 256,
        "stop": ["x"], "stop_token_ids": [2, 3],
    }  # fmt: skip
    assert expected.items() <= question.items()


def test_models_are_those_that_it_serves(service: Service, house: House) -> None:
    save(house, 2, "one")
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["bridge-tiny", f"{house.job}@2"]


def test_a_stream_comes_as_it_is_written_and_ends_upstream_when_the_client_leaves(
    service: Service, house: House, vllm: FakeVllm
) -> None:
    digest = save(house, 2, "one")
    vllm.go_on = threading.Event()
    body = {"adapter": house.job, "prompt": "1", "stream": True}
    with httpx.stream("POST", f"{service.url}/generate", json=body, timeout=120) as answer:
        lines = answer.iter_lines()
        first = json.loads(next(lines).removeprefix("data: "))
        assert first["choices"][0]["text"] == digest[:4]  # while the rest is not written yet
    until(lambda: vllm.gone)
    vllm.go_on = None
    whole = httpx.post(f"{service.url}/generate", json=body, timeout=120).text
    assert whole.endswith("data: [DONE]\n\n")


# --------------------------------------------------------------------------- names


def test_a_step_saved_again_with_other_bytes_gets_a_name_of_its_own(
    service: Service, house: House, vllm: FakeVllm
) -> None:
    """The fake answers a used name from its first weights, as vLLM's prefix cache would."""
    first = save(house, 2, "one")
    assert text(ask(service, adapter=house.job)) == first
    shutil.rmtree(house.settings.run_dir(house.job) / "adapters")
    second = save(house, 2, "two")
    assert text(ask(service, adapter=house.job)) == second != first
    reconcile(service)
    assert list(vllm.adapters) == [loaded_name(row(house, 2))]  # the old one is gone


def test_fifty_adapters_under_random_traffic_answer_by_their_own_weights(
    service: Service, house: House, vllm: FakeVllm
) -> None:
    import random
    from concurrent.futures import ThreadPoolExecutor

    digests = many(house, 50)
    rng = random.Random(0)
    traffic = [rng.randrange(50) for _ in range(60)]

    def one(number: int) -> str:
        body = {"adapter": f"{house.job}@{number + 1}", "prompt": "1"}

        def asked() -> httpx.Response | None:
            answer = http.post("/generate", json=body)
            return None if answer.status_code == 503 else answer  # two are kept: its place is taken

        return text(until(asked))

    with httpx.Client(base_url=service.url, timeout=120) as http, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(one, traffic))
    assert found == [digests[number] for number in traffic]
    assert len(vllm.adapters) <= KEPT
    loads = [body["lora_name"] for body in asked(vllm, "/v1/load_lora_adapter")]
    assert len({(name, vllm.first[name]) for name in loads}) == len(set(loads))


# --------------------------------------------------------------------------- what is kept


def test_the_least_recently_used_makes_room_and_comes_back_when_asked(
    service: Service, house: House, vllm: FakeVllm
) -> None:
    digests = many(house, 3)
    for step in (1, 2, 1, 3):
        assert text(ask(service, adapter=f"{house.job}@{step}")) == digests[step - 1]
    assert set(vllm.adapters) == {loaded_name(row(house, 1)), loaded_name(row(house, 3))}
    assert text(ask(service, adapter=f"{house.job}@2")) == digests[1]
    assert set(vllm.adapters) == {loaded_name(row(house, 2)), loaded_name(row(house, 3))}


def test_pinned_adapters_are_loaded_from_the_start_and_never_make_room(
    served: Settings, settings: Settings, vllm: FakeVllm, weights: dict[str, Path]
) -> None:
    with Service(served) as service:
        house = House(settings, service.store, weights)
        digests = many(house, 4)
    pinning = served.model_copy(update={"inference_pinned": [f"{house.job}@1", "nobody"]})
    with Service(pinning) as service:
        pinned = loaded_name(row(house, 1))
        until(lambda: pinned in vllm.adapters)
        for step in (2, 3, 4):
            assert text(ask(service, adapter=f"{house.job}@{step}")) == digests[step - 1]
        assert set(vllm.adapters) == {pinned, loaded_name(row(house, 4))}


def test_a_server_that_was_restarted_gets_its_adapters_back(
    service: Service, house: House, vllm: FakeVllm
) -> None:
    many(house, 3)
    for step in (1, 2, 3):
        ask(service, adapter=f"{house.job}@{step}")
    before = set(vllm.adapters)
    vllm.restart()
    reconcile(service)
    assert set(vllm.adapters) == before
    assert len(before) == KEPT


def test_a_service_that_was_restarted_knows_what_the_server_has(
    served: Settings, settings: Settings, vllm: FakeVllm, weights: dict[str, Path]
) -> None:
    with Service(served) as service:
        many(house := House(settings, service.store, weights), 3)
        for step in (1, 2):
            ask(service, adapter=f"{house.job}@{step}")
    with Service(served) as service:
        ask(service, adapter=f"{house.job}@3")
        assert len(vllm.adapters) == KEPT
        vllm.restart()
        reconcile(service)
        assert len(vllm.adapters) == KEPT


def test_what_the_registry_does_not_know_is_unloaded_and_what_is_not_ours_stays(
    service: Service, house: House, vllm: FakeVllm
) -> None:
    save(house, 2, "one")
    ask(service, adapter=house.job)
    others = ["bridge-0123456789ab-step-000004-7", "somebody's", "mail@example.org"]
    vllm.adapters |= dict.fromkeys(["job_gone@3:0123456789ab", *others], "/somewhere")
    reconcile(service)
    assert set(vllm.adapters) == {loaded_name(row(house, 2)), *others}


def test_deleting_a_job_unloads_its_adapters_at_once(
    service: Service, house: House, vllm: FakeVllm
) -> None:
    save(house, 2, "one")
    ask(service, adapter=house.job)
    assert vllm.adapters
    cancelled = httpx.post(f"{service.url}/jobs/{house.job}/cancel", timeout=120)
    assert cancelled.status_code in (200, 202), cancelled.text
    house.store.finish(house.job, house.attempt, "cancelled")
    assert httpx.delete(f"{service.url}/jobs/{house.job}", timeout=120).is_success
    until(lambda: not vllm.adapters)


# --------------------------------------------------------------------------- what is refused


def test_a_rank_above_the_servers_is_409_and_names_its_option(
    service: Service, house: House, vllm: FakeVllm
) -> None:
    vllm.max_lora_rank = 2
    save(house, 2, "one")
    body = problem(ask(service, adapter=house.job), 409, "adapter_rank_too_large")
    assert "--max-lora-rank 4" in body["detail"]
    assert row(house, 2).status == "registered", "it is not the adapter's fault"
    vllm.max_lora_rank = 16  # as it asks for
    assert ask(service, adapter=house.job).status_code == 200


def test_a_base_that_is_not_served_is_409_with_those_that_are(
    settings: Settings, weights: dict[str, Path]
) -> None:
    other = FakeVllm("another", key=KEY)
    with Served(other.app) as server, Service(settings_for(settings, server.url)) as service:
        house = House(settings, service.store, weights)
        save(house, 2, "one")
        unserved = ({"adapter": house.job}, {"model": "owner/name"}, {"model": "bridge-tiny"})
        for named in unserved:
            body = problem(ask(service, **named), 409, "model_not_served")
            assert body["allowed"] == ["another"]
            assert "--served-model-name" in body["detail"]
        near = problem(ask(service, model="anothr"), 404, "unknown_model")
        assert near["nearest"] == "another"


def test_each_base_is_asked_of_the_server_that_has_it(
    settings: Settings, weights: dict[str, Path], vllm: FakeVllm
) -> None:
    other = FakeVllm("owner/other", key=KEY)
    with (
        Served(vllm.app) as one,
        Served(other.app) as two,
        Service(settings_for(settings, two.url, one.url)) as service,
    ):
        house = House(settings, service.store, weights)
        digest = save(house, 2, "one")
        assert text(ask(service, adapter=house.job)) == digest
        assert text(ask(service, model="owner/other")) == "owner/other"
        assert (len(vllm.adapters), len(other.adapters)) == (1, 0)


def test_an_adapter_whose_canary_differs_is_never_asked(
    service: Service, house: House, vllm: FakeVllm
) -> None:
    save(house, 2, "one")
    vllm.first[loaded_name(row(house, 2))] = "ff" * 32  # it has other weights under this name
    refused = problem(ask(service, adapter=house.job), 502, "adapter_failed")
    assert "another policy" in refused["detail"]
    assert row(house, 2).status == "failed"
    assert vllm.adapters == {}
    assert len(asked(vllm, "/v1/completions")) == 1, "the canary alone"


@pytest.mark.parametrize(
    ("status", "said", "ours", "code"),
    [
        (429, {"error": {"message": "too many"}}, 429, "inference_busy"),
        (503, {"error": {"message": "not now"}}, 503, "inference_busy"),
        (500, {"error": {"message": "EngineCore died"}}, 502, "inference_failed"),
        (400, {"error": {"message": "no", "param": "prompt"}}, 422, "cannot_generate"),
        (401, {"error": "Unauthorized"}, 502, "inference_misconfigured"),
        (200, {"choices": [{"index": 0, "text": "", "finish_reason": "abort"}]}, 502,
         "inference_interrupted"),
    ],
)  # fmt: skip
def test_its_errors_become_ours(
    service: Service, vllm: FakeVllm, status: int, said: Any, ours: int, code: str
) -> None:
    vllm.refusal = (status, said)
    answer = ask(service, model="bridge-tiny")
    body = problem(answer, ours, code)
    if ours in (429, 503):
        assert int(answer.headers["retry-after"]) > 0
    if status == 401:
        assert "BRIDGE_INFERENCE_API_KEY" in body["detail"]


def test_a_wrong_key_or_no_server_says_what_to_set(
    served: Settings, settings: Settings, vllm: FakeVllm
) -> None:
    vllm.key = "another"
    with Service(served) as service:
        refused = problem(ask(service, model="bridge-tiny"), 502, "inference_misconfigured")
        assert "BRIDGE_INFERENCE_API_KEY" in refused["detail"]
    with Service(settings_for(settings, "http://127.0.0.1:1")) as service:
        for model in ("bridge-tiny", "owner/name"):
            away = ask(service, model=model)
            problem(away, 503, "inference_unreachable")
            assert int(away.headers["retry-after"]) > 0


def test_a_server_that_dies_in_a_stream_ends_it_with_an_error_and_the_next_request_works(
    service: Service, house: House, vllm: FakeVllm
) -> None:
    digest = save(house, 2, "one")
    vllm.break_off = True
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(model=house.job, prompt="1", stream=True)
        with pytest.raises(openai.APIError, match="not whole"):
            list(stream)
        vllm.break_off = False
        vllm.restart()
        whole = client.completions.create(model=house.job, prompt="1")
        assert whole.choices[0].text == digest


# --------------------------------------------------------------------------- what is out of reach


def test_none_of_vllms_own_paths_is_reached_through_us(service: Service, vllm: FakeVllm) -> None:
    """vLLM's key guards only what is under /v1: whoever reaches it can pause it, or give it other
    weights. Through us nobody does."""
    known = {at for at, _ in vllm.asked}
    detours = [f"/v1/models/..{path}" for path in ("/pause", "/invocations")]
    with httpx.Client(base_url=service.url, timeout=120) as http:
        for path in [*PATHS, *detours, "/v1/models/%2e%2e%2fpause"]:
            answer = http.post(path, json={"model": "bridge-tiny"})
            assert 400 <= answer.status_code < 500, (path, answer.text)
            answer = http.get(path)
            assert 400 <= answer.status_code < 500, (path, answer.text)
    ours = {"/v1/models", "/v1/completions", "/v1/chat/completions"}
    assert {at for at, _ in vllm.asked} - known <= ours
