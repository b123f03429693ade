"""What stays loaded and what makes room: never what is in use or pinned, and no more than is
allowed."""

from __future__ import annotations

import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from inference.app import create_app
from inference.errors import said
from inference.folders import bytes_of
from inference.limits import Limits
from tests.inference.house import (
    Held,
    complete,
    load,
    loaded,
    reference,
    serving,
    text_of,
)
from tests.support.waiting import until


def test_the_adapter_not_asked_for_the_longest_makes_room(house: Path) -> None:
    app = create_app(lambda name: house / name, device="cpu", limits=Limits(adapters=2))
    with serving(app) as client:
        load(client, "J@1", house / "one")
        load(client, "J@2", house / "two")
        assert complete(client, "J@1").status_code == 200  # so J@2 is the one
        assert load(client, "K@1", house / "other").status_code == 200
        assert loaded(client) == {"plain", "chatty", "J@1", "K@1"}
        assert complete(client, "J@2").status_code == 404, "who asks hears that it must load"
        assert text_of(complete(client, "J@1")) == reference(house, "plain", "one")
        load(client, "J@2", house / "two")
        assert text_of(complete(client, "J@2")) == reference(house, "plain", "two")


def test_a_pinned_adapter_and_its_base_never_make_room(house: Path) -> None:
    app = create_app(lambda name: house / name, device="cpu", limits=Limits(adapters=2, bases=2))
    with serving(app) as client:
        load(client, "J@1", house / "one")
        body = {"lora_name": "J@1", "lora_path": str(house / "one"), "pinned": True}
        assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
        for number in range(4):
            assert load(client, f"K@{number}", house / "two").status_code == 200
        assert complete(client, "chatty").status_code == 200
        load(client, "L@1", house / "other")
        assert loaded(client) == {"plain", "chatty", "J@1", "L@1"}
        cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
        assert [cards[name]["pinned"] for name in ("J@1", "L@1")] == [True, False]
        load(client, "J@1", house / "one")  # not pinned any more
        load(client, "M@1", house / "other")
        load(client, "N@1", house / "other")
        assert loaded(client) == {"plain", "chatty", "M@1", "N@1"}


def test_a_whole_model_that_was_trained_answers_as_itself_and_takes_a_bases_place(
    house: Path, tmp_path: Path
) -> None:
    app = create_app(lambda name: house / name, device="cpu", limits=Limits(bases=1))
    with serving(app) as client:
        whole = {"name": "J@1:abc", "path": str(house / "chatty")}
        assert complete(client, "J@1:abc").status_code == 404
        assert client.post("/v1/load_model", json=whole).status_code == 200
        assert text_of(complete(client, "J@1:abc")) == reference(house, "chatty", None)
        assert complete(client, "plain").status_code == 200
        assert loaded(client) == {"plain"}, "it made room"
        assert complete(client, "J@1:abc").status_code == 404, "who asks hears that it must load"
        client.post("/v1/load_model", json=whole)
        gone = client.post("/v1/unload_lora_adapter", json={"lora_name": "J@1:abc"})
        assert gone.status_code == 200
        assert loaded(client) == set()
        nothing = client.post("/v1/load_model", json={"name": "J@2:abc", "path": str(tmp_path)})
        assert nothing.status_code == 400
        assert "No model lies at" in nothing.json()["error"]["message"]


def test_a_pinned_whole_model_never_makes_room_until_its_pin_goes(house: Path) -> None:
    app = create_app(lambda name: house / name, device="cpu", limits=Limits(bases=2))
    with serving(app) as client:
        whole = {"name": "J@1:abc", "path": str(house / "chatty")}
        assert client.post("/v1/load_model", json=whole | {"pinned": True}).status_code == 200
        for name in ("plain", "chatty", "plain"):
            assert complete(client, name).status_code == 200
        cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
        assert {name: card["pinned"] for name, card in cards.items()} == {
            "J@1:abc": True,
            "plain": False,
        }
        assert client.post("/v1/load_model", json=whole).status_code == 200
        for name in ("chatty", "plain"):
            assert complete(client, name).status_code == 200
        assert loaded(client) == {"plain", "chatty"}


