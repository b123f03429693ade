"""The gateway in front of a real vLLM server: whose weights answer, by whose clients, and what is
left of it when vLLM dies."""

import asyncio
import io
import random
import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import openai
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from bridge_engine.export import AdapterCard, export_adapter
from bridge_engine.export.canary import canary
from bridge_engine.export.merged import export_merged
from service.generate.backend import loaded_name
from service.settings import Settings
from service.store.migrate import upgrade
from tests.api.house import House, Service
from tests.support.fake_vllm import PATHS
from tests.support.vllm_server import Vllm, vllm_server
from tests.vllm.conftest import NAMES, TINY, tiny_policy, train

KEY = "a key"
KEPT = 8
COUNT = 50
"""Adapters: more than are kept loaded."""
TOKENS = 12
PROMPTS = ["12+3-5?", "7-" + "1+2-3*4+5-" * 14 + "9?"]  # the second is longer than 128 tokens
OPTIONS = (
    *("--enable-lora", "--max-lora-rank", "16", "--max-loras", "4", "--max-cpu-loras", "16"),
    *("--served-model-name", "bridge-tiny", "--api-key", KEY),
)


def card(policy, **more):
    return AdapterCard(
        base_model="bridge-tiny",
        method="bridge",
        step=1,
        rank=8,
        template={"kind": "plain", "suffix": "", "system": None},
        max_new_tokens=TOKENS,
        end_tokens=list(policy.eos_ids),
        **more,
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Adapters as training exports them, of policies far from each other."""
    root = tmp_path_factory.mktemp("weights")
    policy = tiny_policy()
    for number in range(COUNT):
        train(policy, seed=number, amount=0.05)
        noted = card(policy, canary=canary(policy, NAMES))
        export_adapter(policy.adapters, NAMES, root / f"w{number}", noted)
    return {f"w{number}": root / f"w{number}" for number in range(COUNT)}


def whole(text):
    """Without the beginning of a character that is cut off, which vLLM leaves out."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def written(tokenizer, ids):
    """The text of these tokens."""
    return whole(tokenizer.decode(ids, skip_special_tokens=True))


@pytest.fixture(scope="module")
def expected(weights):
    """By adapter and prompt: what PEFT writes greedily."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    found = {}
    for name, folder in weights.items():
        base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, folder).eval()
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            with torch.inference_mode():
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=TOKENS,
                )
            found[name, prompt] = written(tokenizer, out[0, ids.shape[1] :])
    assert len(set(found.values())) > COUNT, "or they could not be told apart"
    return found


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    log = tmp_path_factory.mktemp("vllm") / "log"
    server = Vllm(TINY, log, *OPTIONS, VLLM_ALLOW_RUNTIME_LORA_UPDATING="True")
    try:
        server.start()
        yield server
    finally:
        server.stop()


def settings_for(home, url):
    return Settings(
        home=home,
        inference_backend="vllm",
        inference_url=url,
        inference_api_key=KEY,
        inference_max_adapters=KEPT,
    )


@pytest.fixture
def service(tmp_path, vllm):
    settings = settings_for(tmp_path, vllm.url)
    upgrade(settings.database_url)
    with Service(settings) as service:
        yield service


@pytest.fixture
def house(service, weights):
    """A job whose steps 1 to COUNT are the adapters."""
    made = House(service.app.state.settings, service.store, weights)
    for number in range(COUNT):
        made.save(number + 1, f"w{number}", rank=8)
    return made


def loaded(vllm):
    headers = {"Authorization": f"Bearer {KEY}"}
    cards = httpx.get(f"{vllm.url}/v1/models", headers=headers, timeout=120).json()["data"]
    return {card["id"] for card in cards if card["parent"]}


def ask(service, house, number, prompt):
    return openai_client(service).completions.create(
        model=f"{house.job}@{number + 1}", prompt=prompt, max_tokens=TOKENS, temperature=0
    )


def openai_client(service, **more):
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", timeout=120, **more)


def test_adapters_answer_as_peft_does_by_every_kind_of_client(service, house, expected):
    wanted = [(number, prompt) for number in range(KEPT) for prompt in PROMPTS]
    for number, prompt in wanted:
        answer = ask(service, house, number, prompt)
        assert whole(answer.choices[0].text) == expected[f"w{number}", prompt]
        assert answer.model == f"{house.job}@{number + 1}"
        assert answer.usage.total_tokens > answer.usage.prompt_tokens

    async def one(client, number, prompt):
        stream = await client.completions.create(
            model=f"{house.job}@{number + 1}", prompt=prompt, max_tokens=TOKENS, temperature=0,
            stream=True, stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].usage.completion_tokens > 0
        return whole("".join(chunk.choices[0].text for chunk in chunks if chunk.choices))

    async def all_at_once():
        options = {"base_url": f"{service.url}/v1", "api_key": "none", "timeout": 120}
        async with openai.AsyncOpenAI(**options) as client:
            return await asyncio.gather(*(one(client, *w) for w in wanted * 3))

    found = asyncio.run(all_at_once())
    assert found == [expected[f"w{number}", prompt] for number, prompt in wanted * 3]


def test_a_chat_of_an_adapter_is_put_into_its_own_template(service, house, expected):
    asked = {
        "model": f"{house.job}@1",
        "messages": [{"role": "user", "content": PROMPTS[0]}],
        "max_completion_tokens": TOKENS,
        "temperature": 0,
    }
    client = openai_client(service)
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == expected["w0", PROMPTS[0]]
    chunks = client.chat.completions.create(stream=True, **asked)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == expected["w0", PROMPTS[0]]


def test_n_seeds_and_log_probabilities(service, house):
    asked = {
        "model": f"{house.job}@1", "prompt": "1+1?", "max_tokens": 8, "temperature": 1.0,
        "n": 3, "seed": 7, "logprobs": 2,
    }  # fmt: skip
    client = openai_client(service)
    first = client.completions.create(**asked)
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    again = client.completions.create(**asked)
    assert [c.text for c in again.choices] == [c.text for c in first.choices]
    told = first.choices[0].logprobs
    assert all(value <= 0 for value in told.token_logprobs)
    assert all(len(top) >= 2 for top in told.top_logprobs)
    streamed = list(client.completions.create(stream=True, **{**asked, "n": 1}))
    values = [
        value
        for chunk in streamed
        for choice in chunk.choices
        if choice.logprobs
        for value in choice.logprobs.token_logprobs
    ]
    alone = client.completions.create(**{**asked, "n": 1}).choices[0].logprobs.token_logprobs
    assert values == pytest.approx(alone, abs=1e-3), "none is lost where a token has no text"
    greedy = client.completions.create(**{**asked, "temperature": 0})
    assert [choice.index for choice in greedy.choices] == [0, 1, 2]
    assert len({choice.text for choice in greedy.choices}) == 1


def test_random_traffic_never_meets_the_wrong_weights_while_loaded_evicted_and_replaced(
    service, house, vllm, expected
):
    """More adapters than are kept, so they come and go; a step is saved again with other bytes."""
    rng = random.Random(0)
    client = openai_client(service, max_retries=8)
    meaning = {number: f"w{number}" for number in range(COUNT)}

    def one(number):
        prompt = PROMPTS[number % 2]
        answer = client.completions.create(
            model=f"{house.job}@{number + 1}", prompt=prompt, max_tokens=TOKENS, temperature=0
        )
        return whole(answer.choices[0].text)

    def check(traffic):
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(one, traffic))
        assert found == [expected[meaning[n], PROMPTS[n % 2]] for n in traffic]
        assert len(loaded(vllm)) <= KEPT + 1

    check([rng.randrange(COUNT) for _ in range(150)])
    shutil.rmtree(house.settings.run_dir(house.job) / "adapters" / "step-000001")
    house.save(1, "w3", rank=8)
    meaning[0] = "w3"
    check([0, *(rng.randrange(COUNT) for _ in range(40)), 0])


def test_a_rank_above_the_servers_names_the_option(service, weights, tmp_path):
    import json

    wide = shutil.copytree(weights["w0"], tmp_path / "wide")
    config = json.loads((wide / "adapter_config.json").read_text()) | {"r": 64}
    (wide / "adapter_config.json").write_text(json.dumps(config))
    house = House(service.app.state.settings, service.store, {"wide": wide})
    house.save(1, "wide", rank=64)
    body = {"adapter": house.job, "prompt": "1"}
    answer = httpx.post(f"{service.url}/generate", json=body, timeout=120)
    assert answer.status_code == 409
    assert "--max-lora-rank 64" in answer.json()["detail"]


def test_a_download_is_what_vllm_loads_as_it_is(service, house, vllm, expected, tmp_path):
    archive = httpx.get(f"{service.url}/adapters/{house.job}@2/download", timeout=120).content
    with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
        zipped.extractall(tmp_path / "unpacked")
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=vllm.url, headers=headers, timeout=120) as http:
        body = {"lora_name": "downloaded", "lora_path": str(tmp_path / "unpacked")}
        assert http.post("/v1/load_lora_adapter", json=body).is_success
        asked = {"model": "downloaded", "prompt": PROMPTS[0], "max_tokens": TOKENS}
        answer = http.post("/v1/completions", json=asked | {"temperature": 0}).json()
        assert answer["choices"][0]["text"] == expected["w1", PROMPTS[0]]
        http.post("/v1/unload_lora_adapter", json={"lora_name": "downloaded"})


def test_what_is_wrong_with_a_request_is_said(service, house):
    client = openai_client(service)
    with pytest.raises(openai.BadRequestError, match="context length"):
        client.completions.create(model=f"{house.job}@1", prompt="1" * 2000)
    turn = {"role": "user", "content": "1"}
    with pytest.raises(openai.BadRequestError, match="chat template"):
        client.chat.completions.create(model="bridge-tiny", messages=[turn])
    almost = client.completions.create(model="bridge-tiny", prompt="1" * 250, temperature=0)
    assert almost.usage.completion_tokens <= 6, "what the context leaves"


def test_every_path_that_the_real_server_has_is_out_of_reach(service, vllm):
    paths = httpx.get(f"{vllm.url}/openapi.json", timeout=120).json()["paths"]
    ours = {"/v1/models", "/v1/completions", "/v1/chat/completions", "/metrics", "/adapters"}
    theirs = {path for path in paths if path not in ours and "{" not in path}
    assert {"/invocations", "/v1/load_lora_adapter"} <= theirs
    assert theirs <= set(PATHS), "the fake's list is out of date"
    with httpx.Client(base_url=service.url, timeout=120) as http:
        for path in theirs:
            for method in ("GET", "POST"):
                assert http.request(method, path, json={}).status_code in (404, 405), path
        assert "vllm:" not in http.get("/metrics").text
        assert http.post("/adapters", json={}).status_code == 405


def test_who_hangs_up_is_not_written_for(service, house, vllm):
    def figure(name):
        headers = {"Authorization": f"Bearer {KEY}"}
        lines = httpx.get(f"{vllm.url}/metrics", headers=headers, timeout=120).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    body = {
        "adapter": f"{house.job}@1", "prompt": "12+34-5+67-8+90?", "temperature": 2.0,
        "max_tokens": 220, "n": 16, "seed": 3,
    }  # fmt: skip
    whole = httpx.post(f"{service.url}/generate", json=body, timeout=120).json()["usage"]
    assert whole["completion_tokens"] > 16 * 20  # or it would be over before anybody hangs up
    before = figure("vllm:generation_tokens_total")
    with httpx.stream(
        "POST", f"{service.url}/generate", json=body | {"stream": True}, timeout=120
    ) as answer:
        next(answer.iter_bytes())
    deadline = time.monotonic() + 60
    while figure("vllm:num_requests_running"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert figure("vllm:generation_tokens_total") - before < whole["completion_tokens"] / 2


def test_a_full_student_is_served_as_a_model_of_its_own(tmp_path, tmp_path_factory):
    """By a server that is started with its folder, under its immutable name."""
    policy = tiny_policy(full=True)
    train(policy, seed=5, amount=0.02)
    folder = tmp_path / "whole"
    noted = replace(card(policy, form="merged", canary=canary(policy, NAMES)), rank=0)
    export_merged(policy, NAMES, folder, noted, torch.float32)
    settings = settings_for(tmp_path, "http://127.0.0.1:1")
    upgrade(settings.database_url)
    with Service(settings) as service:
        house = House(settings, service.store, {"whole": folder})
        house.save_model(4, "whole")
    name = f"{house.job}@4"
    place = settings.run_dir(house.job) / "models" / "step-000004"
    log = tmp_path_factory.mktemp("vllm") / "log"
    day = "{{ '" + PROMPTS[0] + "' if date_string == '26 Jul 2024' else '7' }}"
    options = ("--served-model-name", name, "--api-key", KEY, "--chat-template", day)
    with vllm_server(place, log, *options) as url, Service(settings_for(tmp_path, url)) as service:
        answer = openai_client(service).completions.create(
            model=house.job, prompt=PROMPTS[0], max_tokens=TOKENS, temperature=0
        )
        assert answer.model == name
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(place)
        ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
        out = model.generate(input_ids=ids, do_sample=False, max_new_tokens=TOKENS)
        assert answer.choices[0].text == written(tokenizer, out[0, ids.shape[1] :])
        assert house.status(4) == "ready"
        turn = {"role": "user", "content": "?"}
        chat = {"adapter": name, "messages": [turn], "max_tokens": TOKENS}
        told = httpx.post(f"{service.url}/generate", json=chat, timeout=120).json()
        assert told["choices"][0]["text"] == answer.choices[0].text, "the day of training"


def test_a_server_killed_in_a_stream_ends_it_clearly_and_gets_its_adapters_back(
    service, house, vllm, expected
):
    """The last test of the file: it takes the others' server away."""
    for number in range(KEPT):
        ask(service, house, number, PROMPTS[0])
    before = loaded(vllm)
    assert before == {loaded_name(house.store.adapter(f"{house.job}@{n + 1}")) for n in range(KEPT)}
    client = openai_client(service, max_retries=0)
    stream = client.completions.create(
        model=f"{house.job}@1", prompt="1", temperature=1.9, max_tokens=240, n=16, stream=True
    )
    next(stream)
    vllm.kill()
    with pytest.raises(openai.APIError, match="not whole"):
        list(stream)
    with pytest.raises(openai.APIStatusError) as away:
        client.completions.create(model=f"{house.job}@1", prompt="1")
    assert away.value.status_code == 503
    assert int(away.value.response.headers["retry-after"]) > 0
    vllm.start()
    assert loaded(vllm) == set()
    answer = ask(service, house, 0, PROMPTS[0])  # the first that is asked for, at once
    assert answer.choices[0].text == expected["w0", PROMPTS[0]]
    deadline = time.monotonic() + 60
    while loaded(vllm) != before:  # and the others without being asked for
        assert time.monotonic() < deadline, (loaded(vllm), before)
        time.sleep(0.5)
