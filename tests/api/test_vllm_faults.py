"""The gateway in front of a fake vLLM that is full, falls over, hangs, starts anew or is shared:
nothing unproved answers, and one server's trouble is not another's."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from bridge_engine.state.checkpoint import publish
from service.errors import ApiError
from service.generate import controller
from service.generate import vllm as vllm_backend
from service.generate.backend import loaded_name
from service.generate.vllm import VllmBackend
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
from tests.support.fake_vllm import CANARY, FakeVllm, logprobs_of
from tests.support.served import Served
from tests.support.waiting import until

__all__ = ["house", "served", "service", "vllm"]  # fixtures

OTHER = "ff" * 32
"""The digest of weights that nobody registered."""


def questions(vllm: FakeVllm) -> list[dict[str, Any]]:
    """What was asked beside canaries."""
    return [body for body in asked(vllm, "/v1/completions") if not body.get("echo")]


def ready_and_gone(service: Service, house: House, vllm: FakeVllm) -> str:
    """Makes an adapter that the database calls ready, and that its restarted server would load with
    other weights; its name."""
    digest = save(house, 2, "one")
    assert text(ask(service, adapter=house.job)) == digest
    assert row(house, 2).status == "ready"
    vllm.restart()
    name = loaded_name(row(house, 2))
    vllm.first[name] = OTHER
    return name


# --------------------------------------------------------------------------- what is proved


@pytest.mark.parametrize("status", [429, 500, 503, 504])
def test_a_ready_adapter_whose_canary_was_not_answered_is_not_asked(
    service: Service, house: House, vllm: FakeVllm, status: int
) -> None:
    ready_and_gone(service, house, vllm)
    vllm.canary_refusal = (status, {"error": {"message": "not now"}})
    assert ask(service, adapter=house.job).status_code in (429, 502, 503)
    before = len(questions(vllm))
    assert row(house, 2).status == "ready", "it is the server's fault"
    vllm.canary_refusal = None
    problem(ask(service, adapter=house.job), 502, "adapter_failed")
    assert len(questions(vllm)) == before


def test_an_adapter_that_is_not_itself_is_noted_and_not_asked_though_it_stays_loaded(
    service: Service, house: House, vllm: FakeVllm
) -> None:
    name = ready_and_gone(service, house, vllm)
    vllm.unload_refusal = (500, {"error": {"message": "no"}})
    counted = []
    for _ in range(2):
        problem(ask(service, adapter=house.job), 502, "adapter_failed")
        assert row(house, 2).status == "failed"
        counted.append(len(questions(vllm)))
    assert name in vllm.adapters
    assert counted[0] == counted[1]


def test_who_asks_between_load_and_canary_waits_for_the_canary(
    service: Service, house: House, vllm: FakeVllm
) -> None:
    name = ready_and_gone(service, house, vllm)
    vllm.canary_waits = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, service, adapter=house.job)
        until(lambda: name in vllm.adapters)
        second = pool.submit(ask, service, adapter=house.job, prompt="2")
        time.sleep(0.3)  # in which it would have been answered
        vllm.canary_waits.set()
        for answer in (first.result(), second.result()):
            problem(answer, 502, "adapter_failed")


def test_what_was_ready_is_proved_anew_by_a_service_that_was_restarted(
    served: Settings, settings: Settings, vllm: FakeVllm, weights: dict[str, Path]
) -> None:
    with Service(served) as service:
        house = House(settings, service.store, weights)
        save(house, 2, "one")
        ask(service, adapter=house.job)
    vllm.first[loaded_name(row(house, 2))] = OTHER
    with Service(served) as service:
        problem(ask(service, adapter=house.job), 502, "adapter_failed")


def whole_model(house: House, tmp_path: Path) -> tuple[str, Path]:
    """Registers a full student's model as step 2; the digest it answers by, and its folder."""
    digest = hashlib.sha256(b"a whole model").hexdigest()

    def write(folder: Path) -> None:
        card = {"base_model": "bridge-tiny", "template": {"kind": "plain"}}
        card |= {"canary": {**CANARY, "logprobs": logprobs_of(digest)}}
        (folder / "bridge.json").write_text(json.dumps(card))
        (folder / "model.safetensors").write_bytes(b"large")

    publish(tmp_path / "whole", write)
    house.weights = {**house.weights, "whole": tmp_path / "whole"}
    return digest, house.save_model(2, "whole")


def test_a_whole_model_is_proved_once_and_again_when_its_server_shows_another_folder(
    service: Service, house: House, vllm: FakeVllm, tmp_path: Path
) -> None:
    digest, folder = whole_model(house, tmp_path)
    (folder / "model.safetensors").unlink()  # vLLM has it: here its card is enough
    name = f"{house.job}@2"
    vllm.names, vllm.first[name] = (name,), digest
    reconcile(service)
    for _ in range(2):
        assert text(ask(service, adapter=name)) == digest
    assert len(asked(vllm, "/v1/completions")) == 3, "one canary"
    vllm.first[name], vllm.root = OTHER, "/models/another"
    reconcile(service)
    problem(ask(service, adapter=name), 502, "adapter_failed")
    assert row(house, 2).status == "failed"


# --------------------------------------------------------------------------- what it says


@pytest.mark.parametrize("said", ["<html>a proxy's</html>", "[]", '{"choices": null}'])
def test_an_answer_that_is_none_is_a_502(service: Service, vllm: FakeVllm, said: str) -> None:
    vllm.refusal = (200, said)
    problem(ask(service, model="bridge-tiny"), 502, "inference_failed")


