"""What can go wrong between the engine and a vLLM server, and what the engine makes of it.

The server here is a script of answers; a real one is in tests/vllm.
"""

import json
import socket

import httpx
import pytest
import torch

from bridge_engine.errors import EngineError
from bridge_engine.evaluation.spec import EvaluationSpec
from bridge_engine.rollout import NativeSampler, SamplingParams, make_sampler, vllm_server
from bridge_engine.rollout.probe import (
    DRAWN_TOKENS,
    EXACT,
    ROUNDED,
    mismatch,
    probe_prompt,
    trainer_logprobs,
)
from bridge_engine.rollout.vllm import VllmSampler, shared_folder
from bridge_engine.rollout.vllm_server import ATTEMPTS, VllmServer
from bridge_engine.spec.train import TrainSpec
from tests.support.tiny import random_policy, tiny_spec

GREEDY = SamplingParams(4, temperature=0)


def server(answer):
    """A client of a server that answers each request by `answer(request)`."""
    return VllmServer("http://vllm", timeout_s=7, transport=httpx.MockTransport(answer))


def completion(tokens, finish_reason="length"):
    logprobs = {"token_logprobs": [-0.5] * len(tokens)}
    choice = {"token_ids": tokens, "logprobs": logprobs, "finish_reason": finish_reason}
    return httpx.Response(200, json={"choices": [choice]})


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(vllm_server, "PAUSE_S", 0.0)
    for name in ("URL", "SHARED", "WEIGHTS", "API_KEY", "TIMEOUT"):
        monkeypatch.delenv(f"BRIDGE_VLLM_{name}", raising=False)


def sampler_of(tmp_path, engine="vllm", **changes):
    given = tiny_spec("bridge", device="cpu").model_dump(mode="json", by_alias=True) | changes
    given["rollout"]["engine"] = engine
    spec = TrainSpec.model_validate(given)
    return make_sampler(random_policy("student", "teacher"), ("student",), tmp_path, spec)


# --------------------------------------------------------------------------- configuration


def test_this_process_samples_unless_the_spec_says_otherwise(tmp_path):
    assert isinstance(sampler_of(tmp_path, "native"), NativeSampler)


def test_without_an_address_the_error_names_the_variable_and_the_way_back(tmp_path):
    with pytest.raises(EngineError, match=r"BRIDGE_VLLM_URL.*rollout.engine: native") as caught:
        sampler_of(tmp_path)
    assert (caught.value.code, caught.value.category) == ("vllm_not_configured", "infra")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("BRIDGE_VLLM_WEIGHTS", "both"),
        ("BRIDGE_VLLM_TIMEOUT", "0"),
        ("BRIDGE_VLLM_TIMEOUT", "soon"),
        ("BRIDGE_VLLM_URL", "http://[half"),
        ("BRIDGE_VLLM_URL", "localhost:8000"),
        ("BRIDGE_VLLM_URL", "http://host:port"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named_with_its_value(
    tmp_path, monkeypatch, variable, value
):
    monkeypatch.setenv("BRIDGE_VLLM_URL", "http://127.0.0.1:1")
    monkeypatch.setenv(variable, value)
    with pytest.raises(EngineError) as caught:
        sampler_of(tmp_path)
    assert caught.value.code == "vllm_misconfigured"
    assert f"{variable} is {value!r}" in caught.value.message


def test_a_server_that_is_not_there_can_be_tried_again_later(tmp_path, monkeypatch):
    with socket.socket() as taken:  # bound, and not listening: nobody answers
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("BRIDGE_VLLM_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(EngineError, match="cannot be reached") as caught:
            sampler_of(tmp_path)
    assert (caught.value.code, caught.value.retryable) == ("vllm_unreachable", True)


def test_two_runs_never_share_a_folder_on_a_shared_disk(tmp_path):
    one, other = (shared_folder(tmp_path / name, str(tmp_path / "shared")) for name in "ab")
    assert one != other
    assert one == shared_folder(tmp_path / "a", str(tmp_path / "shared"))
    assert shared_folder(tmp_path / "a", None) == tmp_path / "a" / "vllm"


# --------------------------------------------------------------------------- of a base alone

EVALUATION = EvaluationSpec.model_validate(
    {
        "kind": "eval",
        "model": "bridge-tiny",
        "benchmarks": "arithmetic",
        "sampling": {"engine": "vllm", "max_new_tokens": 4},
        "runtime": {"dtype": "float32", "device": "cpu"},
    }
)


def serving(policy, asked, adapters=None):
    """A server of the policy's base; `asked` gets the path and the model of every request.

    It takes any adapter, and answers in its name with these sets of the policy; None: takes none.
    """

    def logprobs(model, tokens):
        return trainer_logprobs(policy, () if model == "served" else adapters, tokens).tolist()

    def answer(request):
        path, body = request.url.path, json.loads(request.read() or b"{}")
        asked.append((path, body.get("model")))
        if path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "served", "max_model_len": 64}]})
        if path.endswith("load_lora_adapter") and adapters is not None:
            return httpx.Response(200, text="done")
        if path != "/v1/completions":
            return httpx.Response(404, json={"error": "no adapters here"})
        if "prompt_logprobs" in body:
            scored = logprobs(body["model"], body["prompt"])
            marked = [
                {str(token): {"logprob": p}}
                for token, p in zip(body["prompt"][1:], scored, strict=True)
            ]
            return httpx.Response(200, json={"choices": [{"prompt_logprobs": [None, *marked]}]})
        drawn = [5] * body["max_tokens"]
        ours = logprobs(body["model"], [*body["prompt"], *drawn])[-len(drawn) :]
        choice = {"token_ids": drawn, "logprobs": {"token_logprobs": ours}}
        return httpx.Response(200, json={"choices": [{**choice, "finish_reason": "length"}]})

    return server(answer)


