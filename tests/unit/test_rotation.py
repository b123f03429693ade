"""The engine's turn to rotary positions is the one that it replaces, in values and gradients."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    OlmoConfig,
    OlmoForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)
from transformers.models.cohere.modeling_cohere import CohereAttention
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTAttention
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextAttention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as theirs
from transformers.models.olmo.modeling_olmo import OlmoAttention
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
    for function in (turn, theirs):
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


@pytest.mark.parametrize("kind", [CohereAttention, Gemma3nTextAttention], ids=["neighbours", "one"])
def test_what_turns_neighbours_or_one_at_a_time_is_left_as_it_is(kind):
    attention = kind.__new__(kind)
    torch.nn.Module.__init__(attention)
    lighten(attention)
    assert type(attention) is kind


def test_a_model_that_turns_in_another_dtype_says_the_same():
    """Olmo's cosines are float32 in a model of bfloat16; what they turn comes back as it was."""
    sizes = {"vocab_size": 30, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = OlmoForCausalLM(OlmoConfig(**sizes, num_attention_heads=2, pad_token_id=0)).bfloat16()
    tokens = torch.tensor([[2, 3, 4, 5]])
    expected = model(tokens).logits
    lighten(model)
    assert type(model.model.layers[0].self_attn) is not OlmoAttention
    assert torch.equal(model(tokens).logits, expected)


def apply_rotary_pos_emb(q, k, cos, sin, position_ids=None):
    """Of models that say which of the positions they mean."""
    if position_ids is not None:
        cos, sin = cos[:, position_ids], sin[:, position_ids]
    return theirs(q, k, cos, sin)


class AskingAttention(torch.nn.Module):
    def forward(self, q, k, cos, sin, *, order=(2, 0, 1)):
        return apply_rotary_pos_emb(q, k, cos, sin, torch.tensor(order))


class EnclosedAttention(torch.nn.Module):
    def forward(self, q, k, cos, sin):
        assert __class__ is EnclosedAttention
        return apply_rotary_pos_emb(q, k, cos, sin)


@pytest.mark.parametrize("kind", [AskingAttention, EnclosedAttention])
def test_attention_that_asks_for_more_or_knows_its_class_says_the_same(kind):
    given = drawn(1, 2, 3, 8), drawn(1, 1, 3, 8), drawn(1, 3, 8, seed=1), drawn(1, 3, 8, seed=2)
    attention = kind()
    expected = attention(*given)
    lighten(attention)
    assert (type(attention) is kind) == (kind is EnclosedAttention)
    for one, other in zip(attention(*given), expected, strict=True):
        assert torch.equal(one, other)


def test_the_class_itself_is_not_changed():
    forward = LlamaAttention.forward
    attention = LlamaAttention.__new__(LlamaAttention)
    torch.nn.Module.__init__(attention)
    lighten(attention)
    assert type(attention) is not LlamaAttention
    assert isinstance(attention, LlamaAttention)
    assert LlamaAttention.forward is forward
    assert LlamaAttention.forward.__globals__["apply_rotary_pos_emb"] is theirs
    assert type(attention).__module__ == LlamaAttention.__module__
