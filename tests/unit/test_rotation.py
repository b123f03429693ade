"""The engine's turn to rotary positions is the one that it replaces, in values and gradients."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Phi3Config,
    Phi3ForCausalLM,
)
from transformers.models.cohere.modeling_cohere import CohereAttention
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTAttention
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import Phi3Attention

from bridge_engine.forward.light import lighten
from bridge_engine.forward.logprobs import completion_logprobs
from bridge_engine.forward.rotation import turn
from bridge_engine.forward.sequences import TokenSequence, pad
from tests.support.families import FAMILIES, save

CPU = torch.device("cpu")


def drawn(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("dim", [1, 2], ids=["heads first", "tokens first"])
def test_values_and_gradients_are_those_of_transformers(dim):
    """Of any cosine and sine: not only where both halves of a head have the same."""
    cos, sin = drawn(2, 5, 8, seed=1), drawn(2, 5, 8, seed=2)
    found = []
    for function in (turn, apply_rotary_pos_emb):
        q, k = drawn(2, 3, 5, 8), drawn(2, 1, 5, 8, seed=3)
        if dim == 2:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
        turned = function(q, k, cos, sin, unsqueeze_dim=dim)
        sum((y * drawn(*y.shape, seed=4)).sum() for y in turned).backward()
        found.append([*turned, q.grad, k.grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_light_model_says_and_learns_the_same(family, tmp_path):
    group = [TokenSequence([2, 3, 4], [5, 6, 7]), TokenSequence([4], [8, 9])]
    save(family, tmp_path)
    found = []
    for light in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
        if light:
            lighten(model)
            assert type(model.model.layers[0].self_attn).__mro__[1].__name__.endswith("Attention")
        logprobs_BT, _ = completion_logprobs(model, pad(group, pad_id=0, device=CPU))
        logprobs_BT.sum().backward()
        found.append([logprobs_BT.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # norms compute in float32


def test_a_model_that_turns_a_part_of_each_head_says_the_same():
    sizes = {"vocab_size": 30, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    config = Phi3Config(**sizes, num_attention_heads=2, pad_token_id=0, rope_parameters=rope)
    torch.manual_seed(0)
    model = Phi3ForCausalLM(config).double().eval()
    tokens = torch.tensor([[2, 3, 4, 5]])
    expected = model(tokens).logits
    lighten(model)
    assert type(model.model.layers[0].self_attn) is not Phi3Attention
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-6)


def test_a_model_that_turns_a_part_of_its_tokens_says_the_same():
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 2}
    picture = {"image_size": 16, "patch_size": 4, "num_register_tokens": 1}
    torch.manual_seed(0)
    model = DINOv3ViTModel(DINOv3ViTConfig(**sizes, **picture, num_hidden_layers=1)).eval()
    pixels = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    expected = model(pixels).last_hidden_state
    lighten(model)
    assert any(type(m).__mro__[1] is DINOv3ViTAttention for m in model.modules())
    torch.testing.assert_close(model(pixels).last_hidden_state, expected)


def test_what_turns_neighbours_is_left_as_it_is():
    attention = CohereAttention.__new__(CohereAttention)
    torch.nn.Module.__init__(attention)
    lighten(attention)
    assert type(attention) is CohereAttention


def test_the_class_itself_is_not_changed():
    forward = LlamaAttention.forward
    attention = LlamaAttention.__new__(LlamaAttention)
    torch.nn.Module.__init__(attention)
    lighten(attention)
    assert type(attention) is not LlamaAttention
    assert isinstance(attention, LlamaAttention)
    assert LlamaAttention.forward is forward
    assert LlamaAttention.forward.__globals__["apply_rotary_pos_emb"] is apply_rotary_pos_emb