def test_a_base_model_alone_is_sampled_under_its_own_name_and_nothing_is_brought(tmp_path):
    policy, asked = random_policy(dtype=torch.float32), []
    sampler = VllmSampler(policy, (), EVALUATION, tmp_path / "vllm", serving(policy, asked))
    assert sampler.sync(0)["vllm/probe"] < 1e-5
    (completion,) = sampler.sample([[3, 4]], GREEDY)
    assert completion.tokens == [5] * 4
    assert sampler.software() == {"vllm": "unknown"}  # this one does not tell
    sampler.close()
    assert {path for path, _ in asked} == {"/v1/models", "/v1/completions", "/version"}
    assert {model for path, model in asked if path == "/v1/completions"} == {"served"}
    assert not (tmp_path / "vllm").exists()


def test_who_is_asked_alone_and_is_not_what_is_served_may_be_a_whole_model(tmp_path):
    """A full student's: no adapter of the base that the server has."""
    served, asked_for = (random_policy(dtype=torch.float32, seed=seed) for seed in (0, 1))
    with pytest.raises(EngineError, match="BRIDGE_VLLM_WEIGHTS=merged") as caught:
        VllmSampler(asked_for, (), EVALUATION, tmp_path, serving(served, []))
    assert caught.value.code == "wrong_base_model"


def test_errors_name_the_field_of_the_spec_that_asked(tmp_path):
    policy = random_policy(dtype=torch.float32)
    with pytest.raises(EngineError, match=r"sampling\.engine: native") as caught:
        make_sampler(policy, (), tmp_path, EVALUATION)
    assert caught.value.param == "sampling.engine"
    sampler = VllmSampler(policy, (), EVALUATION, tmp_path, serving(policy, []))
    sampler.sync(0)
    with pytest.raises(EngineError, match=r"lower sampling\.max_new_tokens") as caught:
        sampler.sample([[3]], SamplingParams(64, temperature=0))
    assert caught.value.param == "sampling.max_new_tokens"


# --------------------------------------------------------------------------- of adapters

NAMES = ("student", "teacher")
TRAINING = tiny_spec("bridge", device="cpu")


def take_a_small_step(policy):
    """One that moves the probe less than a server may be off."""
    with torch.no_grad():
        policy.adapters.parameters("student")[1].add_(2e-4)


def test_a_server_that_takes_up_every_sync_passes(tmp_path):
    policy, served = (random_policy(*NAMES, dtype=torch.float32) for _ in range(2))
    server = serving(served, [], NAMES)
    sampler = VllmSampler(policy, NAMES, TRAINING, tmp_path / "vllm", server)
    for step in range(3):
        assert sampler.sync(step)["vllm/probe"] < 1e-5
        take_a_small_step(policy)
        take_a_small_step(served)


def test_a_server_that_keeps_the_base_stops_the_run(tmp_path):
    policy = random_policy(*NAMES, dtype=torch.float32)
    sampler = VllmSampler(policy, NAMES, TRAINING, tmp_path / "vllm", serving(policy, [], ()))
    with pytest.raises(EngineError, match="nearer to those of the base") as caught:
        sampler.sync(0)
    assert (caught.value.code, caught.value.category) == ("stale_weights", "infra")


def test_a_server_that_keeps_the_last_sync_stops_the_run(tmp_path):
    policy, served = (random_policy(*NAMES, dtype=torch.float32) for _ in range(2))
    server = serving(served, [], NAMES)
    sampler = VllmSampler(policy, NAMES, TRAINING, tmp_path / "vllm", server)
    sampler.sync(0)
    take_a_small_step(policy)
    moved = (sampler._ours(NAMES, sampler.prompt) - sampler.others["the last sync"]).abs().mean()
    assert moved < EXACT.mean, "so that nothing but the comparison can tell"
    with pytest.raises(EngineError, match="nearer to those of the last sync") as caught:
        sampler.sync(1)
    assert (caught.value.code, caught.value.category) == ("stale_weights", "infra")


# --------------------------------------------------------------------------- the wire


