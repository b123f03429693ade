"""The engine's RMSNorm is the one that it replaces, in values, gradients and rounding."""

import copy

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from bridge_engine.forward.light import lighten
from bridge_engine.forward.norms import rms_norm
from tests.support.tiny import random_model, random_policy


def drawn(*shape, seed=0, **options):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64).to(**options)


@pytest.mark.parametrize("frozen", [False, True])
def test_values_and_gradients_are_those_of_torchs_norm(frozen):
    found = []
    for norm in (rms_norm, lambda x, w, eps: torch.nn.functional.rms_norm(x, w.shape, w, eps)):
        x = drawn(2, 3, 5).requires_grad_()
        weight = drawn(5, seed=1).requires_grad_(not frozen)
        y = norm(x, weight, 1e-2)
        y.backward(drawn(2, 3, 5, seed=2))
        found.append([y.detach(), x.grad, weight.grad if not frozen else x.grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_the_gradient_is_that_of_finite_differences():
    x, weight = drawn(4, 6).requires_grad_(), drawn(6, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 0.1), (x, weight))


def test_a_row_of_zeros_has_a_value_and_a_gradient():
    x = torch.zeros(2, 8, requires_grad=True)
    y = rms_norm(x, torch.ones(8), 1e-6)
    y.backward(torch.ones(2, 8))
    assert (y == 0).all()
    torch.testing.assert_close(x.grad, torch.full((2, 8), 1e3))  # 1 / √epsilon


def test_without_gradients_it_says_the_same():
    x, weight = drawn(3, 8, dtype=torch.float32), drawn(8, seed=1, dtype=torch.float32)
    with torch.no_grad():
        expected = rms_norm(x, weight, 1e-6)
    assert torch.equal(rms_norm(x, weight.requires_grad_(), 1e-6), expected)


def test_it_computes_where_its_input_is_whatever_new_tensors_are_made_on():
    x, weight = drawn(3, 8), drawn(8, seed=1)
    with torch.device("meta"):
        found = rms_norm(x, weight, 0.3)  # an epsilon that no other test has
    assert torch.equal(found, rms_norm(x, weight, 0.3))


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_models_norm_rounds_as_it_did(kind, dtype):
    norm = kind(32).to(dtype)
    norm.weight.data = drawn(32, seed=1, dtype=dtype)
    x = drawn(64, 32, dtype=dtype)
    before, g = norm(x), drawn(64, 32, seed=2, dtype=dtype)
    norm(x.requires_grad_()).backward(g)
    slope, x.grad = x.grad, None
    lighten(norm)
    assert type(norm) is not kind
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-2}
    torch.testing.assert_close(norm(x), before, **close)
    if dtype == torch.bfloat16:
        assert (norm(x) == before).float().mean() > 0.95, "rounded elsewhere on the way"
    norm(x).backward(g)
    torch.testing.assert_close(x.grad, slope, **close)


def test_a_norm_of_another_formula_is_left_as_it_is():
    norm = GemmaRMSNorm(8)  # multiplies with 1 + weight
    norm.variance_epsilon = norm.eps
    norm.weight.data.fill_(0.5)
    lighten(norm)
    assert type(norm) is GemmaRMSNorm


class BiasedRMSNorm(LlamaRMSNorm):
    def __init__(self, size):
        super().__init__(size)
        self.bias = torch.nn.Parameter(torch.zeros(size))

    def forward(self, hidden_states):
        return super().forward(hidden_states) + self.bias


def test_a_norm_with_more_to_learn_is_left_as_it_is():
    """Also where it says the same as yet."""
    norm = BiasedRMSNorm(8)
    lighten(norm)
    assert type(norm) is BiasedRMSNorm


def test_a_norm_that_rounds_elsewhere_is_left_where_that_shows():
    for dtype in (torch.bfloat16, torch.float32):
        norm = Olmo2RMSNorm(64).to(dtype)  # rounds behind its weight
        norm.weight.data = drawn(64, seed=1, dtype=dtype)
        lighten(norm)
        assert (type(norm) is Olmo2RMSNorm) == (dtype == torch.bfloat16)


def test_a_policys_norms_are_light_and_a_copy_has_its_own_weights():
    policy = random_policy("student")
    norm = policy.model.model.norm
    assert type(norm).__mro__[1] is Qwen2RMSNorm
    x = drawn(2, 16)
    expected = norm(x)
    twin = copy.deepcopy(policy.model)
    twin.model.norm.weight.data.mul_(2)
    torch.testing.assert_close(twin.model.norm(x), 2 * expected)
    assert torch.equal(norm(x), expected)


def test_a_light_model_is_saved_as_the_model_it_is(tmp_path):
    model = random_model(torch.float32)
    lighten(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    tokens = torch.tensor([[2, 3, 4]])
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)
