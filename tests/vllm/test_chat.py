"""Conversations through a real chat template: what vLLM reads behind the gateway is what
transformers makes of the same messages, and it goes on as transformers does."""

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bridge_engine.errors import EngineError
from bridge_engine.models.catalog import SMOLLM
from bridge_engine.models.folders import materialize_model
from service.settings import Settings
from service.store.migrate import upgrade
from tests.api.house import Service
from tests.support.vllm_server import vllm_server

TOKENS = 20
MARGIN = 1e-2
"""Nats between the likeliest token and the next, where backends in float32 cannot but agree."""
CAPITAL = {"role": "user", "content": "What is the capital of France?"}
CONVERSATIONS = {
    "no system message, for which the template has its own": [CAPITAL],
    "a system message": [
        {"role": "system", "content": "You are a pirate."},
        {"role": "user", "content": "Who are you?"},
    ],
    "several turns": [
        CAPITAL,
        {"role": "assistant", "content": "The capital of France is Paris."},
        {"role": "user", "content": "And of Italy?"},
    ],
    "signs of the template's own in the text": [
        {"role": "user", "content": "Repeat after me: \n<|im_end|>\n ¿Qué λ? 12*3 "}
    ],
}


@pytest.fixture(scope="module")
def folder():
    try:
        return materialize_model(SMOLLM)
    except EngineError as error:
        if error.code != "model_unavailable":
            raise
        pytest.skip(f"no model with a chat template: {error.message}")


@pytest.fixture(scope="module")
def expected(folder):
    """By conversation: the prompt's tokens, and what transformers goes on with greedily."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {}
    for name, messages in CONVERSATIONS.items():
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        length = prompt["input_ids"].shape[1]
        with torch.inference_mode():
            out = model.generate(
                **prompt,
                do_sample=False,
                max_new_tokens=TOKENS,
                return_dict_in_generate=True,
                output_logits=True,
            )
        best = torch.cat(out.logits).topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > MARGIN, f"{name}: rounding may decide"
        text = tokenizer.decode(out.sequences[0, length:], skip_special_tokens=True)
        found[name] = (length, text)
    assert len({text for _, text in found.values()}) == len(found), "or a mix-up could not be told"
    return found


@pytest.fixture(scope="module")
def service(folder, tmp_path_factory):
    """The gateway in front of a vLLM server of that model."""
    log = tmp_path_factory.mktemp("vllm") / "log"
    home = tmp_path_factory.mktemp("home")
    with vllm_server(folder, log, "--served-model-name", SMOLLM, context=512) as url:
        settings = Settings(home=home, inference_backend="vllm", inference_url=url)
        upgrade(settings.database_url)
        with Service(settings) as service:
            yield service


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_is_the_tokens_that_transformers_makes_of_it(service, expected, name):
    asked = {"messages": CONVERSATIONS[name], "max_tokens": TOKENS, "temperature": 0}
    told = httpx.post(
        f"{service.url}/generate", json={"model": SMOLLM, **asked}, timeout=120
    ).json()
    assert (told["usage"]["prompt_tokens"], told["choices"][0]["text"]) == expected[name]

    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", timeout=120)
    answer = client.chat.completions.create(model=SMOLLM, **asked)
    assert (answer.usage.prompt_tokens, answer.choices[0].message.content) == expected[name]

    stream = client.chat.completions.create(
        model=SMOLLM, stream=True, stream_options={"include_usage": True}, **asked
    )
    *chunks, last = stream
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert (last.usage.prompt_tokens, said) == expected[name]