def test_what_is_dropped_while_it_answers_takes_its_memory_until_it_has(
    house: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = bytes_of(house / "chatty", torch.float32)
    app = create_app(lambda name: house / name, device="cpu", limits=Limits(memory=size * 3 // 2))
    with serving(app) as client, ThreadPoolExecutor(1) as pool:
        whole = {"name": "J@1:abc", "path": str(house / "chatty"), "pinned": True}
        assert client.post("/v1/load_model", json=whole).status_code == 200
        held = Held(app, monkeypatch)
        using = pool.submit(complete, client, "J@1:abc")
        held.waiting(1)
        body = {"lora_name": "J@1:abc"}
        assert client.post("/v1/unload_lora_adapter", json=body).status_code == 200
        assert loaded(client) == set()
        assert app.state.registry._over(size)
        held.release()
        assert using.result().status_code == 200
        until(lambda: not app.state.registry._over(size))


def test_many_adapters_leave_no_more_in_memory_than_are_kept(house: Path) -> None:
    app = create_app(lambda name: house / name, device="cpu", limits=Limits(adapters=2))
    with serving(app) as client:
        seen = []
        for step in range(6):
            folder = house / ("one", "two")[step % 2]
            assert load(client, f"J@{step}", folder).status_code == 200
            assert complete(client, f"J@{step}").status_code == 200
            seen.append(weakref.ref(app.state.registry.adapters[f"J@{step}"].weights))
        assert loaded(client) == {"plain", "J@4", "J@5"}
        gc.collect()
        assert [weights() is not None for weights in seen] == [False] * 4 + [True] * 2
        assert text_of(complete(client, "J@4")) == reference(house, "plain", "one")
        assert text_of(complete(client, "plain")) == reference(house, "plain", None)


def test_the_base_not_asked_for_the_longest_makes_room_with_its_adapters(house: Path) -> None:
    limits = Limits(bases=2)
    app = create_app(lambda name: house / name.partition("-")[0], device="cpu", limits=limits)
    with serving(app) as client:
        load(client, "J@1", house / "one")
        load(client, "K@1", house / "other")
        assert complete(client, "J@1").status_code == 200  # an adapter's use is its base's
        dropped = weakref.ref(app.state.registry.bases["chatty"].model)
        assert complete(client, "plain-again").status_code == 200
        assert loaded(client) == {"plain", "J@1", "plain-again"}
        assert dropped() is None, "its memory is free"
        assert complete(client, "K@1").status_code == 404
        assert text_of(complete(client, "J@1")) == reference(house, "plain", "one")
        load(client, "K@1", house / "other")
        assert text_of(complete(client, "K@1")) == reference(house, "chatty", "other")


def test_what_a_request_uses_makes_no_room_until_it_has_ended(
    house: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(lambda name: house / name, device="cpu", limits=Limits(adapters=1, bases=1))
    # Now: two threads of one process cannot load a model by transformers at the same time.
    expected = reference(house, "plain", "one")
    with serving(app) as client, ThreadPoolExecutor(3) as pool:
        load(client, "J@1", house / "one")
        held = Held(app, monkeypatch)
        using = pool.submit(complete, client, "J@1")
        held.waiting(1)
        second = pool.submit(load, client, "J@2", house / "two")
        other = pool.submit(complete, client, "chatty")
        time.sleep(0.5)
        assert not second.done()
        assert not other.done()
        assert loaded(client) == {"plain", "J@1"}
        held.release()
        assert text_of(using.result()) == expected
        assert {second.result().status_code, other.result().status_code} == {200}


def test_memory_bounds_what_is_loaded(house: Path) -> None:
    size = bytes_of(house / "plain", torch.float32)
    app = create_app(lambda name: house / name, device="cpu", limits=Limits(memory=size * 3 // 2))
    with serving(app) as client:
        for name in ("plain", "chatty"):  # one fits, two do not
            assert complete(client, name).status_code == 200
            assert loaded(client) == {name}


@pytest.mark.parametrize("more", [-1, 1])
def test_what_is_larger_than_all_the_memory_is_refused_in_figures(house: Path, more: int) -> None:
    size = bytes_of(house / "plain", torch.float32)
    app = create_app(lambda name: house / name, device="cpu", limits=Limits(memory=size + more))
    with serving(app) as client:  # either the base is too large, or an adapter with it
        refused = load(client, "J@1", house / "one")
        assert refused.status_code == 507
        message = refused.json()["error"]["message"]
        assert "BRIDGE_INFERENCE_MEMORY_GB" in message
        assert f"may use {size / 1e6:.2f} MB" in message
        assert complete(client, "plain").status_code == (507 if more < 0 else 200)


def test_a_size_is_told_in_the_unit_that_shows_it() -> None:
    assert [said(n) for n in (70_400, 999_000_000, 1_540_000_000)] == [
        *("0.07 MB", "999.00 MB", "1.54 GB")
    ]


def test_a_name_that_is_no_model_makes_nobody_leave(client: Any, house: Path) -> None:
    load(client, "J@1", house / "one")
    load(client, "K@1", house / "other")
    assert complete(client, "nobody").status_code == 404
    assert loaded(client) == {"plain", "chatty", "J@1", "K@1"}
