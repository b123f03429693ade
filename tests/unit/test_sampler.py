"""The native sampler: what it returns is what the training forward pass says of it."""

from types import SimpleNamespace

import pytest
import torch

from bridge_engine.forward.sequences import TokenSequence, pad
from bridge_engine.policy import Policy
from bridge_engine.rollout import SamplingParams, lean, sample
from bridge_engine.rollout.native import inverse, rung
from bridge_engine.spec.train import LoraSpec
from tests.support.tiny import EOS, PAD, VOCABULARY, random_model, random_policy

PROMPTS = [[5, 6, 7], [3], [9, 8, 7, 6, 5, 4], [2, 2]]


def draw(policy, params, *, seed=0, merged=False, **options):
    rng = torch.Generator().manual_seed(seed)
    with policy.using("student", "teacher", merged=merged):
        return sample(
            policy.model, PROMPTS, params, eos_ids=[EOS], pad_id=PAD, generator=rng, **options
        )


def forward_logprobs(policy, prompt, completion):
    batch = pad([TokenSequence(prompt, completion.tokens)], pad_id=PAD, device=torch.device("cpu"))
    with torch.no_grad(), policy.using("student", "teacher"):
        return policy.logprobs(batch)[0][0]


def test_sampler_logprobs_equal_the_training_forward_pass():
    policy = random_policy("student", "teacher", dtype=torch.float32)
    for merged in (False, True):
        completions = draw(policy, SamplingParams(20), repeats=6, merged=merged)
        for index, completion in enumerate(completions):
            expected = forward_logprobs(policy, PROMPTS[index // 6], completion)
            torch.testing.assert_close(
                torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0
            )


def test_rows_stop_at_eos_or_at_the_limit_and_say_which():
    policy = random_policy("student", "teacher")
    completions = draw(policy, SamplingParams(12), repeats=16)
    assert {c.finished for c in completions} == {True, False}
    for completion in completions:
        assert completion.tokens.count(EOS) == completion.finished
        assert (completion.tokens[-1] == EOS) == completion.finished
        assert completion.finished or len(completion.tokens) == 12


def test_a_rows_draw_does_not_depend_on_who_else_is_in_the_batch():
    policy = random_policy("student", "teacher")
    together = draw(policy, SamplingParams(15), repeats=4, batch_size=64)
    apart = draw(policy, SamplingParams(15), repeats=4, batch_size=4)
    assert [c.tokens for c in together] == [c.tokens for c in apart]


def test_same_seed_same_draw_and_other_seed_another():
    policy = random_policy("student", "teacher")
    first = [c.tokens for c in draw(policy, SamplingParams(15), repeats=4)]
    assert first == [c.tokens for c in draw(policy, SamplingParams(15), repeats=4)]
    assert first != [c.tokens for c in draw(policy, SamplingParams(15), repeats=4, seed=1)]


def test_greedy_equals_transformers_generate():
    policy = random_policy("student", "teacher")
    ours = draw(policy, SamplingParams(10, temperature=0))
    for prompt, completion in zip(PROMPTS, ours, strict=True):
        with policy.using("student", "teacher"):
            theirs = policy.model.generate(
                torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=EOS
            )
        assert completion.tokens == theirs[0, len(prompt) :].tolist()


def test_first_tokens_are_drawn_with_the_policys_own_probabilities():
    policy = random_policy("student", "teacher")
    n = 4000
    with policy.using("student", "teacher"), torch.no_grad():
        rng = torch.Generator().manual_seed(5)
        drawn = sample(
            policy.model,
            [[5, 6]],
            SamplingParams(1),
            eos_ids=[EOS],
            pad_id=PAD,
            generator=rng,
            repeats=n,
            batch_size=n,
        )
        exact = policy.model(torch.tensor([[5, 6]])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([c.tokens[0] for c in drawn]), minlength=VOCABULARY)
    # Pearson's chi-square over arms with enough mass; 99.9 % point of 22 degrees of freedom is 48
    expected = exact * n
    enough = expected > 5
    statistic = ((counts - expected)[enough] ** 2 / expected[enough]).sum()
    assert statistic < 48


def test_top_p_never_draws_outside_the_nucleus():
    policy = random_policy("student", "teacher")
    with policy.using("student", "teacher"), torch.no_grad():
        exact = policy.model(torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1)
    ordered = exact.sort(descending=True)
    size = int((ordered.values.cumsum(0) < 0.5).sum()) + 1
    nucleus = set(ordered.indices[:size].tolist())
    drawn = draw(policy, SamplingParams(1, top_p=0.5), repeats=100)[:100]
    assert {c.tokens[0] for c in drawn} <= nucleus


def test_every_end_token_that_the_model_declares_ends_a_completion():
    """Chat models name more than one: the end of the turn beside the end of the text."""
    model = random_model()
    model.generation_config.eos_token_id = [EOS, 5]
    tokenizer = SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD, chat_template=None)
    policy = Policy(model, tokenizer, LoraSpec())
    assert policy.eos_ids == [EOS, 5]
    drawn = sample(
        model,
        PROMPTS,
        SamplingParams(20),
        eos_ids=policy.eos_ids,
        pad_id=PAD,
        generator=torch.Generator().manual_seed(0),
        repeats=8,
    )
    assert {c.tokens[-1] for c in drawn if c.finished} == {EOS, 5}


def test_a_batch_shrinks_as_its_rows_end_and_by_few_sizes(monkeypatch):
    sizes = []

    def watched(model, original=lean.decoder):
        decoder = original(model)
        step = decoder.step
        decoder.step = lambda tokens_R: sizes.append(len(tokens_R)) or step(tokens_R)
        return decoder

    monkeypatch.setattr(lean, "decoder", watched)
    completions = draw(random_policy("student", "teacher"), SamplingParams(60), repeats=16)
    alive = [sum(len(c.tokens) > step for c in completions) for step in range(1, 60)]
    assert sizes == [rung(rows) for rows in alive if rows], "no larger than it must be"
    assert sizes[0] > 32 > sizes[-1]
    assert len(set(sizes)) < len(set(alive))


@pytest.mark.parametrize("size", [200, 1000, 1024], ids=["one look", "padded", "whole blocks"])
def test_a_draw_is_where_the_cumulated_weight_passes_its_share(size):
    rng = torch.Generator().manual_seed(0)
    weights = torch.randint(0, 4, (60, size), generator=rng).float()
    weights[:20, : size // 3] = weights[20:40, -size // 3 :] = 0
    weights[40:, 0], weights[40:, 1:256], weights[40:, 256::256] = 2**25, 0, 0  # beyond float32
    shares = torch.rand(60, 1, generator=rng, dtype=torch.float64)
    shares[::6], shares[1::6] = 0, 1 - 2**-53
    cumulative = weights.double().cumsum(-1)
    behind = torch.linspace(0.5, 150.5, 20, dtype=torch.float64).view(-1, 1).clamp(max=size / 2)
    shares[40:] = 1 - behind / cumulative[40:, -1:]
    expected = torch.searchsorted(cumulative, shares * cumulative[:, -1:], right=True)
    assert torch.equal(inverse(weights, shares), expected.clamp(max=size - 1))
