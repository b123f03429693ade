"""POST /generate over the real inference process, the built-in model and random adapters."""

from __future__ import annotations

import io
import json
import shutil
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from safetensors.numpy import load_file, save_file

from bridge_engine.checkpoint import publish
from service.generate.asking import AT_ONCE
from service.generate.backend import loaded_name
from service.settings import Settings
from service.store import Store
from tests.api.conftest import BRIDGE, connect, problem
from tests.api.house import KEPT, House

PROMPT = "12+3-5?"
pytestmark = pytest.mark.timeout(900)  # the first of them waits for inference to start
_turn = {"role": "user", "content": "1+1?"}


@pytest.fixture
def client(settings: Settings, inference: str) -> Iterator[TestClient]:
    served = settings.model_copy(update={"inference_url": inference})
    with connect(served) as client:
        yield client


@pytest.fixture
def house(settings: Settings, store: Store, weights: dict[str, Path]) -> House:
    return House(settings, store, weights)


def ask(client: TestClient, **body: Any) -> Any:
    return client.post("/generate", json={"prompt": PROMPT, "max_tokens": 12} | body)


def text(response: Any) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def test_base_model_answers_bare(client: TestClient) -> None:
    body = ask(client, model="bridge-tiny").json()
    assert body["object"] == "generation"
    assert (body["model"], body["adapter"]) == ("bridge-tiny", None)
    assert body["choices"][0]["finish_reason"] in ("stop", "length")
    usage = body["usage"]
    assert usage["prompt_tokens"] == len(PROMPT)  # one character is one token
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


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


def test_names_mean_step_best_and_latest(client: TestClient, house: House) -> None:
    house.save(2, "one", accuracy=0.9)
    house.save(4, "two", accuracy=0.1)
    meant = {
        name: ask(client, adapter=f"{house.job}{name}").json()["adapter"].partition("@")[2]
        for name in ("", "@best", "@latest", "@2", "@4")
    }
    assert meant == {"": "2", "@best": "2", "@latest": "4", "@2": "2", "@4": "4"}
    assert text(ask(client, adapter=f"{house.job}@2")) != text(
        ask(client, adapter=f"{house.job}@4")
    )


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


def test_adapter_comes_back_after_the_backend_forgot_it(
    client: TestClient, house: House, inference: str
) -> None:
    house.save(2, "one")
    first = text(ask(client, adapter=house.job))
    name = {"lora_name": loaded_name(house.store.adapter(f"{house.job}@2"))}
    assert httpx.post(f"{inference}/v1/unload_lora_adapter", json=name).is_success
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


def test_sampling_is_repeatable_by_its_seed(client: TestClient) -> None:
    wanted = {"model": "bridge-tiny", "temperature": 1.0, "n": 3, "seed": 5}
    first = ask(client, **wanted).json()["choices"]
    assert [choice["index"] for choice in first] == [0, 1, 2]
    assert ask(client, **wanted).json()["choices"] == first


def test_stop_text_ends_the_completion(client: TestClient) -> None:
    whole = text(ask(client, model="bridge-tiny"))
    cut = ask(client, model="bridge-tiny", stop=whole[2])
    assert text(cut) == whole[: whole.index(whole[2])]
    assert cut.json()["choices"][0]["finish_reason"] == "stop"


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


def test_request_at_fault_says_nothing_about_the_adapter(client: TestClient, house: House) -> None:
    house.save(2, "one")
    body = problem(ask(client, adapter=house.job, prompt="1" * 5000), 422, "cannot_generate")
    assert "5001" in body["detail"]  # with the template's question mark
    assert house.status(2) == "registered"


def test_base_model_that_is_not_the_adapters_is_409(client: TestClient, house: House) -> None:
    house.save(2, "one")
    response = ask(client, adapter=house.job, model="smollm2-135m-instruct")
    assert problem(response, 409, "base_model_mismatch")["allowed"] == ["bridge-tiny"]
    assert text(ask(client, adapter=house.job, model="bridge-tiny"))


