"""A tiny random model with adapters that already do something, for tests of the mathematics."""

import statistics
from dataclasses import replace
from types import SimpleNamespace

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from bridge_engine.forward.sequences import TokenSequence
from bridge_engine.groups import RolloutGroup
from bridge_engine.policy import Policy
from bridge_engine.spec.train import LoraSpec, StudentSpec, TrainSpec

VOCABULARY = 23
EOS, PAD = 1, 0


def random_model(dtype=torch.float64, seed=0):
    """A two-layer Qwen2 with random weights large enough to make its predictions uneven."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,
        tie_word_embeddings=True,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return Qwen2ForCausalLM(config).to(dtype).eval()


def random_policy(*names, dtype=torch.float64, seed=0, rank=3, trained=True):
    """A policy with these adapters; `trained` gives every B random values too."""
    tokenizer = SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD, chat_template=None)
    policy = Policy(random_model(dtype, seed), tokenizer, LoraSpec(rank=rank, alpha=6.0))
    for name in names:
        policy.adapters.add(name, seed)
    policy.model.to(dtype)
    if trained:
        rng = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for name in names:
                for parameter in policy.adapters.parameters(name):
                    noise = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
                    parameter.add_(0.1 * noise.to(dtype))
    return policy


def full_policy(*names, dtype=torch.float64, seed=0, rank=3, student=None, device=None, **more):
    """A policy whose student is the base's own weights, with a teacher that does something."""
    tokenizer = SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD, chat_template=None)
    model = random_model(dtype, seed).to(device or "cpu")
    student = student or StudentSpec(form="full")
    policy = Policy(model, tokenizer, LoraSpec(rank=rank, alpha=6.0), student, **more)
    for name in names:
        policy.add(name, seed)
    rng = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in policy.parameters("teacher") if "teacher" in names else ():
            noise = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
            parameter.data = (parameter.data + 0.1 * noise.to(parameter.device)).to(dtype)
    return policy


def random_sequences(count, *, seed=0, with_rollout=False, longest=9):
    """Prompts and completions of uneven lengths; rollouts get the log-probs they came with."""
    rng = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=rng))

    sequences = []
    for _ in range(count):
        prompt = [draw(2, VOCABULARY) for _ in range(draw(1, 6))]
        completion = [draw(2, VOCABULARY) for _ in range(draw(1, longest))] + [EOS]
        behaviour = None
        if with_rollout:
            behaviour = (-0.5 - 4 * torch.rand(len(completion), generator=rng)).tolist()
        sequences.append(TokenSequence(prompt, completion, behaviour))
    return sequences


def random_groups(count=2, size=4, *, seed=0, rewards=None, demos=False):
    """Groups of rollouts with rewards that all differ, so that every advantage counts; `demos`
    pairs group i with demonstration i."""
    rng = torch.Generator().manual_seed(seed + 1000)
    sequences = random_sequences(count * size, seed=seed, with_rollout=True)
    groups = []
    for i in range(count):
        given = rewards[i] if rewards else torch.rand(size, generator=rng).tolist()
        mine = sequences[i * size : (i + 1) * size]
        groups.append(RolloutGroup(mine, given, [False] * size, i if demos else None))
    return groups


def with_advantages(groups, divide=True):
    """The rollouts with (r − mean) / (std + 1e-4), or r − mean, by Python's own statistics."""
    found = []
    for group in groups:
        mean = statistics.mean(group.rewards)
        scale = statistics.stdev(group.rewards) + 1e-4 if divide else 1.0
        for sequence, reward in zip(group.rollouts, group.rewards, strict=True):
            found.append(replace(sequence, advantage=(reward - mean) / scale))
    return found


def tiny_spec(options="rl", *, rl=None, **runtime):
    """A spec for objectives on the tiny model; the names of its data are never looked up."""
    return TrainSpec.model_validate(
        {
            "method": options if isinstance(options, str) else options.model_dump(by_alias=True),
            "data": {"prompts": "arithmetic", "demos": "arithmetic"},
            "rl": rl or {},
            "runtime": runtime,
        }
    )
