"""Adapters on a vLLM server: what it samples is the policy, and a server that lags is caught."""

import re
from collections import Counter

import httpx
import pytest
import torch

from bridge_engine.errors import EngineError
from bridge_engine.rollout import SamplingParams
from bridge_engine.rollout.probe import EXACT, trainer_logprobs
from bridge_engine.seeding import generator
from tests.support.vllm_server import vllm_server
from tests.support.wire import Meddling
from tests.vllm.conftest import NAMES, TINY, tiny_policy, train

PROMPTS = [
    list(range(2, 12)),
    [7],
    torch.randint(2, 40, (190,), generator=torch.Generator().manual_seed(5)).tolist(),
]
"""The last is longer than a block of the prefix cache (128 tokens)."""
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A server of bridge-tiny in float32 that takes adapters of rank 8."""
    log = tmp_path_factory.mktemp("vllm") / "log"
    options = ("--enable-lora", "--max-lora-rank", "8", "--served-model-name", "tiny")
    with vllm_server(TINY, log, *options, VLLM_ALLOW_RUNTIME_LORA_UPDATING="True") as address:
        yield address


def forward(policy, prompt, completion, names=NAMES):
    """The trainer's log-probabilities of a completion's tokens."""
    return trainer_logprobs(policy, names, prompt + completion.tokens)[len(prompt) - 1 :]


def distribution(policy, tokens):
    """p_V of what comes after these tokens, by the trainer's own forward pass."""
    with torch.no_grad(), policy.using(*NAMES):
        return policy.module(torch.tensor([tokens])).logits[0, -1].softmax(-1)


