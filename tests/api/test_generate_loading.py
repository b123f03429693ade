"""Adapters and the inference process: which are loaded into it, are refused, and leave it."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from safetensors.numpy import load_file, save_file

from bridge_engine.errors import EngineError
from bridge_engine.models.folders import materialize_model
from bridge_engine.state.checkpoint import publish
from inference.app import create_app as create_inference
from inference.limits import Limits
from service.generate.backend import loaded_name
from service.settings import Settings
from tests.api.conftest import connect, problem
from tests.api.house import KEPT, House
from tests.api.local_house import ask, client, house, text
from tests.support.served import Served
from tests.support.waiting import until

__all__ = ["client", "house"]  # fixtures

pytestmark = pytest.mark.timeout(900)  # the first of them waits for inference to start


def names(inference: str) -> set[str]:
    """What is loaded there."""
    cards = httpx.get(f"{inference}/v1/models", timeout=120).json()["data"]
    return {card["id"] for card in cards}


def test_adapter_is_loaded_on_first_use_and_ready_once_it_has_answered(
    client: TestClient, house: House
) -> None:
    house.save(2, "one")
    assert client.get(f"/adapters/{house.job}").json()["status"] == "registered"
    response = ask(client, adapter=house.job)
    assert text(response) != text(ask(client, model="bridge-tiny"))
    assert response.json()["adapter"] == f"{house.job}@2"
    assert response.json()["model"] == "bridge-tiny"
    assert house.status(2) == "ready"


def test_adapter_comes_back_after_the_backend_forgot_it(
    client: TestClient, house: House, inference: str
) -> None:
    house.save(2, "one")
    first = text(ask(client, adapter=house.job))
    name = {"lora_name": loaded_name(house.store.adapter(f"{house.job}@2"))}
    assert httpx.post(f"{inference}/v1/unload_lora_adapter", json=name, timeout=120).is_success
    assert text(ask(client, adapter=house.job)) == first


def test_a_step_saved_again_with_other_bytes_answers_by_the_new_ones(
    client: TestClient, house: House
) -> None:
    """As when a job goes on from an older checkpoint on another kind of machine."""
    house.save(2, "two")
    two = text(ask(client, adapter=f"{house.job}@2"))
    shutil.rmtree(house.settings.run_dir(house.job) / "adapters")
    house.save(2, "one")
    again = ask(client, adapter=f"{house.job}@2")
    assert again.json()["adapter"] == f"{house.job}@2"
    house.save(4, "one")
    assert text(again) == text(ask(client, adapter=f"{house.job}@4")) != two


def test_more_adapters_than_inference_keeps_answer_all_the_same(
    client: TestClient, house: House
) -> None:
    steps = range(2, 2 + 2 * (KEPT + 1), 2)
    for number, step in enumerate(steps):
        house.save(step, ("one", "two")[number % 2])
    one, two = (text(ask(client, adapter=f"{house.job}@{step}")) for step in steps[:2])
    names = [f"{house.job}@{step}" for step in steps] * 3
    with ThreadPoolExecutor(KEPT) as pool:
        answers = list(pool.map(lambda name: text(ask(client, adapter=name)), names))
    assert answers == [one, two] * (len(names) // 2)
    assert {house.status(step) for step in steps} == {"ready"}


def test_damaged_weights_are_refused_and_noted(client: TestClient, house: House) -> None:
    folder = house.save(2, "one")
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    body = problem(ask(client, adapter=house.job), 502, "adapter_failed")
    assert "registered" in body["detail"]
    noted = client.get(f"/adapters/{house.job}@2").json()
    assert noted["status"] == "failed"
    assert noted["error"]
    shutil.rmtree(folder)
    problem(ask(client, adapter=house.job), 502, "adapter_failed")
    shutil.copytree(house.weights["one"], folder)  # put back from a backup
    assert text(ask(client, adapter=house.job))
    assert house.status(2) == "ready"


def test_adapter_that_does_not_load_is_noted_as_failed(client: TestClient, house: House) -> None:
    folder = house.save(2, "one")
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    body = problem(ask(client, adapter=house.job), 502, "adapter_failed")
    assert "does not fit" in body["detail"]
    assert house.status(2) == "failed"
    assert text(ask(client, model="bridge-tiny"))  # and the base is unharmed


@pytest.mark.parametrize(
    ("memory", "status", "code"), [(1000, 507, "model_too_large"), (None, 503, "model_unavailable")]
)
def test_a_base_that_cannot_be_loaded_is_not_the_adapters_fault(
    settings: Settings, house: House, memory: int | None, status: int, code: str
) -> None:
    def materialize(name: str) -> Path:
        if memory is None:
            raise EngineError("the hub is silent", code="model_unavailable", retryable=True)
        return materialize_model(name)

    house.save(2, "one")
    inference = create_inference(materialize, device="cpu", limits=Limits(memory=memory))
    with Served(inference) as server:
        here = settings.model_copy(update={"inference_url": server.url})
        with connect(here.model_copy(update={"host": "0.0.0.0"})) as client:
            told = problem(ask(client, adapter=house.job), status, code)["detail"]
            assert "silent" not in told, "others are told nothing of the hub or the machine"
        with connect(here) as client:
            for asked in ({"adapter": house.job}, {"model": "bridge-tiny"}):
                refused = ask(client, **asked)
                said = problem(refused, status, code)["detail"]
                assert ("MEMORY_GB" in said) if memory else ("silent" in said)
                assert ("retry-after" in refused.headers) == (status == 503)
    assert house.status(2) == "registered"


def test_request_at_fault_says_nothing_about_the_adapter(client: TestClient, house: House) -> None:
    house.save(2, "one")
    body = problem(ask(client, adapter=house.job, prompt="1" * 5000), 422, "cannot_generate")
    assert "5001" in body["detail"]  # with the template's question mark
    assert house.status(2) == "registered"


def test_the_registrys_word_on_rank_base_and_dtype_is_checked(
    client: TestClient, house: House, tmp_path: Path
) -> None:
    house.save(2, "one", rank=16)
    assert "rank 4" in problem(ask(client, adapter=house.job), 502, "adapter_failed")["detail"]
    folder = house.save(4, "one")
    card = json.loads((folder / "bridge.json").read_text()) | {"base_model": "other"}
    (folder / "bridge.json").write_text(json.dumps(card))
    refused = problem(ask(client, adapter=f"{house.job}@4"), 502, "adapter_failed")
    assert "trained on 'other'" in refused["detail"]
    whole_numbers = shutil.copytree(house.weights["one"], tmp_path / "whole_numbers")
    file = whole_numbers / "adapter_model.safetensors"
    save_file({name: weight.astype("int8") for name, weight in load_file(file).items()}, file)
    house.weights = {**house.weights, "whole_numbers": whole_numbers}
    house.save(6, "whole_numbers")
    refused = problem(ask(client, adapter=f"{house.job}@6"), 502, "adapter_failed")
    assert "dtype I8" in refused["detail"]


def test_an_adapter_that_is_not_what_was_exported_is_never_ready(
    client: TestClient, house: House, inference: str
) -> None:
    """Its canary: the log-probabilities of a fixed prompt, as they were at export."""
    folder = house.save(2, "one")
    assert text(ask(client, adapter=f"{house.job}@2"))
    name = loaded_name(house.store.adapter(f"{house.job}@2"))
    tokens = [5, 6, 7, 8, 9, 10]
    echo = {"model": name, "prompt": tokens, "max_tokens": 1, "echo": True, "logprobs": 0}
    answer = httpx.post(f"{inference}/v1/completions", json=echo, timeout=120).json()
    logprobs = answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(tokens)]
    noted = {"tokens": tokens, "logprobs": logprobs, "dtype": "float32"}
    card = json.loads((folder / "bridge.json").read_text())

    base = {"base": logprobs}  # what it answers is what the base would
    for step, shift, more, wrong in (
        (4, 0.0, {}, None),
        (6, 0.05, {}, "another policy"),
        (8, 0.005, {}, None),
        (10, 0.005, base, "as its base does without it"),
    ):
        folder = house.save(step, "one")
        figures = {**noted, "logprobs": [value + shift for value in logprobs], **more}
        (folder / "bridge.json").write_text(json.dumps(card | {"canary": figures}))
        response = ask(client, adapter=f"{house.job}@{step}")
        if wrong is None:
            assert text(response)
            assert house.status(step) == "ready"
        else:
            assert wrong in problem(response, 502, "adapter_failed")["detail"]
            assert house.status(step) == "failed"


def test_what_the_registry_does_not_know_any_more_leaves_inference(
    client: TestClient, house: House, inference: str
) -> None:
    house.save(2, "one")
    assert text(ask(client, adapter=house.job))
    old = loaded_name(house.store.adapter(f"{house.job}@2"))
    shutil.rmtree(house.settings.run_dir(house.job) / "adapters")
    house.save(2, "two")  # saved again with other bytes
    controller = client.app.state.controller  # type: ignore[attr-defined]
    dropped = client.portal.call(controller.reconcile)  # type: ignore[union-attr]
    assert old in dropped
    assert old not in names(inference)


def test_pinned_adapters_are_loaded_before_anybody_asks_and_stay(
    settings: Settings, house: House, inference: str
) -> None:
    for step in range(1, KEPT + 2):
        house.save(step, "one")
    name = loaded_name(house.store.adapter(f"{house.job}@1"))

    pinning = {"inference_url": inference, "inference_pinned": [f"{house.job}@1"]}
    try:
        with connect(settings.model_copy(update=pinning)) as client:
            until(lambda: name in names(inference))
            for step in range(2, KEPT + 2):
                assert text(ask(client, adapter=f"{house.job}@{step}"))
            assert name in names(inference)
    finally:
        httpx.post(f"{inference}/v1/unload_lora_adapter", json={"lora_name": name}, timeout=120)


def test_a_name_to_be_pinned_that_means_nothing_is_told_once(
    settings: Settings, inference: str, caplog: pytest.LogCaptureFixture
) -> None:
    pinning = {"inference_url": inference, "inference_pinned": ["tutr"]}
    with connect(settings.model_copy(update=pinning)) as client:
        for _ in range(3):
            client.portal.call(client.app.state.controller.reconcile)  # type: ignore[union-attr,attr-defined]
    told = [line for line in caplog.messages if "BRIDGE_INFERENCE_PINNED" in line]
    assert len(told) == 1
    assert "'tutr'" in told[0]


def test_a_pin_that_moves_leaves_nothing_pinned_behind(
    settings: Settings, house: House, inference: str, whole: Path
) -> None:
    def pinned() -> set[str]:
        cards = httpx.get(f"{inference}/v1/models", timeout=120).json()["data"]
        return {card["id"] for card in cards if card["pinned"]}

    house.save(1, "one")
    pinning = {"inference_url": inference, "inference_pinned": [f"{house.job}@latest"]}
    names: list[str] = []
    try:
        with connect(settings.model_copy(update=pinning)) as client:
            controller = client.app.state.controller  # type: ignore[attr-defined]
            for step in (1, 2, 3):
                if step == 2:
                    house.save(2, "two")
                elif step == 3:
                    house.save_model(3, "whole")
                names.append(loaded_name(house.store.adapter(f"{house.job}@{step}")))
                client.portal.call(controller.reconcile)  # type: ignore[union-attr]
                assert pinned() == {names[-1]}
    finally:
        for name in names:
            httpx.post(f"{inference}/v1/unload_lora_adapter", json={"lora_name": name}, timeout=120)


@pytest.fixture
def whole(house: House, tmp_path: Path) -> Path:
    """A model that is not the base, among the house's weights."""
    import numpy as np

    from bridge_engine.models.catalog import resolve_model

    base = resolve_model("bridge-tiny").path
    assert base is not None

    def write(folder: Path) -> None:
        shutil.copytree(base, folder, dirs_exist_ok=True)
        tensors = load_file(folder / "model.safetensors")
        rng = np.random.default_rng(0)
        for key, value in tensors.items():
            tensors[key] = value + rng.normal(scale=0.02, size=value.shape).astype(value.dtype)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        card = {"base_model": "bridge-tiny", "form": "merged", "template": {"kind": "plain"}}
        (folder / "bridge.json").write_text(json.dumps(card))

    publish(tmp_path / "whole", write)
    house.weights = {**house.weights, "whole": tmp_path / "whole"}
    return tmp_path / "whole"


