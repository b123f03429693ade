"""Lean decoding says what a model's own modules say, and takes no model that it does not know."""

import pytest
import torch
import transformers as tf

from bridge_engine.forward import products
from bridge_engine.forward.adapters import AdaptedModel
from bridge_engine.forward.products import linear
from bridge_engine.rollout import lean
from bridge_engine.rollout.decoding import ModuleDecoder, Prompts
from bridge_engine.spec.train import LoraSpec

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
KNOWN = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "llama": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-one-key-head": ("Llama", {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}
UNKNOWN = {
    "another activation": ("Llama", {"hidden_act": "gelu"}),
    "positions that depend on the length": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "a sliding window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "another attention": ("Llama", {"attn_implementation": "eager"}),
    "another family": ("Mistral", {"sliding_window": None}),
}


def model_of(family, changes):
    torch.manual_seed(0)
    config = getattr(tf, f"{family}Config")(**{**SIZES, **changes})
    model = getattr(tf, f"{family}ForCausalLM")._from_config(config).eval()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # norms of 1 and biases of 0 would prove little
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    return model


def adapted(model):
    made = AdaptedModel(model, LoraSpec(rank=4, alpha=8.0))
    rng = torch.Generator().manual_seed(2)
    for name in ("student", "teacher"):
        made.add(name, seed=0)
        with torch.no_grad():
            for parameter in made.parameters(name):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
    return made


@torch.no_grad()
def written(decoder):
    """Logits of a batch as a sampler goes through it: uneven prompts, rows that end."""
    prompts = Prompts.of([[5, 6, 7, 8, 9], [10], [11, 12]], pad_id=0, device=torch.device("cpu"))
    logits = [decoder.start(prompts, torch.tensor([0, 0, 1, 2, 2]), 12)]
    rng = torch.Generator().manual_seed(3)
    rows = 5
    for step in range(12):
        if step in (4, 8):
            rows -= 2
            decoder.keep(torch.arange(rows) + 1)
        logits.append(decoder.step(torch.randint(300, (rows,), generator=rng)))
    return logits


