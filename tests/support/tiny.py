"""A tiny random model with adapters that already do something, for tests of the mathematics."""

from types import SimpleNamespace

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from bridge_engine.policy import Policy
from bridge_engine.sequences import TokenSequence
from bridge_engine.spec import LoraSpec

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


def random_sequences(count, *, seed=0, with_rollout=False, longest=9):
    """Prompts and completions of uneven lengths; rollouts get log-probs and advantages."""
    rng = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=rng))

    sequences = []
    for _ in range(count):
        prompt = [draw(2, VOCABULARY) for _ in range(draw(1, 6))]
        completion = [draw(2, VOCABULARY) for _ in range(draw(1, longest))] + [EOS]
        behaviour, advantage = None, 0.0
        if with_rollout:
            noise = torch.rand(len(completion), generator=rng)
            behaviour = (-0.5 - 4 * noise).tolist()
            advantage = float(torch.randn(1, generator=rng))
        sequences.append(TokenSequence(prompt, completion, behaviour, advantage))
    return sequences
