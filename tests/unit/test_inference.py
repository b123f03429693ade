"""The inference process: its answers are PEFT's own, and no request meets another's adapter."""

from __future__ import annotations

import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from bridge_engine.errors import EngineError
from inference.app import create_app
from inference.batch import Batch
from inference.folders import bytes_of
from inference.limits import Limits

ALPHABET = "0123456789+-*()=,#?"
CONTEXT = 48


def _save_base(folder: Path, seed: int, chat: bool = False) -> None:
    """A random Qwen2 of a few thousand parameters over single characters."""
    vocabulary = {"<pad>": 0, "<eos>": 1} | {c: i + 2 for i, c in enumerate(ALPHABET)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    if chat:
        fast.chat_template = "{% for m in messages %}{{ m.content }}={% endfor %}"
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.3,
        eos_token_id=1,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)


def _save_adapter(base: Path, folder: Path, seed: int, base_name: str, rank: int = 4) -> None:
    """A LoRA adapter with random weights large enough to change every answer."""
    config = LoraConfig(r=rank, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(Qwen2ForCausalLM.from_pretrained(base), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.5)
    model.save_pretrained(folder)
    (folder / "bridge.json").write_text(json.dumps({"base_model": base_name, "step": 1}))


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases (`plain`, `chatty`) and the adapters one, two (of plain) and other (of chatty)."""
    root = tmp_path_factory.mktemp("house")
    _save_base(root / "plain", seed=1)
    _save_base(root / "chatty", seed=2, chat=True)
    _save_adapter(root / "plain", root / "one", 11, "plain")
    _save_adapter(root / "plain", root / "two", 12, "plain", rank=6)
    _save_adapter(root / "chatty", root / "other", 13, "chatty")
    return root


@pytest.fixture
def client(house: Path) -> Any:
    def materialize(name: str) -> Path:
        if name not in ("plain", "chatty"):
            raise EngineError(f"no model {name!r}", code="unknown_model", param="model")
        return house / name

    with serving(create_app(materialize, device="cpu")) as client:
        yield client


def serving(app: Any) -> TestClient:
    """A client that calls the application by a name of its own."""
    return TestClient(app, base_url="http://127.0.0.1")


def load(client: Any, name: str, path: Path, base: str | None = None) -> Any:
    body = {"lora_name": name, "lora_path": str(path), "base_model": base}
    return client.post("/v1/load_lora_adapter", json=body)


def complete(client: Any, model: str, prompt: str = "12+3-5?", **fields: Any) -> Any:
    body = {"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0} | fields
    return client.post("/v1/completions", json=body)


def text_of(response: Any) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def reference(house: Path, base: str, adapter: str | None, prompt: str = "12+3-5?") -> str:
    """Greedy decoding by plain PEFT with one adapter alone, token by token, without any cache."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(house / base)
    model: Any = Qwen2ForCausalLM.from_pretrained(house / base).eval()
    if adapter:
        model = PeftModel.from_pretrained(model, house / adapter).eval()
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        for _ in range(16):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
            if token == tokenizer.eos_token_id:
                break
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


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


def test_pickled_weights_are_never_read(client: Any, house: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(
        (house / "one" / "adapter_config.json").read_bytes()
    )
    torch.save({}, tmp_path / "adapter_model.bin")
    assert load(client, "P@1", tmp_path, base="plain").status_code == 400


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
    assert "no chat template" in refused.json()["error"]["message"]


def test_models_lists_bases_and_adapters_with_their_parent(client: Any, house: Path) -> None:
    load(client, "J@1", house / "one")
    listed = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert set(listed) == {"plain", "J@1"}
    assert listed["J@1"]["parent"] == "plain"
    assert listed["J@1"]["max_model_len"] == CONTEXT
    assert client.get("/health").status_code == 200


class Held:
    """Keeps the thread that computes from going on until `release`."""

    def __init__(self, app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.running, self._release = threading.Event(), threading.Event()
        advance = Batch.advance

        def held(batch: Batch, tell: Any) -> None:
            self.running.set()
            self._release.wait(60)
            advance(batch, tell)

        monkeypatch.setattr(Batch, "advance", held)
        self.release = self._release.set
        self.scheduler = app.state.scheduler

    def waiting(self, count: int) -> None:
        deadline = time.monotonic() + 30
        while self.scheduler.figures()["waiting"] < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)


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
        assert int(refused.headers["Retry-After"]) > 0
        assert first.result().status_code == 200
        assert complete(client, "plain").status_code == 200


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


def loaded(client: Any) -> set[str]:
    return {card["id"] for card in client.get("/v1/models").json()["data"]}


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
        assert not app.state.registry._over(size)


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
    small = create_app(lambda name: house / name, device="cpu", limits=Limits(memory=size - 1))
    with serving(small) as client:
        refused = complete(client, "plain")
        assert refused.status_code == 400
        assert "BRIDGE_INFERENCE_MEMORY_GB" in refused.json()["error"]["message"]


def test_a_name_that_is_no_model_makes_nobody_leave(client: Any, house: Path) -> None:
    load(client, "J@1", house / "one")
    load(client, "K@1", house / "other")
    assert complete(client, "nobody").status_code == 404
    assert loaded(client) == {"plain", "chatty", "J@1", "K@1"}


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8001", "127.0.0.1.evil.example", ""]
)
def test_a_request_by_a_foreign_host_name_is_refused(client: Any, house: Path, host: str) -> None:
    body = {"lora_name": "J@1", "lora_path": str(house / "one")}
    for method, path in (("POST", "/v1/load_lora_adapter"), ("GET", "/v1/models"), ("GET", "/no")):
        refused = client.request(method, path, json=body, headers={"Host": host})
        assert refused.status_code == 403
        error = refused.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert "BRIDGE_ALLOWED_HOSTS" in error["message"]
    assert loaded(client) == set(), "nothing was done"


def test_a_request_that_a_foreign_page_sends_is_refused(client: Any) -> None:
    for origin in ("https://evil.example", "http://evil.example:8001", "null", ""):
        assert client.get("/health", headers={"Origin": origin}).status_code == 403
    for origin in ("http://localhost:3000", "http://127.0.0.1", "http://[::1]:8000"):
        assert client.get("/health", headers={"Origin": origin}).status_code == 200


def test_own_host_names_are_answered(house: Path) -> None:
    app = create_app(
        lambda name: house / name, device="cpu", hosts=["Inference", "::2", "10.0.0.5"]
    )
    with serving(app) as client:
        for host in ("localhost", "127.0.0.1:8001", "[::1]:8001", "[::1]", "LOCALHOST:1"):
            assert client.get("/health", headers={"Host": host}).status_code == 200
        for host in ("inference:8001", "[::2]:8001", "10.0.0.5:8001"):
            assert client.get("/health", headers={"Host": host}).status_code == 200


def test_listening_everywhere_it_answers_to_its_own_networks_names_alone(house: Path) -> None:
    app = create_app(lambda name: house / name, device="cpu", hosts=["0.0.0.0"])
    with serving(app) as client:
        for host in ("inference:8001", "192.168.0.7:8001", "[fd00::1]:8001", "localhost"):
            assert client.get("/health", headers={"Host": host}).status_code == 200
        for host in ("evil.example:8001", "192.168.0.7.evil.example", ""):
            assert client.get("/health", headers={"Host": host}).status_code == 403
        page = {"Host": "0.0.0.0:8001", "Origin": "http://evil"}
        assert client.get("/health", headers=page).status_code == 403


def _start(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "inference", *arguments],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_taken_port_is_one_sentence_and_status_2() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = _start("--port", str(port))
    assert result.returncode == 2
    assert str(port) in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_listens_on_loopback_only() -> None:
    result = _start("--host", "0.0.0.0", BRIDGE_ALLOW_UNAUTHENTICATED="")
    assert result.returncode == 2
    assert "loopback" in result.stderr


def test_a_limit_below_one_is_one_sentence_and_status_2() -> None:
    result = _start("--port", "0", BRIDGE_INFERENCE_MAX_MODELS="0")
    assert result.returncode == 2
    assert "BRIDGE_INFERENCE_MAX_MODELS" in result.stderr
    assert len(result.stderr.splitlines()) == 1