def test_unknown_names_are_404_with_the_nearest(client: TestClient, house: House) -> None:
    early = problem(ask(client, adapter=house.job), 404, "unknown_adapter")
    assert "no adapter yet" in early["detail"]
    house.save(2, "one")
    near = problem(ask(client, adapter=house.job[:-1] + "_@2"), 404, "unknown_adapter")
    assert near["nearest"] == f"{house.job}@2"
    assert near["nearest"] in near["detail"]
    step = problem(ask(client, adapter=f"{house.job}@3"), 404, "unknown_adapter")
    assert "saved: 2" in step["detail"]
    for odd in (f"{house.job}@", f"{house.job}@{'9' * 40}", "a\x00b", "../..", "é", ""):
        response = ask(client, adapter=odd)
        assert response.status_code in (200, 404), response.text
    model = problem(ask(client, model="bridge-tyni"), 404, "unknown_model")
    assert model["nearest"] == "bridge-tiny"
    problem(client.get("/adapters/nobody@1"), 404, "unknown_adapter")
    problem(client.get("/adapters", params={"after": "nobody@1"}), 404, "unknown_adapter")


def test_adapter_may_be_named_as_the_model(client: TestClient, house: House) -> None:
    """As everybody does who comes from OpenAI's or vLLM's API."""
    house.save(2, "one")
    expected = ask(client, adapter=house.job).json()
    for name in (house.job, f"{house.job}@2", f"{house.job}@latest"):
        body = ask(client, model=name).json()
        assert (body["model"], body["adapter"]) == ("bridge-tiny", f"{house.job}@2")
        assert body["choices"] == expected["choices"]
    unknown = problem(ask(client, model=f"{house.job}@3"), 404, "unknown_model")
    assert unknown["param"] == "model"
    assert "saved: 2" in unknown["detail"]
    for odd in ("a\x00b", "é", f"{house.job}@{'9' * 5000}"):
        problem(ask(client, model=odd), 404, "unknown_model")


def test_unknown_model_is_told_of_base_models_and_of_adapters(
    client: TestClient, house: House
) -> None:
    house.save(2, "one")
    body = problem(ask(client, model="nobody"), 404, "unknown_model")
    assert {"bridge-tiny", house.job, f"{house.job}@2"} <= set(body["allowed"])
    assert "base model" in body["detail"]
    assert "adapter" in body["detail"]
    typo = problem(ask(client, model=f"{house.job[:-1]}_@2"), 404, "unknown_model")
    assert typo["nearest"] == f"{house.job}@2"


@pytest.mark.parametrize("name", ["@" + "9" * 5000, "@" + "9" * 18, "@01", "@-1", "@٣"])
def test_any_step_after_the_at_is_found_or_404(client: TestClient, house: House, name: str) -> None:
    house.save(2, "one")
    problem(client.get(f"/adapters/{house.job}{name}"), 404, "unknown_adapter")
    problem(ask(client, adapter=f"{house.job}{name}"), 404, "unknown_adapter")


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


def test_adapters_are_listed_newest_first(client: TestClient, house: House) -> None:
    for step in (2, 4, 6):
        house.save(step, "one")
    page = client.get("/adapters", params={"limit": 2}).json()
    assert [row["step"] for row in page["data"]] == [6, 4]
    rest = client.get("/adapters", params={"after": page["next"]}).json()
    assert [row["step"] for row in rest["data"]] == [2]
    assert client.get("/adapters", params={"job_id": "job_other"}).json()["data"] == []


def test_without_inference_generation_is_503_and_the_rest_works(
    settings: Settings, client: TestClient
) -> None:
    with connect(settings) as lonely:  # nothing listens at its address
        response = ask(lonely, model="bridge-tiny")
        assert "python -m inference" in problem(response, 503, "inference_unreachable")["detail"]
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
    answer = httpx.post(f"{inference}/v1/completions", json=echo).json()
    logprobs = answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(tokens)]
    noted = {"tokens": tokens, "logprobs": logprobs, "dtype": "float32"}
    card = json.loads((folder / "bridge.json").read_text())

    for step, shift, code in ((4, 0.0, None), (6, 0.05, "adapter_failed")):
        folder = house.save(step, "one")
        figures = {**noted, "logprobs": [value + shift for value in logprobs]}
        (folder / "bridge.json").write_text(json.dumps(card | {"canary": figures}))
        response = ask(client, adapter=f"{house.job}@{step}")
        if code is None:
            assert text(response)
            assert house.status(step) == "ready"
        else:
            assert "another policy" in problem(response, 502, code)["detail"]
            assert house.status(step) == "failed"