def test_a_full_student_without_adapter_is_served_as_the_whole_model(
    client: TestClient, house: House, whole: Path, inference: str
) -> None:
    folder = house.save_model(2, "whole")
    answer = ask(client, adapter=house.job)
    assert text(answer) != text(ask(client, model="bridge-tiny"))
    assert answer.json()["adapter"] == f"{house.job}@2"
    assert house.status(2) == "ready"
    listed = client.get(f"/adapters/{house.job}").json()
    assert (listed["rank"], listed["base_model"]) == (0, "bridge-tiny")
    with zipfile.ZipFile(io.BytesIO(client.get(f"/adapters/{house.job}/download").content)) as zip:
        assert {"README.md", "config.json", "model.safetensors"} <= set(zip.namelist())
        assert b"whole model" in zip.read("README.md")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    name = {"lora_name": loaded_name(house.store.adapter(f"{house.job}@2"))}
    assert httpx.post(f"{inference}/v1/unload_lora_adapter", json=name, timeout=120).is_success
    assert "manifest" in problem(ask(client, adapter=house.job), 502, "adapter_failed")["detail"]


@pytest.fixture
def looks_on_a_change_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the clock; asked for before the service that looks."""
    monkeypatch.setattr("service.generate.controller.EVERY_SECONDS", 3600.0)


@pytest.mark.usefixtures("looks_on_a_change_alone")
def test_deleting_a_job_takes_its_adapters_from_inference_at_once(
    client: TestClient, house: House, inference: str
) -> None:
    house.save(2, "one")
    assert text(ask(client, adapter=house.job))
    name = loaded_name(house.store.adapter(f"{house.job}@2"))
    client.post(f"/jobs/{house.job}/cancel")
    house.store.finish(house.job, house.attempt, "cancelled")
    assert client.delete(f"/jobs/{house.job}").is_success
    until(lambda: name not in names(inference))