def test_a_completion_is_asked_for_from_the_policys_own_distribution():
    """Whatever generation_config.json beside the served model says."""
    asked = []

    def answer(request):
        asked.append(request.read())
        return completion([5, 6, 7, 1], "stop")

    found = server(answer).complete("m", [3], SamplingParams(9), eos_ids=[1], seed=11)
    assert (found.tokens, found.finished) == ([5, 6, 7, 1], True)
    body = httpx.Response(200, content=asked[0]).json()
    neutral = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,
        "stop_token_ids": [1],
        "seed": 11,
        "max_tokens": 9,
    }
    assert {key: body[key] for key in neutral} == neutral


def test_a_broken_connection_is_tried_again_and_not_for_ever():
    calls = []

    def answer(request):
        calls.append(request)
        if len(calls) < ATTEMPTS:
            raise httpx.RemoteProtocolError("server disconnected")
        return completion([5, 6, 7, 8])

    assert server(answer).complete("m", [3], GREEDY, eos_ids=[1]).tokens == [5, 6, 7, 8]
    calls.clear()

    def never(request):
        calls.append(request)
        raise httpx.ConnectError("refused")

    with pytest.raises(EngineError) as caught:
        server(never).complete("m", [3], GREEDY, eos_ids=[1])
    assert caught.value.code == "vllm_unreachable"
    assert len(calls) == ATTEMPTS


def test_no_answer_in_time_is_a_timeout_that_names_its_setting():
    def answer(request):
        raise httpx.ReadTimeout("slow")

    with pytest.raises(EngineError, match=r"within 7 s.*BRIDGE_VLLM_TIMEOUT") as caught:
        server(answer).complete("m", [3], GREEDY, eos_ids=[1])
    assert (caught.value.category, caught.value.retryable) == ("timeout", True)


def test_a_completion_that_the_server_broke_off_is_never_taken_for_a_whole_one():
    with pytest.raises(EngineError, match=r"broke off a completion after 2 tokens.*'abort'"):
        server(lambda _: completion([5, 6], "abort")).complete("m", [3], GREEDY, eos_ids=[1])


@pytest.mark.parametrize(
    ("response", "code", "retryable"),
    [
        (httpx.Response(200, text="<html>welcome</html>"), "vllm_refused", False),
        (httpx.Response(401, json={"error": "no key"}), "vllm_refused", False),
        (httpx.Response(400, json={"error": {"message": "too long"}}), "vllm_refused", False),
        (httpx.Response(500, text="engine died"), "vllm_failed", True),
    ],
)
def test_what_no_vllm_would_say_is_an_error_with_what_was_said(response, code, retryable):
    with pytest.raises(EngineError, match="http://vllm") as caught:
        server(lambda _: response).base()
    assert (caught.value.code, caught.value.retryable) == (code, retryable)


def test_somebody_elses_requests_on_a_server_of_merged_weights_are_noticed():
    def answer(request):
        return httpx.Response(200, json={"success": request.url.path != "/reset_prefix_cache"})

    with pytest.raises(EngineError, match="a server of their own") as caught:
        server(answer).reload("/weights")
    assert caught.value.code == "vllm_busy"


# --------------------------------------------------------------------------- the probe

OURS = -torch.rand(30, generator=torch.Generator().manual_seed(0)) * 3
BASE = OURS[:20] + 0.3 * torch.randn(20, generator=torch.Generator().manual_seed(1))


def found(scored=OURS, drawn=None, tolerance=EXACT, others=None):
    drawn = scored[-DRAWN_TOKENS:] if drawn is None else drawn
    return mismatch(
        scored, drawn, OURS, {"the base": BASE} if others is None else others, tolerance
    )


def test_a_server_that_answers_as_the_policy_passes():
    assert found() is None
    assert found(OURS + 5e-5) is None
    assert found(OURS + 0.05, tolerance=ROUNDED) is None


def test_a_server_that_answers_as_the_base_is_told_so():
    kept = torch.cat([BASE, OURS[20:]])
    assert "nearer to those of the base" in found(kept)
    assert "nearer to those of the base" in found(kept, tolerance=ROUNDED)


def test_a_base_that_the_probe_cannot_tell_from_the_policy_is_no_reason_to_stop():
    assert found(OURS + 4e-5, others={"the base": OURS[:20] + 5e-5}) is None


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf")])
def test_a_server_that_answers_as_nobody_is_told_how_far_off_it_is(value):
    assert "nats a token away from the trainer's" in found(OURS + value, others={})


def test_a_prefix_cache_of_old_weights_shows_in_what_is_drawn():
    assert "prefix cache" in found(drawn=OURS[-DRAWN_TOKENS:] - 0.2)


def test_the_probe_is_longer_than_a_block_of_the_cache_and_fits_the_context():
    assert len(probe_prompt(50, 4096)) > 128
    assert len(probe_prompt(50, 64)) + DRAWN_TOKENS < 64
    assert probe_prompt(50, 4096) == probe_prompt(50, 4096)