def test_line_ends_of_unicode_are_text_in_a_stream(service: Service, vllm: FakeVllm) -> None:
    vllm.says = "a\u2028b\u2029c\x85d\x0be\x1cf"
    body = {"model": "bridge-tiny", "prompt": "1", "stream": True}
    answer = httpx.post(f"{service.url}/generate", json=body, timeout=120).content.decode()
    *events, end, rest = answer.split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    found = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    assert found == vllm.says


@pytest.mark.parametrize("stream", [False, True])
def test_several_greedy_choices_are_one_so_many_times(
    service: Service, vllm: FakeVllm, stream: bool
) -> None:
    """As with the local backend. vLLM refuses to write them."""
    vllm.says = "the only answer"
    body = {"model": "bridge-tiny", "prompt": "1", "temperature": 0, "n": 3, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    answer = httpx.post(f"{service.url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    events = answer.text.split("\n\n")[:-2] if stream else [answer.text]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    found = ["", "", ""]
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        found[choice["index"]] += choice["text"]
    assert found == [vllm.says] * 3
    usage = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert usage.items() <= chunks[-1]["usage"].items()


def chat(service: Service) -> httpx.Response:
    messages = [{"role": "user", "content": "1+1?"}]
    body = {"model": "bridge-tiny", "messages": messages}
    return httpx.post(f"{service.url}/v1/chat/completions", json=body, timeout=120)


def test_a_base_models_chat_ends_where_its_adapters_do_and_tells_the_day_of_training(
    service: Service, house: House, vllm: FakeVllm
) -> None:
    save(house, 2, "one")
    assert chat(service).status_code == 200
    (question,) = asked(vllm, "/v1/chat/completions")
    assert question["stop_token_ids"] == [2, 3]
    assert question["chat_template_kwargs"] == {"date_string": "26 Jul 2024"}


def test_a_tokenizer_that_takes_no_day_is_told_none(service: Service, vllm: FakeVllm) -> None:
    vllm.is_mistral = True
    for _ in range(2):
        assert chat(service).status_code == 200
    tried = ["chat_template_kwargs" in body for body in asked(vllm, "/v1/chat/completions")]
    assert tried == [True, False, False]


# --------------------------------------------------------------------------- several of them


def test_a_server_that_hangs_keeps_nobody_from_another(
    settings: Settings,
    weights: dict[str, Path],
    vllm: FakeVllm,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(controller, "EVERY_SECONDS", 3600.0)
    hung = FakeVllm("owner/other", key=KEY)
    hung.hangs = threading.Event()
    with Served(hung.app) as one, Served(vllm.app) as two:
        urls = settings_for(settings, one.url, two.url)
        seconds = property(lambda backend: 1.2 if backend.url == one.url else 60.0)
        monkeypatch.setattr(VllmBackend, "look_seconds", seconds)
        monkeypatch.setattr(vllm_backend, "QUIET_SECONDS", 3600.0)  # the machine may be slow
        with Service(urls) as service:
            house = House(settings, service.store, weights)
            digest = save(house, 2, "one")
            assert text(ask(service, adapter=house.job)) == digest
            looks = len(asked(hung, "/v1/models"))
            for _ in range(3):
                assert text(ask(service, model="bridge-tiny")) == "bridge-tiny"
                problem(ask(service, model="owner/other"), 503, "inference_unreachable")
            assert len(asked(hung, "/v1/models")) == looks, "it is not waited for each time"
        vllm.restart()
        pinning = urls.model_copy(update={"inference_pinned": [f"{house.job}@2"]})
        with Service(pinning) as service:
            until(lambda: vllm.adapters)
            hung.hangs.set()
            monkeypatch.setattr(VllmBackend, "look_seconds", 60.0)
            reconcile(service)
            assert text(ask(service, model="owner/other")) == "owner/other"


def test_two_services_in_front_of_one_server_do_not_undo_each_others_choices(
    served: Settings, settings: Settings, vllm: FakeVllm, weights: dict[str, Path]
) -> None:
    with Service(served) as one, Service(served) as two:
        house = House(settings, one.store, weights)
        digests = many(house, 3)

        def answers(service: Service, step: int) -> bool:
            return text(ask(service, adapter=f"{house.job}@{step}")) == digests[step - 1]

        def loads() -> int:
            return len(asked(vllm, "/v1/load_lora_adapter"))

        assert answers(two, 1)
        assert answers(two, 2)
        assert answers(one, 3)  # which makes one of them leave
        before, count = set(vllm.adapters), loads()
        assert len(before) == KEPT
        for service in (two, one) * 3:
            reconcile(service)
        assert (set(vllm.adapters), loads()) == (before, count)
        assert all(answers(service, step) for step in (1, 2, 3) for service in (one, two))
        vllm.restart()
        for service in (one, two) * 3:
            reconcile(service)
        assert len(vllm.adapters) == KEPT, "what was lost is back, and no more than that"
        count = loads()
        reconcile(one)
        reconcile(two)
        assert loads() == count


def test_an_adapter_that_cannot_be_loaded_keeps_no_other_from_coming_back(
    service: Service, house: House, vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    many(house, 2)
    for step in (1, 2):
        ask(service, adapter=f"{house.job}@{step}")
    serving = service.app.state.serving
    trained = serving.trained

    async def away(row: Any) -> Any:
        if row.step == 1:
            raise ApiError(503, "artifacts_unavailable", "cannot be fetched now")
        return await trained(row)

    monkeypatch.setattr(serving, "trained", away)
    vllm.restart()
    reconcile(service)
    assert list(vllm.adapters) == [loaded_name(row(house, 2))]


def test_pins_that_leave_no_room_are_warned_of(
    served: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    pins = [f"nobody@{step}" for step in range(KEPT)]
    with Service(served.model_copy(update={"inference_pinned": pins})):
        until(lambda: "BRIDGE_INFERENCE_PINNED names 2 adapters" in caplog.text)
