"""Log-probabilities are those of each sequence alone, however they are computed: in chunks of
tokens, packed or padded, with activations kept or computed again."""

import functools

import pytest
import torch
import transformers as tf
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bridge_engine.errors import EngineError
from bridge_engine.forward import logprobs, recomputation
from bridge_engine.forward.logprobs import completion_logprobs
from bridge_engine.forward.sequences import TokenSequence, micro_batches, pack, pad
from bridge_engine.models.loading import check_padding_free
from bridge_engine.rollout import SamplingParams, sample
from tests.support.tiny import full_policy, random_policy, random_sequences
from tests.unit.test_logits import FAMILIES, SIZES

CPU = torch.device("cpu")
VOCABULARY = SIZES["vocab_size"]
UNEVEN = [
    TokenSequence([5], [6, 7, 8, 9, 10, 11, 12, 13, 1]),
    TokenSequence([14, 15, 16, 17, 18, 19, 20, 21], [1]),
    TokenSequence([22], [1]),
    TokenSequence([5, 6, 7], [8, 9, 10, 1]),
]
"""One-token prompts and completions, and the same tokens at other places."""


@functools.cache
def family(name, attention="eager", dtype=torch.float64, **quirks):
    torch.manual_seed(0)
    config = getattr(tf, f"{name}Config")(**{**SIZES, **FAMILIES.get(name, {}), **quirks})
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.to(dtype).eval()


def pad_all(sequences):
    return pad(sequences, pad_id=0, device=CPU)


def pack_all(sequences):
    return pack(sequences, device=CPU)


def factors(sequences):
    """An uneven factor for each completion token, so that no gradient cancels."""
    rng = torch.Generator().manual_seed(7)
    longest = max(len(s.completion) for s in sequences)
    return torch.randn(len(sequences), longest, generator=rng, dtype=torch.float64)


def ours(model, batch, sequences):
    """(logprobs_BT, entropy_BT, gradients of Σ factor · log-probability)."""
    model.zero_grad()
    values_BT, entropy_BT = completion_logprobs(model, batch)
    (values_BT * factors(sequences)).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    assert not entropy_BT.requires_grad
    return values_BT.detach(), entropy_BT, gradients


def one_at_a_time(model, sequences):
    """The same from the model's own logits, a sequence at a time."""
    model.zero_grad()
    weights_BT = factors(sequences)
    values_BT, entropy_BT = torch.zeros_like(weights_BT), torch.zeros_like(weights_BT)
    for row, sequence in enumerate(sequences):
        tokens = torch.tensor([sequence.prompt + sequence.completion])
        logits = model(input_ids=tokens, use_cache=False).logits[0, len(sequence.prompt) - 1 : -1]
        distribution = torch.distributions.Categorical(logits=logits)
        found = distribution.log_prob(torch.tensor(sequence.completion))
        (found * weights_BT[row, : len(found)]).sum().backward()
        values_BT[row, : len(found)] = found.detach()
        entropy_BT[row, : len(found)] = distribution.entropy().detach()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return values_BT, entropy_BT, gradients


