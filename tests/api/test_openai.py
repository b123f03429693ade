"""/v1 by the unchanged `openai` client: sync, async and streaming."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from bridge_engine.models.folders import materialize_model
from inference.app import create_app as create_inference
from service.settings import Settings
from tests.api.house import House, Service, start_inference
from tests.inference.house import Held, hang_up_on
from tests.support.ports import free_port
from tests.support.served import Served
from tests.support.waiting import until

PROMPT = "12+3-5?"
pytestmark = pytest.mark.timeout(900)  # the first of them waits for inference to start


@pytest.fixture
def service(settings: Settings, inference: str) -> Iterator[Service]:
    with Service(settings.model_copy(update={"inference_url": inference})) as service:
        yield service


@pytest.fixture
def house(settings: Settings, service: Service, weights: dict[str, Path]) -> House:
    return House(settings, service.store, weights)


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", timeout=120) as client:
        yield client


def said(service: Service, **body: Any) -> str:
    """What /generate answers: the same model, the same settings."""
    answer = httpx.post(f"{service.url}/generate", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_models_are_bases_adapters_with_their_parent_and_aliases(
    client: openai.OpenAI, service: Service, house: House
) -> None:
    house.save(2, "one")
    name = f"{house.job}@2"
    httpx.put(f"{service.url}/adapters/aliases/tutor", json={"adapter": name}, timeout=120)
    listed = {model.id: model.to_dict() for model in client.models.list()}
    assert {"bridge-tiny", name, "tutor"} <= set(listed)
    assert listed[name]["parent"] == "bridge-tiny"
    assert listed["tutor"]["root"] == name
    assert listed["bridge-tiny"]["parent"] is None
    assert client.models.retrieve(house.job).id == name
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_a_chat_is_answered_whole_and_as_a_stream(
    client: openai.OpenAI, service: Service, house: House
) -> None:
    house.save(2, "one")  # its template puts a question mark after the problem
    expected = said(service, adapter=house.job, prompt="12+3-5", max_tokens=12)
    asked: dict[str, Any] = {
        "model": house.job,
        "messages": [{"role": "user", "content": "12+3-5"}],
        "max_completion_tokens": 12,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].message.role == "assistant"
    assert whole.model == f"{house.job}@2"
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len("12+3-5?")
    chunks = list(
        client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **asked)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == expected
    assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) > 2
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_a_text_is_continued_with_log_probabilities_n_stop_and_seed(
    client: openai.OpenAI, service: Service
) -> None:
    asked: dict[str, Any] = {
        "model": "bridge-tiny", "prompt": PROMPT, "max_tokens": 10, "seed": 5, "n": 3,
        "temperature": 1.0, "logprobs": 2,
    }  # fmt: skip
    whole = client.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert [c.text for c in client.completions.create(**asked).choices] == [
        c.text for c in whole.choices
    ]
    for choice in whole.choices:
        told = choice.logprobs
        assert told is not None
        assert "".join(told.tokens or []) == choice.text
        assert len(told.token_logprobs or []) == len(told.tokens or [])
        assert all(len(top) >= 2 for top in told.top_logprobs or [])
    texts, offsets = ["", "", ""], [[], [], []]  # type: ignore[var-annotated]
    for chunk in client.completions.create(stream=True, **asked):
        for piece in chunk.choices:
            texts[piece.index] += piece.text
            offsets[piece.index] += (piece.logprobs and piece.logprobs.text_offset) or []
    assert texts == [choice.text for choice in whole.choices]
    assert offsets == [c.logprobs and c.logprobs.text_offset for c in whole.choices]
    assert offsets[0] == sorted(offsets[0])
    assert offsets[0][-1] > 0
    first = whole.choices[0].text
    stop = first[1:3]
    cut = client.completions.create(**{**asked, "n": 1, "stop": [stop]})
    assert cut.choices[0].text == first[: first.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_several_prompts_are_answered_in_their_order(
    client: openai.OpenAI, service: Service
) -> None:
    prompts = ["1+1?", "12+3-5?"]
    found = client.completions.create(
        model="bridge-tiny", prompt=prompts, max_tokens=8, temperature=0
    )
    assert [choice.text for choice in found.choices] == [
        said(service, model="bridge-tiny", prompt=prompt, max_tokens=8) for prompt in prompts
    ]


def test_the_async_client_streams_many_at_once(service: Service, house: House) -> None:
    house.save(2, "one")
    house.save(4, "two")
    models = [f"{house.job}@2", f"{house.job}@4", "bridge-tiny"] * 3
    expected = [
        said(service, model=model, prompt=PROMPT, max_tokens=10, raw=model != "bridge-tiny" or None)
        if model != "bridge-tiny"
        else said(service, model=model, prompt=PROMPT, max_tokens=10)
        for model in models[:3]
    ] * 3

    async def one(client: openai.AsyncOpenAI, model: str) -> str:
        stream = await client.completions.create(
            model=model, prompt=PROMPT, max_tokens=10, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])

    async def run() -> list[str]:
        options = {"base_url": f"{service.url}/v1", "api_key": "none", "timeout": 120.0}
        async with openai.AsyncOpenAI(**options) as client:  # type: ignore[arg-type]
            return list(await asyncio.gather(*(one(client, model) for model in models)))

    assert asyncio.run(run()) == expected


def test_errors_are_those_the_client_knows(client: openai.OpenAI, house: House) -> None:
    house.save(2, "one")
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model=house.job[:-1] + "_@2", prompt="1")
    assert unknown.value.code == "model_not_found"
    assert unknown.value.param == "model"
    assert f"{house.job}@2" in unknown.value.message
    assert unknown.value.request_id
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="bridge-tiny", prompt="1", temperature=9)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="frequency_penalty"):
        client.completions.create(model="bridge-tiny", prompt="1", frequency_penalty=1.0)
    client.completions.create(  # what asks for nothing is no error
        model="bridge-tiny", prompt="1", max_tokens=2, frequency_penalty=0, user="me", logit_bias={}
    )
    turns: Any = [{"role": "system", "content": "x"}, {"role": "user", "content": "1"}]
    with pytest.raises(openai.BadRequestError, match="conversations"):
        client.chat.completions.create(model=house.job, messages=turns)
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="bridge-tiny", prompt="1" * 5000)


def test_paths_and_methods_that_are_not_there_have_openais_body(service: Service) -> None:
    for method, path in (
        ("GET", "/v1/nothing"),
        ("GET", "/v1/completions"),
        ("POST", "/v1/models"),
    ):
        body = httpx.request(method, service.url + path, timeout=120).json()
        assert set(body["error"]) >= {"message", "type", "param", "code"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_stops_the_writing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    inference = create_inference(materialize_model, device="cpu")
    body = {"model": "bridge-tiny", "prompt": "1", "temperature": 1.0, "n": 4, "max_tokens": 250}
    with Served(inference) as server:
        served = settings.model_copy(update={"inference_url": server.url})
        with Service(served) as service:
            said(service, model="bridge-tiny", prompt=PROMPT, max_tokens=1)  # it is loaded
            held = Held(inference, monkeypatch, after=1)
            assert hang_up_on(held, service.url, "/generate", **body, stream=stream)


def how_it_ends(stream: openai.Stream[Any]) -> openai.APIError | None:
    """Nothing is wrong with one that comes whole."""
    try:
        list(stream)
    except openai.APIError as error:
        return error
    return None


def test_a_backend_that_dies_in_a_stream_ends_it_clearly_and_loses_nothing(
    settings: Settings, weights: dict[str, Path]
) -> None:
    port = free_port()
    process = start_inference(port)
    served = settings.model_copy(update={"inference_url": f"http://127.0.0.1:{port}"})
    try:
        with Service(served) as service:
            house = House(settings, service.store, weights)
            house.save(2, "one")
            before = said(service, adapter=house.job, prompt=PROMPT, max_tokens=12)
            with openai.OpenAI(
                base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=120
            ) as client:
                for _ in range(5):
                    stream = client.completions.create(
                        model=house.job, prompt=PROMPT, temperature=1.9, max_tokens=200, n=8,
                        stream=True,
                    )  # fmt: skip
                    next(stream)
                    process.send_signal(signal.SIGKILL)
                    told = how_it_ends(stream)
                    if told is not None:
                        break
                    process.wait(120)  # all was written before it died: once more
                    process = start_inference(port)
                assert "not whole" in str(told)
                with pytest.raises(openai.APIStatusError) as away:
                    client.completions.create(model=house.job, prompt=PROMPT)
                assert away.value.status_code == 503
                assert int(away.value.response.headers["retry-after"]) > 0
                process.wait(120)
                process = start_inference(port)
                again = said(service, adapter=house.job, prompt=PROMPT, max_tokens=12)
                assert again == before
            assert house.status(2) == "ready"
    finally:
        process.kill()
        process.wait(120)


def test_fifty_adapters_under_random_traffic_never_answer_by_the_wrong_weights(
    service: Service, house: House, tmp_path: Path
) -> None:
    """Three are kept loaded, so nearly every request loads one and drops another; one is saved
    again with other bytes meanwhile. Prompts are longer than 128 tokens, where a cache of prompts
    would go stale. Each adapter is one of the two random ones with its last matrix scaled: an
    answer of its own."""
    import random

    from safetensors.numpy import load_file, save_file

    rng = random.Random(0)
    long = "1+2-3*4+5-" * 14
    assert len(long) > 128
    for number in range(50):
        name = f"made{number}"
        folder = shutil.copytree(house.weights[("one", "two")[number % 2]], tmp_path / name)
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        last = sorted(tensors)[-1]
        tensors[last] = tensors[last] * (1 + number)
        save_file(tensors, file)
        house.weights[name] = folder
        house.save(number + 1, name)
    asked = {"max_tokens": 1, "logprobs": 0, "temperature": 0}

    def ask(number: int) -> tuple[str, float]:
        body = {"adapter": f"{house.job}@{number + 1}", "prompt": long, **asked}

        def tried() -> httpx.Response | None:
            answer = httpx.post(f"{service.url}/generate", json=body, timeout=120)
            return None if answer.status_code == 503 else answer  # all that are kept are in use

        answer = until(tried)
        assert answer is not None
        assert answer.status_code == 200, answer.text
        told = answer.json()["choices"][0]["logprobs"]
        return (told[0]["token"], told[0]["logprob"]) if told else ("", 0.0)

    expected = [ask(number) for number in range(50)]  # each alone
    values = [value for _, value in expected]
    assert len({round(value, 3) for value in values}) > 40, "or they could not be told apart"
    traffic = [rng.randrange(50) for _ in range(100)]

    def replace() -> None:
        shutil.rmtree(house.settings.run_dir(house.job) / "adapters" / "step-000001")
        house.save(1, "made1")

    with ThreadPoolExecutor(8) as pool:
        first = list(pool.map(ask, [n for n in traffic[:50] if n]))
        replacing = pool.submit(replace)
        rest = list(pool.map(ask, [n for n in traffic[50:] if n]))
        replacing.result()
    order = [n for n in traffic[:50] if n] + [n for n in traffic[50:] if n]
    for number, (token, value) in zip(order, first + rest, strict=True):
        assert token == expected[number][0]
        assert value == pytest.approx(expected[number][1], abs=2e-4)
    token, value = ask(0)
    assert value == pytest.approx(expected[1][1], abs=2e-4), "the new weights, not the old"


def test_open_streams_hold_no_threads(service: Service) -> None:
    """More of them than there are threads, and everything else is answered all the same."""
    body = {"model": "bridge-tiny", "prompt": "1", "temperature": 2.0, "max_tokens": 250}

    async def run() -> None:
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits()) as http:
            requests = [
                http.build_request("POST", f"{service.url}/generate", json=body | {"stream": True})
                for _ in range(60)
            ]
            answers = await asyncio.gather(*(http.send(r, stream=True) for r in requests))
            assert {answer.status_code for answer in answers} == {200}
            for path in ("/jobs", "/readyz", "/adapters"):
                assert (await http.get(service.url + path)).status_code == 200
            await asyncio.gather(*(answer.aclose() for answer in answers))

    asyncio.run(run())


def test_the_documented_answers_of_v1_are_openais(service: Service) -> None:
    document = httpx.get(f"{service.url}/openapi.json", timeout=120).json()
    answers = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    schema = answers["404"]["content"]["application/json"]["schema"]
    assert schema["$ref"].endswith("/OpenAIError")
    assert "ChatRequest" in document["components"]["schemas"]