@pytest.mark.parametrize("kind", KNOWN)
def test_lean_logits_are_the_modules(kind):
    model = model_of(*KNOWN[kind])
    made = adapted(model)
    with made.using("student", "teacher", merged=True):
        decoder = lean.decoder(model)
        assert isinstance(decoder, lean.LeanDecoder)
        ours, theirs = written(decoder), written(ModuleDecoder(model))
    bare = written(ModuleDecoder(model))
    for one, other, without in zip(ours, theirs, bare, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
        assert (without - other).norm() > 0.1 * other.norm(), "adapters that do nothing"


@pytest.mark.parametrize("kind", KNOWN)
def test_in_bfloat16_lean_logits_are_as_near_the_exact_ones_as_the_modules(kind):
    exact = torch.cat(written(ModuleDecoder(model_of(*KNOWN[kind]).bfloat16().float())))
    model = model_of(*KNOWN[kind]).bfloat16()
    decoder = lean.decoder(model)
    assert isinstance(decoder, lean.LeanDecoder)
    ours, theirs = (torch.cat(written(d)) for d in (decoder, ModuleDecoder(model)))
    assert (ours - exact).norm() <= 1.25 * (theirs - exact).norm()


@pytest.mark.parametrize("kind", KNOWN)
def test_under_autocast_lean_logits_are_as_near_the_exact_ones_as_the_modules(kind):
    """As a full student of float32 weights is sampled that computes in bfloat16."""
    model = model_of(*KNOWN[kind])
    made = adapted(model)
    with made.using("teacher", merged=True):
        exact = torch.cat(written(ModuleDecoder(model)))
    using = made.using("teacher", merged=True, dtype=torch.bfloat16)
    with using, torch.autocast("cpu", torch.bfloat16):
        decoder = lean.decoder(model)
        assert isinstance(decoder, lean.LeanDecoder)
        ours, theirs = (torch.cat(written(d)) for d in (decoder, ModuleDecoder(model)))
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert 0 < (ours - exact).norm() <= 1.25 * (theirs - exact).norm()


@pytest.mark.parametrize("why", UNKNOWN)
def test_what_lean_decoding_does_not_know_is_left_to_the_modules(why):
    model = model_of(*UNKNOWN[why])
    assert isinstance(lean.decoder(model), ModuleDecoder)


def test_adapters_beside_their_base_are_left_to_the_modules():
    model = model_of(*KNOWN["llama"])
    made = adapted(model)
    with made.using("student"):
        assert isinstance(lean.decoder(model), ModuleDecoder)
    assert isinstance(lean.decoder(model), lean.LeanDecoder)


@pytest.mark.parametrize("times", [2.0, 1.02])
def test_a_model_that_computes_something_else_gives_itself_away(times):
    model = model_of(*KNOWN["llama"])
    norm = model.model.layers[1].post_attention_layernorm
    norm.register_forward_hook(lambda module, given, found: times * found)
    assert isinstance(lean.decoder(model), ModuleDecoder)


# --------------------------------------------------------------------------- linear layers


def parts(dtype, rank=3):
    rng = torch.Generator().manual_seed(4)
    shapes = {"x": (2, 5, 6), "weight": (7, 6), "bias": (7,), "a": (rank, 6), "b": (7, rank)}
    made = {k: torch.randn(s, generator=rng, dtype=torch.float64) for k, s in shapes.items()}
    return {k: v.to(dtype).requires_grad_() for k, v in made.items()}


def plainly(x, weight, bias, a, b):
    return x @ weight.t() + bias + 0.7 * (x @ a.t() @ b.t())


@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("a", "b"), ("x",)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_with_an_adapter_and_its_gradients_are_those_of_the_plain_formula(dtype, frozen):
    values, gradients = [], []
    for compute in (
        lambda x, weight, bias, a, b: linear(x, weight, bias, (a, b), 0.7),
        plainly,
    ):
        given = parts(dtype)
        for name in frozen:
            given[name].requires_grad_(False)
        y = compute(**given)
        (y * torch.arange(70.0, dtype=dtype).view_as(y).cos()).sum().backward()
        values.append(y.detach())
        gradients.append({name: tensor.grad for name, tensor in given.items()})
    torch.testing.assert_close(*values)
    for name in gradients[0]:
        if name in frozen:
            assert gradients[0][name] is None
        else:
            torch.testing.assert_close(gradients[0][name], gradients[1][name])


def test_under_autocast_a_layer_computes_in_its_dtype():
    given = {name: tensor.detach() for name, tensor in parts(torch.float32).items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(given["x"], given["weight"], given["bias"], (given["a"], given["b"]), 0.7)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), plainly(**given), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("intels", [True, False], ids=["Intel's", "another's"])
@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
@pytest.mark.parametrize("few", [True, False], ids=["small", "large"])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)], ids=["rows", "sequences"])
def test_products_of_packed_weights_are_the_plain_ones_on_every_processor(
    intels, capability, few, shape, monkeypatch
):
    monkeypatch.setattr(products, "_is_intels", lambda: intels)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    if not few:
        monkeypatch.setattr(products, "FEW_WEIGHTS", 0)
        monkeypatch.setattr(products, "FEW_FOR_INTEL", 0)
    rng = torch.Generator().manual_seed(0)
    x, *weights = (torch.randn(s, generator=rng) for s in (shape, (6, 8), (3, 8)))
    for biases in ([torch.ones(6), None], [None, None]):
        found = products.pack(weights, biases)(x)
        expected = [
            torch.nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)
        ]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
    (one,) = products.pack(weights[:1], [None])(x)
    torch.testing.assert_close(one, torch.nn.functional.linear(x, weights[0]))