def assert_same(actual, expected, tolerance):
    for one, other in zip(actual[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)
    assert len(actual[2]) == len(expected[2]) > 0
    for one, other in zip(actual[2], expected[2], strict=True):
        torch.testing.assert_close(one, other, atol=10 * tolerance, rtol=10 * tolerance)


# --------------------------------------------------------------------------- chunks


def the_policy(form):
    make = {"lora": random_policy, "full": full_policy}[form]
    return make("student", "teacher")


@pytest.mark.parametrize("form", ["lora", "full"])
@pytest.mark.parametrize("tokens_at_once", [1, 3, 1000])
def test_chunks_change_neither_values_nor_entropy_nor_gradients(monkeypatch, form, tokens_at_once):
    policy = the_policy(form)
    sequences = random_sequences(6, seed=3)
    with policy.using("student", "teacher"):
        expected = one_at_a_time(policy.module, sequences)
        monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 10**9)
        whole = ours(policy.module, pad_all(sequences), sequences)
        monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", tokens_at_once * 23)
        few = ours(policy.module, pad_all(sequences), sequences)
        monkeypatch.setattr(logprobs, "KEPT_LOGITS", 0)
        chunked = ours(policy.module, pad_all(sequences), sequences)
    assert_same(few, whole, 1e-13)
    assert_same(chunked, whole, 1e-13)
    # 1e-7 because the model's own RMSNorm computes in float32, whatever the weights are
    assert_same(chunked, expected, 1e-7)
    with torch.no_grad(), policy.using("student", "teacher"):
        values_BT, entropy_BT = completion_logprobs(policy.module, pad_all(sequences))
    torch.testing.assert_close(values_BT, whole[0], atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(entropy_BT, whole[1], atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("name", ["Gemma2", "Granite", "Cohere"])
def test_chunks_go_through_all_that_a_head_does(monkeypatch, name):
    """Capped, divided and multiplied logits have gradients of their own; the head is frozen."""
    model = family(name)
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 4 * VOCABULARY)
    model.get_output_embeddings().requires_grad_(False)
    try:
        actual = ours(model, pad_all(UNEVEN), UNEVEN)
        expected = one_at_a_time(model, UNEVEN)
    finally:
        model.get_output_embeddings().requires_grad_(True)
    assert_same(actual, expected, 1e-6)


class Largest(TorchDispatchMode):
    """The most rows that any tensor over the vocabulary has, forward and backward."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.vocabulary,):
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return result


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_no_more_logits_exist_than_those_of_one_chunk(monkeypatch, head):
    vocabulary, at_once = 997, 20  # more rows than the hidden size, as the head is a tensor too
    model = family("Llama", vocab_size=vocabulary, tie_word_embeddings=False)
    model.get_output_embeddings().requires_grad_(head == "trained")
    sequences = random_sequences(20, seed=1)
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", at_once * vocabulary)
    monkeypatch.setattr(logprobs, "KEPT_LOGITS", at_once * vocabulary)
    kept = []
    batch = pad_all(sequences)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with Largest(vocabulary) as largest:
        with hooks:
            values_BT, _ = completion_logprobs(model, batch)
        values_BT.sum().backward()
    model.zero_grad()
    assert batch.mask_BT.sum() > 4 * at_once
    assert largest.rows == at_once
    outer = [t for t in kept if t.shape[-1:] == (vocabulary,) and t.shape[0] == at_once]
    # the frozen head's own passes keep theirs, one after another, within the forward
    assert head == "frozen" or not outer
    assert not any(t.shape[-1:] == (vocabulary,) and t.shape[0] > at_once for t in kept)


def test_a_sequence_whose_completion_is_empty_has_no_logprobs():
    batch = pad_all([TokenSequence([5, 6], [])])
    values_BT, entropy_BT = completion_logprobs(family("Llama"), batch)
    assert values_BT.shape == entropy_BT.shape == (1, 0)


# --------------------------------------------------------------------------- packed and padded


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Qwen2", "Llama", "Qwen3", "Mistral", "Gemma2"])
def test_packed_is_padded_is_one_sequence_at_a_time(name, attention):
    model = family(name, attention)
    expected = one_at_a_time(model, UNEVEN)
    for form in (pad_all, pack_all):
        assert_same(ours(model, form(UNEVEN), UNEVEN), expected, 1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_packed_is_padded_for_adapters_and_any_lengths(seed):
    policy = random_policy("student", "teacher", seed=seed)
    sequences = random_sequences(1 + 3 * seed, seed=seed)
    with policy.using("student", "teacher"):
        expected = one_at_a_time(policy.model, sequences)
        for form in (pad_all, pack_all):
            assert_same(ours(policy.model, form(sequences), sequences), expected, 1e-7)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_one_packed_sequence_says_changes_no_bit_of_the_others(attention):
    model = family("Qwen2", attention)
    other = [TokenSequence([30], [31, 32, 33, 34, 35, 36, 37, 38, 1]), *UNEVEN[1:]]
    with torch.no_grad():
        one, _ = completion_logprobs(model, pack_all(UNEVEN))
        two, _ = completion_logprobs(model, pack_all(other))
    assert not torch.isclose(one[0], two[0]).any()
    assert torch.equal(one[1:, :4], two[1:, :4])


def test_micro_batches_are_the_same_sequences_in_both_forms():
    sequences = random_sequences(7, seed=5)
    forms = [
        list(micro_batches(sequences, 3, pad_id=0, device=CPU, packed=packed))
        for packed in (False, True)
    ]
    assert [len(batch.mask_BT) for batch in forms[0]] == [3, 3, 1]
    for padded, packed in zip(*forms, strict=True):
        for field in ("mask_BT", "behaviour_BT", "weights_BT", "advantages_B"):
            assert torch.equal(getattr(padded, field), getattr(packed, field))
        assert packed.tokens_RL.numel() <= padded.tokens_RL.numel()
        ends = [len(s) - 1 for s in sorted(sequences, key=len)]  # nothing comes after the last
        assert packed.tokens_RL.shape[0] == 1
        assert packed.tokens_RL.numel() in (sum(ends[:3]), sum(ends[3:6]), ends[6])


def test_lengths_that_differ_much_are_passed_apart_and_no_sequence_is_lost():
    short, long = ([TokenSequence([2], [3] * n)] * 40 for n in (4, 60))
    passes = list(micro_batches(short[:20] + long[:20], 64, pad_id=0, device=CPU))
    assert [tuple(b.tokens_RL.shape) for b in passes] == [(20, 4), (20, 60)]
    few = list(micro_batches(short[:8] + long[:8], 64, pad_id=0, device=CPU))
    assert [len(b.mask_BT) for b in few] == [16], "two passes of a few cost more than padding"
    alike = list(micro_batches(short, 64, pad_id=0, device=CPU))
    assert [len(b.mask_BT) for b in alike] == [40]
    mixed = random_sequences(50, seed=7)
    passes = list(micro_batches(mixed, 32, pad_id=0, device=CPU))
    assert all(len(b.mask_BT) <= 32 for b in passes)
    assert sum(int(b.mask_BT.sum()) for b in passes) == sum(len(s.completion) for s in mixed)


def test_a_model_whose_packed_sequences_see_one_another_is_refused():
    check_padding_free(family("Qwen2"))
    # an attention that transformers makes no mask for: plain causal over the whole row
    tf.AttentionInterface.register("maskless", sdpa_attention_forward)
    with pytest.raises(EngineError, match="see one another") as caught:
        check_padding_free(family("Qwen2", "maskless"))
    assert caught.value.param == "runtime.padding_free"


# --------------------------------------------------------------------------- gradient checkpointing


def kept_bytes(model, batch):
    """(bytes kept between forward and backward, log-probabilities)."""
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        values_BT, _ = completion_logprobs(model, batch)
    return sum(kept.values()), values_BT


@pytest.mark.parametrize("form", ["lora", "full"])
def test_recomputing_activations_changes_no_bit_of_the_gradients(form):
    sequences = random_sequences(6, seed=3)
    found = []
    for again in (False, True):
        policy = the_policy(form)
        if again:
            recomputation.enable(policy.model)
        if form == "full":
            policy.add("shadow", 0)  # a copy of the model: it recomputes too
        names = ("shadow" if form == "full" else "student", "teacher")
        with policy.using(*names):
            result = ours(policy.module, pad_all(sequences), sequences)
        found.append(result)
    (values, entropy, gradients), (values2, entropy2, gradients2) = found
    assert torch.equal(values, values2)
    assert torch.equal(entropy, entropy2)
    assert len(gradients) == len(gradients2) > 0
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients2, strict=True))


def test_blocks_run_twice_when_training_and_keep_little_and_once_otherwise():
    sequences = random_sequences(12, seed=3)
    policy = random_policy("student")
    batch = pad_all(sequences)
    calls = []
    modes = [m.training for m in policy.model.modules()]
    for layer in policy.model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    with policy.using("student"):
        without, _ = kept_bytes(policy.model, batch)
        calls.clear()
        recomputation.enable(policy.model)
        within, values_BT = kept_bytes(policy.model, batch)
        assert len(calls) == 2
        values_BT.sum().backward()
        assert len(calls) == 4
        with torch.no_grad():
            completion_logprobs(policy.model, batch)
        assert len(calls) == 6
    # besides, each of the two blocks holds its input: tokens × hidden size, float64
    assert within + 2 * batch.tokens_RL.numel() * 16 * 8 < without / 2
    assert [m.training for m in policy.model.modules()] == modes


def test_sampling_is_no_different_while_recomputing_is_enabled():
    drawn = []
    for again in (False, True):
        policy = random_policy("student", dtype=torch.float32)
        if again:
            recomputation.enable(policy.model)
        with policy.using("student"):
            completions = sample(
                policy.model,
                [[5, 6, 7], [8]],
                SamplingParams(8),
                eos_ids=[1],
                pad_id=0,
                generator=torch.Generator().manual_seed(2),
                repeats=4,
            )
        drawn.append([(c.tokens, c.logprobs) for c in completions])
    assert drawn[0] == drawn[1]


def test_a_model_without_gradient_checkpointing_is_refused():
    model = family("Qwen2", hidden_size=32)
    model.supports_gradient_checkpointing = False
    with pytest.raises(EngineError, match="has no gradient checkpointing") as caught:
        recomputation.enable(model)
    assert caught.value.param == "runtime.gradient_checkpointing"
