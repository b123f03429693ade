"""Its answers with an adapter are PEFT's own, no request meets another's adapter, and what is no
adapter of a base is refused."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge_engine.errors import EngineError
from inference.app import create_app
from tests.inference.house import (
    complete,
    load,
    loaded,
    reference,
    serving,
    text_of,
)


def test_adapter_answers_are_pefts_own(client: Any, house: Path) -> None:
    assert load(client, "J@1", house / "one").status_code == 200
    assert text_of(complete(client, "J@1")) == reference(house, "plain", "one")
    assert text_of(complete(client, "plain")) == reference(house, "plain", None)


def test_adapters_never_mix_under_concurrent_requests(client: Any, house: Path) -> None:
    for name, folder in {"J@1": "one", "J@2": "two", "K@1": "other"}.items():
        assert load(client, name, house / folder).status_code == 200
    expected = {
        "J@1": reference(house, "plain", "one"),
        "J@2": reference(house, "plain", "two"),
        "K@1": reference(house, "chatty", "other"),
        "plain": reference(house, "plain", None),
        "chatty": reference(house, "chatty", None),
    }
    assert len(set(expected.values())) == len(expected)  # or the test could not tell them apart
    names = list(expected) * 6
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda name: text_of(complete(client, name)), names))
    assert answers == [expected[name] for name in names]


def test_unloading_one_adapter_leaves_the_others_answers_alone(client: Any, house: Path) -> None:
    load(client, "J@1", house / "one")
    load(client, "J@2", house / "two")
    unload = client.post("/v1/unload_lora_adapter", json={"lora_name": "J@1"})
    assert unload.status_code == 200
    assert complete(client, "J@1").status_code == 404
    assert text_of(complete(client, "J@2")) == reference(house, "plain", "two")
    client.post("/v1/unload_lora_adapter", json={"lora_name": "J@2"})
    assert text_of(complete(client, "plain")) == reference(house, "plain", None)


def test_loaded_name_is_never_reused_for_another_path(client: Any, house: Path) -> None:
    load(client, "J@1", house / "one")
    assert load(client, "J@1", house / "one").status_code == 200  # the same again is harmless
    refused = load(client, "J@1", house / "two")
    assert refused.status_code == 400
    assert "never reused" in refused.json()["error"]["message"].replace("\n", " ")
    assert text_of(complete(client, "J@1")) == reference(house, "plain", "one")


@pytest.mark.parametrize("loaded_before", [False, True])
def test_adapter_that_does_not_fit_is_refused_and_harms_nothing(
    client: Any, house: Path, tmp_path: Path, loaded_before: bool
) -> None:
    if loaded_before:
        load(client, "J@1", house / "one")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in ("adapter_model.safetensors", "bridge.json"):
        (broken / file).write_bytes((house / "one" / file).read_bytes())
    config = json.loads((house / "one" / "adapter_config.json").read_text()) | {"r": 3}
    (broken / "adapter_config.json").write_text(json.dumps(config))  # the weights have rank 4
    refused = load(client, "B@1", broken)
    assert refused.status_code == 400, refused.text
    assert complete(client, "B@1").status_code == 404
    assert text_of(complete(client, "plain")) == reference(house, "plain", None)
    load(client, "J@1", house / "one")
    assert text_of(complete(client, "J@1")) == reference(house, "plain", "one")


def test_adapter_with_missing_weights_is_refused(client: Any, house: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in ("adapter_config.json", "bridge.json"):
        (tmp_path / file).write_bytes((house / "one" / file).read_bytes())
    weights = load_file(house / "one" / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, tmp_path / "adapter_model.safetensors")
    refused = load(client, "M@1", tmp_path)
    assert refused.status_code == 400, refused.text


def test_missing_path_and_wrong_base_are_refused_with_the_reason(
    client: Any, house: Path, tmp_path: Path
) -> None:
    missing = load(client, "X@1", tmp_path / "nowhere")
    assert missing.status_code == 400
    assert "nowhere" in missing.json()["error"]["message"]
    wrong = load(client, "X@1", house / "one", base="chatty")
    assert wrong.status_code == 400
    assert "trained on 'plain'" in wrong.json()["error"]["message"]
    unknown = load(client, "X@1", house / "one", base="plain-but-not")
    assert unknown.status_code in (400, 404)
    assert client.get("/v1/models").json()["data"] == []


@pytest.mark.parametrize(("later", "status"), [(True, 503), (False, 500)])
def test_a_base_that_cannot_be_had_is_not_what_was_asked_wrongly(
    house: Path, later: bool, status: int
) -> None:
    def materialize(name: str) -> Path:
        raise EngineError("the hub is silent", code="model_unavailable", retryable=later)

    with serving(create_app(materialize, device="cpu")) as client:
        for refused in (load(client, "J@1", house / "one"), complete(client, "plain")):
            assert refused.status_code == status
            assert refused.json()["error"]["message"] == "the hub is silent"
            assert ("Retry-After" in refused.headers) == later


def test_pickled_weights_are_never_read(client: Any, house: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(
        (house / "one" / "adapter_config.json").read_bytes()
    )
    torch.save({}, tmp_path / "adapter_model.bin")
    assert load(client, "P@1", tmp_path, base="plain").status_code == 400


def test_a_damaged_adapter_leaves_those_beside_it_as_they_were(house: Path, tmp_path: Path) -> None:
    app = create_app(lambda name: house / name, device="cpu")
    with serving(app) as client:
        load(client, "J@1", house / "one")
        before = complete(client, "J@1").json()["choices"]
        for number, (file, content) in enumerate(
            [("adapter_model.safetensors", b"{}"), ("adapter_config.json", b"{")]
        ):
            broken = tmp_path / f"broken{number}"
            shutil.copytree(house / "one", broken)
            (broken / file).write_bytes(content)
            assert load(client, f"B@{number}", broken).status_code == 400
        assert loaded(client) == {"plain", "J@1"}
        assert complete(client, "J@1").json()["choices"] == before
        assert load(client, "J@2", house / "two").status_code == 200
        base = app.state.registry.bases["plain"]
        assert {a.base is base for a in app.state.registry.adapters.values()} == {True}
