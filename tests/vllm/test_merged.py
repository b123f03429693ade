"""Merged weights into a running vLLM server, and the two ways in which it can keep old ones."""

from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge_engine.errors import EngineError
from bridge_engine.export.merged import merged_weights
from bridge_engine.rollout import SamplingParams
from bridge_engine.rollout.probe import trainer_logprobs
from bridge_engine.rollout.serving_weights import write_untied
from bridge_engine.seeding import generator
from tests.support.vllm_server import vllm_server
from tests.support.wire import Meddling
from tests.vllm.conftest import NAMES, TINY, tiny_policy, train

LONG = torch.randint(2, 40, (190,), generator=torch.Generator().manual_seed(5)).tolist()
DEVELOPMENT = {"VLLM_SERVER_DEV_MODE": "1"}


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """A server of a copy of bridge-tiny whose head is a weight of its own."""
    folder = tmp_path_factory.mktemp("untied")
    write_untied("bridge-tiny", folder)
    with vllm_server(folder, tmp_path_factory.mktemp("vllm") / "log", **DEVELOPMENT) as url:
        yield url


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A server of bridge-tiny as it is: its head is its embedding."""
    with vllm_server(TINY, tmp_path_factory.mktemp("vllm") / "log", **DEVELOPMENT) as url:
        yield url


def assert_samples_are_the_policys(sampler, policy):
    prompts = [[5, 6, 7], LONG]
    completions = sampler.sample(
        prompts, SamplingParams(12), rng=generator(0, "rollouts"), repeats=3
    )
    for row, completion in enumerate(completions):
        prompt = prompts[row // 3]
        ours = trainer_logprobs(policy, NAMES, prompt + completion.tokens)[len(prompt) - 1 :]
        torch.testing.assert_close(torch.tensor(completion.logprobs), ours, atol=1e-4, rtol=0)


def test_a_full_student_is_sampled_exactly_through_several_syncs(untied, make_sampler):
    policy = tiny_policy(full=True)
    sampler = make_sampler(policy, untied, full=True)
    assert sampler.mode == "merged"
    for step in range(3):
        assert sampler.sync(step)["vllm/probe"] < 1e-4
        assert_samples_are_the_policys(sampler, policy)
        train(policy, seed=step, amount=0.01)


@pytest.mark.parametrize("server", ["tied", "untied"])
def test_adapters_can_be_sampled_as_merged_weights(server, make_sampler, request):
    policy = tiny_policy()
    sampler = make_sampler(policy, request.getfixturevalue(server), mode="merged")
    for step in range(2):
        train(policy, seed=step)
        assert sampler.sync(step)["vllm/probe"] < 1e-4
        assert_samples_are_the_policys(sampler, policy)
    assert [path.name for path in sampler.folder.iterdir()] == [sampler.serving]


def test_a_head_that_stays_old_is_caught(untied, make_sampler):
    """As vLLM's CPU build leaves the packed head of some tied models when it reloads."""
    policy = tiny_policy(full=True)
    head = merged_weights(policy, ())["model.embed_tokens.weight"].clone()

    def keep_head(path, body):
        if path == "/collective_rpc":
            file = Path(body["kwargs"]["weights_path"]) / "model.safetensors"
            save_file(load_file(file) | {"lm_head.weight": head}, file)
        return body

    sampler = make_sampler(policy, untied, full=True, transport=Meddling(keep_head))
    train(policy, seed=1, amount=0.01)
    with pytest.raises(EngineError, match="serving_weights MODEL FOLDER") as caught:
        sampler.sync(0)
    assert caught.value.code == "stale_weights"


def test_a_tied_server_follows_a_full_student_or_is_refused(tied, make_sampler):
    """Which of the two is the matter of vLLM's kernels; to sample from old weights is neither."""
    policy = tiny_policy(full=True)
    sampler = make_sampler(policy, tied, full=True)
    train(policy, seed=1, amount=0.01)
    code = None
    try:
        sampler.sync(0)
    except EngineError as refused:
        code = refused.code
    if code is None:
        assert_samples_are_the_policys(sampler, policy)
    assert code in (None, "stale_weights")


@pytest.mark.parametrize(
    ("swallowed", "said"),
    [
        ("/collective_rpc", "nearer to those of the last sync"),
        ("/reset_prefix_cache", "prefix cache is that of older weights"),
    ],
)
def test_a_reload_or_a_cache_reset_that_did_nothing_is_caught(
    untied, make_sampler, swallowed, said
):
    policy = tiny_policy(full=True)
    train(policy, seed=1, amount=0.01)
    wire = Meddling()
    sampler = make_sampler(policy, untied, full=True, transport=wire)
    sampler.sync(0)
    train(policy, seed=2, amount=0.01)
    wire.swallow(swallowed, httpx.Response(200, json={"success": True}))
    with pytest.raises(EngineError, match=said) as caught:
        sampler.sync(1)
    assert caught.value.code == "stale_weights"
