"""The one forward pass of training: in pieces, packed, with activations computed twice, it is the
same; each against the model's own logits, one sequence at a time."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3Config

from bridge_engine import loading
from bridge_engine import logprobs as page
from bridge_engine.errors import EngineError
from bridge_engine.loading import load_pretrained
from bridge_engine.logprobs import completion_logprobs, token_logprobs
from bridge_engine.methods import make_method
from bridge_engine.sequences import TokenSequence, micro_batches, pad
from bridge_engine.spec import RuntimeSpec
from bridge_engine.token_objectives import TokenObjectives
from tests.support.tiny import (
    PAD,
    VOCABULARY,
    random_groups,
    random_model,
    random_policy,
    random_sequences,
    tiny_spec,
)

SEQUENCES = [*random_sequences(5, seed=2), TokenSequence([3], [4]), TokenSequence([5], [6, 7, 1])]
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
FAMILIES = {
    "qwen2": lambda: random_model(),
    "llama": lambda: AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)),
    "qwen3": lambda: AutoModelForCausalLM.from_config(Qwen3Config(**SHAPE, head_dim=8)),
    "gemma2": lambda: AutoModelForCausalLM.from_config(
        Gemma2Config(**SHAPE, head_dim=8, sliding_window=4, attn_implementation="eager")
    ),
}


def family(name):
    torch.manual_seed(1)
    return FAMILIES[name]().double().eval()


def by_itself(model, sequence):
    """(log π of the completion's tokens, entropies): the model's own logits of one sequence."""
    logits = model(torch.tensor([sequence.prompt + sequence.completion])).logits[0]
    rows = torch.log_softmax(logits[len(sequence.prompt) - 1 : -1], -1)
    found = rows[torch.arange(len(sequence.completion)), torch.tensor(sequence.completion)]
    return found, torch.distributions.Categorical(logits=rows).entropy()


def batch_of(sequences, packed):
    return pad(sequences, pad_id=PAD, device=torch.device("cpu"), packed=packed)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_is_each_sequence_by_itself_values_and_gradients(name, packed):
    model = family(name)
    batch = batch_of(SEQUENCES, packed)
    logprobs_BT, entropy_BT = completion_logprobs(model, batch)
    weights_BT = torch.randn(logprobs_BT.shape, generator=torch.Generator().manual_seed(0)).double()
    parameters = list(model.parameters())
    actual = torch.autograd.grad((weights_BT * logprobs_BT).sum(), parameters)

    total = 0.0
    for row, sequence in enumerate(SEQUENCES):
        expected, entropy = by_itself(model, sequence)
        n = len(expected)
        torch.testing.assert_close(logprobs_BT[row, :n], expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(entropy_BT[row, :n], entropy, atol=1e-6, rtol=1e-6)
        assert not logprobs_BT[row, n:].any()
        total = total + (weights_BT[row, :n] * expected).sum()
    for one, other in zip(actual, torch.autograd.grad(total, parameters), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert not entropy_BT.requires_grad


def test_packed_sequences_never_see_one_another():
    model = random_model()
    first, second = SEQUENCES[0], SEQUENCES[1]
    other = TokenSequence([9, 9, 9], [8, 8, 1])
    with torch.no_grad():
        one, _ = completion_logprobs(model, batch_of([first, second], packed=True))
        two, _ = completion_logprobs(model, batch_of([other, second], packed=True))
    n = len(second.completion)
    torch.testing.assert_close(one[1, :n], two[1, :n], atol=1e-7, rtol=0)
    assert batch_of([first, second], packed=True).tokens_BL.shape == (1, len(first) + len(second))


@pytest.mark.parametrize("kl_coef", [0.0, 0.2])
@pytest.mark.parametrize("micro_batch", [1, 3, 64])
def test_padding_free_gives_the_same_update(micro_batch, kl_coef):
    found = []
    for packed in (False, True):
        policy = random_policy("student")
        spec = tiny_spec(
            "mix", rl={"kl_coef": kl_coef}, micro_batch=micro_batch, padding_free=packed
        )
        objectives = TokenObjectives(
            policy,
            make_method(spec.method),
            spec,
            demos=random_sequences(5, seed=3),
            groups=random_groups(2, 4, seed=4),
        )
        found.append(objectives.gradient("student", sft=0.5, rl=0.5).theta.tensors)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


# --------------------------------------------------------------------------- in pieces


def test_logits_in_pieces_give_the_same_values_and_gradients():
    model = random_model()
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 16, generator=rng, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (11,), generator=rng)
    weights = torch.randn(11, generator=rng, dtype=torch.float64)
    results = []
    for at_once in (10_000, 4 * VOCABULARY, 1):
        leaf = hidden.clone().requires_grad_()
        logprobs, entropy = token_logprobs(model, leaf, targets, at_once)
        head = model.get_output_embeddings().weight
        results.append(
            (logprobs, entropy, *torch.autograd.grad((weights * logprobs).sum(), [leaf, head]))
        )
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-12)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Watches every tensor that is made, and keeps the size of the largest."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_all_logits_never_exist_at_once_neither_forward_nor_backward(monkeypatch):
    model, tokens = random_model(), 160
    monkeypatch.setattr(page, "LOGITS_AT_ONCE", 16 * VOCABULARY)
    hidden = torch.randn(tokens, 16, dtype=torch.float64, requires_grad=True)
    with Largest() as seen:
        logprobs, _ = token_logprobs(model, hidden, torch.arange(tokens) % VOCABULARY)
        logprobs.sum().backward()
    assert seen.numel == hidden.numel() < tokens * VOCABULARY


# --------------------------------------------------------------------------- checkpointing


def checkpointed(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def test_gradient_checkpointing_gives_the_same_gradient_from_activations_computed_twice():
    found, calls = [], []
    for enable in (False, True):
        model = random_model()
        if enable:
            checkpointed(model)
        calls.append(0)

        def count(*_):
            calls[-1] += 1

        model.model.layers[0].mlp.register_forward_pre_hook(count)
        logprobs_BT, _ = completion_logprobs(model, batch_of(SEQUENCES, packed=False))
        found.append(torch.autograd.grad(logprobs_BT.sum(), list(model.parameters())))
        assert not model.training
    assert calls == [1, 2]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_gradient_checkpointing_keeps_less_than_half_of_the_activations():
    kept = []
    for enable in (False, True):
        model = checkpointed(random_model()) if enable else random_model()
        sizes = {}

        def note(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        batch = batch_of(random_sequences(16, seed=5), packed=False)
        with saved_tensors_hooks(note, lambda tensor: tensor):
            logprobs_BT, _ = completion_logprobs(model, batch)
        weights = {p.data_ptr() for p in model.parameters()}
        kept.append(sum(size for place, size in sizes.items() if place not in weights))
        logprobs_BT.sum().backward()
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("packed", [False, True])
def test_checkpointing_and_a_teacher_in_use_give_the_plain_step(packed):
    found = []
    for enable in (False, True):
        policy = random_policy("student", "teacher", "shadow")
        if enable:
            checkpointed(policy.model)
        spec = tiny_spec("bridge", padding_free=packed)
        objectives = TokenObjectives(
            policy,
            make_method(spec.method),
            spec,
            demos=random_sequences(5, seed=3),
            groups=random_groups(2, 4, seed=4),
        )
        joint = objectives.gradient("shadow", sft=0.5, rl=0.5)
        found.append([*joint.theta.tensors, *joint.w.tensors])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


# --------------------------------------------------------------------------- loading


def test_a_model_is_loaded_without_dropout_and_checkpoints_where_it_is_asked_to(
    tmp_path, monkeypatch
):
    model = random_model(torch.float32)
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).attention_dropout == 0.5
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", lambda *_, **__: None)
    runtime = RuntimeSpec(gradient_checkpointing=True, attention="eager")
    loaded, _ = load_pretrained(tmp_path, torch.float32, torch.device("cpu"), runtime)
    assert loaded.config.attention_dropout == 0
    assert loaded.model.layers[0].self_attn.attention_dropout == 0
    assert loaded.is_gradient_checkpointing
    assert loaded.config._attn_implementation == "eager"


def test_flash_attention_without_a_gpu_is_refused_with_what_to_do(tmp_path):
    runtime = RuntimeSpec(attention="flash_attention_2")
    with pytest.raises(EngineError, match="use auto or sdpa") as refusal:
        load_pretrained(tmp_path, torch.float32, torch.device("cpu"), runtime)
    assert refusal.value.param == "runtime.attention"


def test_micro_batches_hold_every_sequence_once_and_no_more_than_their_size():
    for packed in (False, True):
        batches = list(
            micro_batches(SEQUENCES, 3, pad_id=PAD, device=torch.device("cpu"), packed=packed)
        )
        assert [len(b.mask_BT) for b in batches] == [3, 3, 1]
        assert sum(int(b.mask_BT.sum()) for b in batches) == sum(
            len(s.completion) for s in SEQUENCES
        )