def assert_is_the_policys(policy, prompts, completions, repeats, names=NAMES):
    for row, completion in enumerate(completions):
        expected = forward(policy, prompts[row // repeats], completion, names)
        torch.testing.assert_close(
            torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0, msg=f"row {row}"
        )


def draw(sampler, repeats=4, seed=0, prompts=PROMPTS, tokens=24, temperature=1.0):
    return sampler.sample(
        prompts,
        SamplingParams(tokens, temperature=temperature),
        rng=generator(seed, "rollouts", 3),
        repeats=repeats,
    )


def test_samples_carry_the_trainers_logprobs_through_several_syncs(url, make_sampler):
    policy = tiny_policy()
    sampler = make_sampler(policy, url)
    written = []
    for step in range(3):
        assert sampler.sync(step)["vllm/probe"] < 1e-4
        completions = draw(sampler)
        assert_is_the_policys(policy, PROMPTS, completions, repeats=4)
        written.append([c.tokens for c in completions])
        train(policy, seed=step)
    assert written[0] != written[1] != written[2]


def test_the_student_alone_can_be_sampled_between_two_syncs_of_the_policy(url, make_sampler):
    policy = tiny_policy()
    train(policy, seed=1)
    sampler = make_sampler(policy, url)
    for names in (NAMES, ("student",), NAMES):
        sampler.sync(0, names)
        assert_is_the_policys(policy, PROMPTS, draw(sampler), repeats=4, names=names)


def test_completions_end_at_an_end_token_or_at_the_limit_and_say_which(url, make_sampler):
    policy = tiny_policy()
    policy.eos_ids = [1, 20]
    sampler = make_sampler(policy, url)
    sampler.sync(0)
    completions = draw(sampler, repeats=24, tokens=6)
    assert {c.finished for c in completions} == {True, False}
    assert {c.tokens[-1] for c in completions if c.finished} == {1, 20}
    for completion in completions:
        assert sum(t in (1, 20) for t in completion.tokens) == completion.finished
        assert completion.finished or len(completion.tokens) == 6


def test_a_repeated_step_asks_for_the_same_draws_and_another_for_others(url, make_sampler):
    policy = tiny_policy()
    sampler = make_sampler(policy, url)
    sampler.sync(0)
    first, again, other = (draw(sampler, repeats=8, seed=seed) for seed in (0, 0, 1))
    assert [c.tokens for c in first] == [c.tokens for c in again]
    assert [c.tokens for c in first] != [c.tokens for c in other]
    of_one_prompt = [tuple(c.tokens) for c in first[:8]]
    assert len(set(of_one_prompt)) > 1


def test_a_rows_draw_is_its_own_whoever_draws_it(url, make_sampler):
    class Second:
        """The second of two ranks: it draws the second half of the rows."""

        is_first = True

        def first(self, work):
            return work()

        def spread(self, items, work):
            return work(items[len(items) // 2 :])

    policy = tiny_policy()
    sampler = make_sampler(policy, url)
    sampler.sync(0)
    whole = [c.tokens for c in draw(sampler)]
    sampler.world = Second()
    assert [c.tokens for c in draw(sampler)] == whole[len(whole) // 2 :]


def test_draws_follow_the_policys_distribution(url, make_sampler):
    policy = tiny_policy()
    train(policy, seed=3)
    sampler = make_sampler(policy, url)
    sampler.sync(0)
    count = 1500
    found = Counter(c.tokens[0] for c in draw(sampler, prompts=[[7, 9]], repeats=count, tokens=1))
    p_V = distribution(policy, [7, 9])
    share_V = torch.tensor([found[token] / count for token in range(len(p_V))])
    distance = ((share_V - p_V).abs().sum() / 2).item()
    assert distance < 0.08  # total variation; about 0.03 for as many draws of the distribution


def test_greedy_takes_the_policys_most_likely_tokens(url, make_sampler):
    policy = tiny_policy()
    train(policy, seed=4)
    sampler = make_sampler(policy, url)
    sampler.sync(0)
    [completion] = sampler.sample([PROMPTS[0]], SamplingParams(5, temperature=0))
    for place, token in enumerate(completion.tokens):
        before = PROMPTS[0] + completion.tokens[:place]
        assert distribution(policy, before).argmax().item() == token


# --------------------------------------------------------------------------- names


def test_a_name_is_never_used_twice_nor_by_a_later_attempt(url, make_sampler):
    policy = tiny_policy()
    wires = [Meddling(), Meddling()]
    for wire in wires:
        sampler = make_sampler(policy, url, transport=wire)
        for step in (0, 1, 1):  # the same step again, as after a resume
            sampler.sync(step)
    loaded = [body["lora_name"] for wire in wires for body in wire.posted(LOAD)]
    assert len(loaded) == len(set(loaded)) == 6
    assert all(re.fullmatch(r"bridge-\w{12}-step-\d{6}-\d+", name) for name in loaded)


def test_one_adapter_is_served_at_a_time_and_none_after_the_end(url, make_sampler):
    def served():
        cards = httpx.get(f"{url}/v1/models").json()["data"]
        return [card["id"] for card in cards if card["parent"] is not None]

    sampler = make_sampler(tiny_policy(), url)
    for step in range(3):
        sampler.sync(step)
        assert served() == [sampler.model]
        assert [p.name for p in sampler.folder.iterdir()] == [sampler.model]
    sampler.close()
    assert served() == []
    assert list(sampler.folder.iterdir()) == []


def test_what_a_dead_attempt_left_is_taken_away_by_the_next(url, make_sampler):
    policy = tiny_policy()
    dead = make_sampler(policy, url)
    dead.sync(0)
    make_sampler(policy, url)
    cards = httpx.get(f"{url}/v1/models").json()["data"]
    assert dead.model not in [card["id"] for card in cards]
    assert list(dead.folder.iterdir()) == []
    dead.serving = None


# --------------------------------------------------------------------------- a server that lags


def stale_from_the_second_load(trouble):
    """A wire on which the second adapter, and what is asked of it, is `trouble`d."""
    names = []

    def change(path, body):
        if path == LOAD:
            names.append(body["lora_name"])
        if len(names) < 2:
            return body
        return trouble(path, body, names)

    return Meddling(change)


def old_name_answers(path, body, names):
    """The load is swallowed, and the old adapter answers in the new one's name."""
    if path in (LOAD, UNLOAD):
        return httpx.Response(200, text="Success")
    return body | {"model": names[0]}


def base_answers(path, body, names):
    """The load is swallowed, and the base answers."""
    if path in (LOAD, UNLOAD):
        return httpx.Response(200, text="Success")
    return body | {"model": "tiny"}


@pytest.mark.parametrize(
    ("trouble", "whose"), [(old_name_answers, "the last sync"), (base_answers, "the base")]
)
@pytest.mark.parametrize("amount", [0.05, 0.0005])
def test_a_server_that_kept_older_weights_is_caught(url, make_sampler, trouble, whose, amount):
    policy = tiny_policy()
    train(policy, seed=1)
    sampler = make_sampler(policy, url, transport=stale_from_the_second_load(trouble))
    sampler.sync(0)
    train(policy, seed=2, amount=amount)
    with pytest.raises(EngineError, match=f"nearer to those of {whose}") as caught:
        sampler.sync(1)
    assert caught.value.code == "stale_weights"


def test_a_used_names_stale_prefix_cache_is_caught_though_its_weights_are_new(
    url, make_sampler, tmp_path
):
    """vLLM's cache goes by an adapter's name and path: new files in an old place are served with
    the old keys and values. Only what is drawn shows it, not what is scored."""
    import shutil

    place = tmp_path / "one-place"

    def change(path, body):
        if path == LOAD:
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(body["lora_path"], place)
            return {"lora_name": "used", "lora_path": str(place), "load_inplace": True}
        if path == UNLOAD:
            return httpx.Response(200, text="Success")
        return body | ({"model": "used"} if body["model"].startswith("bridge-") else {})

    policy = tiny_policy()
    train(policy, seed=1)
    sampler = make_sampler(policy, url, transport=Meddling(change))
    sampler.sync(0)
    train(policy, seed=2)
    with pytest.raises(EngineError, match="prefix cache is that of older weights"):
        sampler.sync(1)
    httpx.post(f"{url}{UNLOAD}", json={"lora_name": "used"})


# --------------------------------------------------------------------------- what cannot work


def test_another_base_model_is_refused_before_anything_is_trained(url, make_sampler):
    policy = tiny_policy()
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.mul_(1.01)
    with pytest.raises(EngineError, match="is not the model") as caught:
        make_sampler(policy, url)
    assert caught.value.code == "wrong_base_model"


def test_a_server_whose_lora_rank_is_too_small_says_which_one_fits(url, make_sampler):
    policy = tiny_policy()
    policy.add("third", 0)
    sampler = make_sampler(policy, url, names=(*NAMES, "third"))
    with pytest.raises(EngineError, match=r"rank 12.*--max-lora-rank 16") as caught:
        sampler.sync(0)
    assert caught.value.code == "vllm_lora_rank"


def test_a_context_too_small_is_refused_and_never_cuts_a_completion_short(url, make_sampler):
    sampler = make_sampler(tiny_policy(), url)
    sampler.sync(0)
    with pytest.raises(EngineError, match=r"takes 256 tokens.*257 are needed") as caught:
        draw(sampler, prompts=[[5] * 250], tokens=7)
    assert caught.value.code == "vllm_context"
    assert draw(sampler, prompts=[[5] * 250], tokens=6)


def test_a_folder_that_the_server_does_not_see_is_named(url, make_sampler):
    def change(path, body):
        return body | {"lora_path": "/elsewhere/x"} if path == LOAD else body

    sampler = make_sampler(tiny_policy(), url, transport=Meddling(change))
    with pytest.raises(EngineError, match="BRIDGE_VLLM_SHARED") as caught:
        sampler.sync(0)
    assert caught.value.code == "vllm_folder_not_shared"


def test_the_probe_is_as_near_as_float32_allows(url, make_sampler):
    policy = tiny_policy()
    train(policy, seed=9)
    sampler = make_sampler(policy, url)
    assert sampler.sync(0)["vllm/probe"] < EXACT.mean / 50