def test_aliases_mean_one_adapter_until_they_are_moved(client: TestClient, house: House) -> None:
    house.save(2, "one", accuracy=0.9)
    house.save(4, "two", accuracy=0.1)
    put = client.put("/adapters/aliases/tutor", json={"adapter": f"{house.job}@best"})
    assert put.status_code == 200, put.text
    assert put.json()["adapter"] == f"{house.job}@2"
    assert ask(client, adapter="tutor").json()["adapter"] == f"{house.job}@2"
    assert client.get("/adapters/tutor").json()["name"] == f"{house.job}@2"
    client.put("/adapters/aliases/tutor", json={"adapter": f"{house.job}@latest"})
    assert ask(client, model="tutor").json()["adapter"] == f"{house.job}@4"
    listed = client.get("/adapters/aliases").json()["data"]
    assert [(a["name"], a["adapter"]) for a in listed] == [("tutor", f"{house.job}@4")]
    near = problem(ask(client, adapter="tutr"), 404, "unknown_adapter")
    assert near["nearest"] == "tutor"
    assert client.delete("/adapters/aliases/tutor").status_code == 204
    problem(ask(client, adapter="tutor"), 404, "unknown_adapter")
    problem(client.delete("/adapters/aliases/tutor"), 404, "unknown_alias")


@pytest.mark.parametrize(
    ("name", "body", "status", "code"),
    [
        ("bridge-tiny", {"adapter": "JOB"}, 409, "name_taken"),
        ("job_mine", {"adapter": "JOB"}, 409, "name_taken"),
        ("a@b", {"adapter": "JOB"}, 422, None),
        ("mine", {"adapter": "nobody"}, 404, "unknown_adapter"),
        ("mine", {}, 422, "missing"),
    ],
)
def test_an_alias_that_cannot_be_is_refused(
    client: TestClient, house: House, name: str, body: dict[str, str], status: int, code: str
) -> None:
    house.save(2, "one")
    body = {key: house.job if value == "JOB" else value for key, value in body.items()}
    problem(client.put(f"/adapters/aliases/{name}", json=body), status, code)
    assert client.get("/adapters/aliases").json()["data"] == []


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
    loaded = [card["id"] for card in httpx.get(f"{inference}/v1/models").json()["data"]]
    assert old not in loaded


def test_pinned_adapters_are_loaded_before_anybody_asks_and_stay(
    settings: Settings, house: House, inference: str
) -> None:
    for step in range(1, KEPT + 2):
        house.save(step, "one")
    name = loaded_name(house.store.adapter(f"{house.job}@1"))

    def names() -> set[str]:
        return {card["id"] for card in httpx.get(f"{inference}/v1/models").json()["data"]}

    pinning = {"inference_url": inference, "inference_pinned": [f"{house.job}@1"]}
    try:
        with connect(settings.model_copy(update=pinning)) as client:
            deadline = time.monotonic() + 60
            while name not in names():
                assert time.monotonic() < deadline
                time.sleep(0.1)
            for step in range(2, KEPT + 2):
                assert text(ask(client, adapter=f"{house.job}@{step}"))
            assert name in names()
    finally:
        httpx.post(f"{inference}/v1/unload_lora_adapter", json={"lora_name": name})


def test_a_pin_that_moves_leaves_nothing_pinned_behind(
    settings: Settings, house: House, inference: str, whole: Path
) -> None:
    def pinned() -> set[str]:
        cards = httpx.get(f"{inference}/v1/models").json()["data"]
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
            httpx.post(f"{inference}/v1/unload_lora_adapter", json={"lora_name": name})


@pytest.fixture
def whole(house: House, tmp_path: Path) -> Path:
    """A model that is not the base, among the house's weights."""
    import numpy as np

    from bridge_engine.catalog import resolve_model

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
    assert httpx.post(f"{inference}/v1/unload_lora_adapter", json=name).is_success
    assert "manifest" in problem(ask(client, adapter=house.job), 502, "adapter_failed")["detail"]


def test_deleting_a_job_takes_its_adapters_from_inference_at_once(
    client: TestClient, house: House, inference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.save(2, "one")
    assert text(ask(client, adapter=house.job))
    name = loaded_name(house.store.adapter(f"{house.job}@2"))
    client.post(f"/jobs/{house.job}/cancel")
    house.store.finish(house.job, house.attempt, "cancelled")
    assert client.delete(f"/jobs/{house.job}").is_success
    deadline = time.monotonic() + 10  # sooner than the next look at the clock
    while name in {card["id"] for card in httpx.get(f"{inference}/v1/models").json()["data"]}:
        assert time.monotonic() < deadline
        time.sleep(0.05)
