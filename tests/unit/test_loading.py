"""A model is loaded as the spec's runtime asks, and computes the same however that is."""

import pytest
import torch
import transformers as tf

from bridge_engine.errors import EngineError
from bridge_engine.forward.logprobs import completion_logprobs
from bridge_engine.models.loading import load_pretrained
from bridge_engine.spec.train import RuntimeSpec
from tests.support import families
from tests.unit.test_logprobs import CPU, UNEVEN, family, pad_all


def load(folder, **runtime):
    return load_pretrained(folder, torch.float32, CPU, RuntimeSpec(**runtime))[0]


@pytest.fixture
def folder(tmp_path):
    return families.save("qwen2", tmp_path)


def test_runtime_fields_change_how_and_never_what_is_computed(folder):
    batch = pad_all(UNEVEN)
    expected, _ = completion_logprobs(load(folder), batch)
    for runtime in (
        {"attention": "eager"},
        {"attention": "sdpa"},
        {"gradient_checkpointing": True},
        {"padding_free": True},
    ):
        values_BT, _ = completion_logprobs(load(folder, **runtime), batch)
        torch.testing.assert_close(values_BT, expected, atol=1e-5, rtol=1e-5)
    assert load(folder).config._attn_implementation == "sdpa"
    assert load(folder, attention="eager").config._attn_implementation == "eager"


def test_dropout_is_off_whatever_the_folder_says_and_however_it_is_trained(folder):
    config = tf.AutoConfig.from_pretrained(folder)
    config.attention_dropout = 0.5
    config.save_pretrained(folder)
    model = load(folder, gradient_checkpointing=True)
    assert model.config.attention_dropout == 0
    batch = pad_all(UNEVEN)
    training, _ = completion_logprobs(model, batch)
    with torch.no_grad():
        sampling, _ = completion_logprobs(model, batch)
    assert training.requires_grad
    torch.testing.assert_close(training.detach(), sampling, atol=1e-5, rtol=1e-5)
    model.train()  # not even then
    with torch.no_grad():
        assert torch.equal(completion_logprobs(model, batch)[0], sampling)


def test_flash_attention_without_a_gpu_is_refused_with_the_field(folder):
    with pytest.raises(EngineError, match="runs on a GPU") as caught:
        load(folder, attention="flash_attention_2")
    assert caught.value.param == "runtime.attention"


def test_flash_attention_without_its_package_is_refused_with_the_field(folder, monkeypatch):
    monkeypatch.setattr("bridge_engine.models.loading.find_spec", lambda name: None)
    with pytest.raises(EngineError, match="pip install flash-attn") as caught:
        load_pretrained(
            folder,
            torch.bfloat16,
            torch.device("cuda"),
            RuntimeSpec(attention="flash_attention_2"),
        )
    assert caught.value.param == "runtime.attention"


def test_a_cap_on_attention_scores_is_never_left_out(tmp_path, folder):
    model = family("Gemma2", "eager", torch.float32, attn_logit_softcapping=0.5)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    batch = pad_all(UNEVEN)
    expected, _ = completion_logprobs(model, batch)
    torch.testing.assert_close(
        completion_logprobs(loaded, batch)[0], expected, atol=1e-5, rtol=1e-5
    )
    with pytest.raises(EngineError, match="cap") as caught:
        load(tmp_path, attention="sdpa")
    assert caught.value.param == "runtime.attention"
