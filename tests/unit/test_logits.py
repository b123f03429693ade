"""Our logits are those of the model's own forward pass, whatever its family does to them."""

import pytest
import torch
import transformers as tf

from bridge_engine.errors import EngineError
from bridge_engine.forward.logits import check, head_logits
from bridge_engine.rollout import SamplingParams, sample

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 2,
}
FAMILIES = {
    "Qwen2": {},
    "Qwen3": {"head_dim": 4},
    "Llama": {},
    "Mistral": {"sliding_window": 4},
    "Gemma2": {"head_dim": 4, "final_logit_softcapping": 3.0, "sliding_window": 4},
    "Granite": {"logits_scaling": 3.0},
    "Cohere": {"logit_scale": 0.25},
}


def tiny(family):
    torch.manual_seed(0)
    config = getattr(tf, f"{family}Config")(**{**SIZES, **FAMILIES[family]})
    return getattr(tf, f"{family}ForCausalLM")(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_head_logits_are_the_models_own(family):
    model = tiny(family)
    check(model)
    tokens = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = model.base_model(tokens, use_cache=False).last_hidden_state
        expected = model(tokens, use_cache=False).logits
    torch.testing.assert_close(head_logits(model, hidden), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sampler_draws_what_the_models_own_forward_says(family):
    model = tiny(family)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13]]
    drawn = sample(
        model,
        prompts,
        SamplingParams(10),
        eos_ids=[1],
        pad_id=0,
        generator=torch.Generator().manual_seed(2),
        repeats=3,
        batch_size=4,  # a prompt's group is split over batches
    )
    for index, completion in enumerate(drawn):
        prompt = prompts[index // 3]
        tokens = torch.tensor([prompt + completion.tokens])
        with torch.no_grad():
            rows = model(tokens, use_cache=False).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        expected = rows[torch.arange(len(completion.tokens)), torch.tensor(completion.tokens)]
        torch.testing.assert_close(
            torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=1e-4
        )


def test_a_family_with_a_twist_we_do_not_know_is_refused():
    model = tiny("Qwen2")
    head = model.lm_head
    model.forward = lambda *a, original=model.forward, **k: _doubled(original(*a, **k))
    with pytest.raises(EngineError, match="logits are computed in a way"):
        check(model)
    assert model.lm_head is head


def _doubled(output):
    output.logits = output.logits * 2
    return output
