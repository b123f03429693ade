"""Completions that share a prompt in one pass are what each is by itself, and it is done where it
saves computing."""

import copy
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bridge_engine.forward import attention, recomputation
from bridge_engine.forward.logprobs import completion_logprobs
from bridge_engine.forward.sequences import TokenSequence, micro_batches, share
from bridge_engine.forward.sharing import Sharing, sharing_of
from bridge_engine.methods import METHODS
from tests.support.tiny import full_policy, random_groups, random_policy
from tests.unit.test_logprobs import CPU, assert_same, family, one_at_a_time, ours
from tests.unit.test_updates import assert_same as assert_same_tensors
from tests.unit.test_updates import one_step

GROUPS = [
    [
        TokenSequence([5, 6, 7, 8], completion)
        for completion in ([9, 10, 11, 12, 1], [9, 10, 1], [1], [9, 13, 14])
    ],
    [TokenSequence([15], completion) for completion in ([16, 17, 1], [16, 18, 19, 20, 21, 22])],
    [TokenSequence([2, 3, 4], [22, 1])],
]
"""Completions that begin alike, that end at once, a prompt of one token, a group of one."""
FREE = Sharing(token=1.0, pair=0.0)
"""Of a model to which attention costs nothing."""


def flat(groups):
    return [sequence for group in groups for sequence in group]


def share_all(groups):
    return share(flat(groups), pad_id=0, device=CPU)


@pytest.mark.parametrize("pairs", [0, attention.FEW_PAIRS], ids=["torch's", "weights kept"])
@pytest.mark.parametrize("name", ["Qwen2", "Llama", "Qwen3"])
def test_shared_is_one_sequence_at_a_time(name, pairs, monkeypatch):
    monkeypatch.setattr(attention, "FEW_PAIRS", pairs)
    model = family(name, "sdpa")
    expected = one_at_a_time(model, flat(GROUPS))
    assert_same(ours(model, share_all(GROUPS), flat(GROUPS)), expected, 1e-6)


@pytest.mark.parametrize("pairs", [0, attention.FEW_PAIRS], ids=["torch's", "weights kept"])
def test_prompts_whose_completions_are_one_token_each_have_nothing_behind_them(pairs, monkeypatch):
    monkeypatch.setattr(attention, "FEW_PAIRS", pairs)
    sequences = [TokenSequence([5, 6, 7], [8]), TokenSequence([5, 6, 7], [9]), GROUPS[0][2]]
    model = family("Qwen2", "sdpa")
    batch = share(sequences, pad_id=0, device=CPU)
    assert batch.shared.completions == ()
    assert_same(ours(model, batch, sequences), one_at_a_time(model, sequences), 1e-6)


@pytest.mark.parametrize("make", [random_policy, full_policy])
def test_shared_is_one_sequence_at_a_time_for_a_policy(make):
    policy = make("student", "teacher")
    with policy.using("student", "teacher"):
        expected = one_at_a_time(policy.module, flat(GROUPS))
        assert_same(ours(policy.module, share_all(GROUPS), flat(GROUPS)), expected, 1e-7)


@pytest.mark.parametrize("computes", ["float32", "bfloat16", "autocast"])
def test_weights_are_kept_where_they_are_few_and_exact(computes, monkeypatch):
    if computes == "autocast":
        policy = full_policy("student", dtype=torch.float32, compute_dtype=torch.bfloat16)
    else:
        policy = random_policy("student", dtype=getattr(torch, computes))
    batch = share_all(GROUPS)
    kept = []
    few = attention._FewPairs.apply
    monkeypatch.setattr(attention._FewPairs, "apply", lambda *a: kept.append(1) or few(*a))
    with torch.no_grad(), policy.using("student"):
        policy.logprobs(batch)
        assert len(kept) == (2 if computes == "float32" else 0), "once a layer"
        pairs = sum(4 * b.tokens * b.mask_B1TL.shape[3] for b in batch.shared.blocks)
        monkeypatch.setattr(attention, "FEW_PAIRS", pairs - 1)
        kept.clear()
        policy.logprobs(batch)
        assert not kept


@pytest.mark.parametrize("depth", [2, 3], ids=["values of the keys' depth", "of another"])
def test_attention_that_keeps_its_weights_has_the_gradient_of_finite_differences(depth):
    """Two prompts of at most two tokens, one with two completions of three and one with one."""
    rng = torch.Generator().manual_seed(0)
    shapes = [(1, 4, 13, 2), (1, 2, 13, 2), (1, 2, 13, depth)]
    q, k, v = (
        torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_() for shape in shapes
    )
    mask = attention.seen_behind(torch.tensor([[2], [1], [2]]), 2, 3)
    behind = attention.Block(4, 3, mask, 3, torch.tensor([0, 1, 0]))
    shared = attention.SharedLayout.of(2, 2, [behind])

    def attended(q, k, v):
        return attention._FewPairs.apply(q, k, v, shared, 0.7)

    module = SimpleNamespace(is_causal=True, num_key_value_groups=2)
    parts = copy.deepcopy(shared)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(attention, "FEW_PAIRS", 0)
        expected, _ = attention.attend(module, q, k, v, None, shared=parts, scaling=0.7)
    torch.testing.assert_close(attended(q, k, v), expected)
    assert torch.autograd.gradcheck(attended, (q, k, v))


def test_what_one_completion_says_changes_no_bit_of_the_others():
    model = family("Qwen2", "sdpa")
    first = replace(GROUPS[0][0], completion=[17, 18, 19, 20, 21])
    other = [[first, *GROUPS[0][1:]], *GROUPS[1:]]
    with torch.no_grad():
        one, _ = completion_logprobs(model, share_all(GROUPS))
        two, _ = completion_logprobs(model, share_all(other))
    assert not torch.isclose(one[0, :5], two[0, :5]).any()
    assert torch.equal(one[1:], two[1:])


def test_completions_of_any_length_are_one_sequence_at_a_time_with_little_padding():
    rng = random.Random(1)
    prompts = [[rng.randrange(2, 22) for _ in range(n)] for n in (3, 11, 6)]
    sequences = [
        TokenSequence(prompt, [rng.randrange(2, 22) for _ in range(rng.choice((1, 3, 9, 30)))])
        for prompt in prompts
        for _ in range(16)
    ]
    rng.shuffle(sequences)
    model = family("Qwen3", "sdpa")
    batch = share(sequences, pad_id=0, device=CPU)
    assert len(batch.shared.completions) > 1
    real = sum(map(len, prompts)) + sum(len(s.completion) - 1 for s in sequences)
    assert real <= batch.tokens_RL.numel() < 1.2 * real
    assert_same(ours(model, batch, sequences), one_at_a_time(model, sequences), 1e-6)


def test_one_long_prompt_pads_no_others():
    short = [TokenSequence([i, 3], [4] * 5) for i in range(20) for _ in range(2)]
    long = [TokenSequence([5] * 500, [6] * 5) for _ in range(2)]
    found = list(micro_batches(short + long, 64, pad_id=0, device=CPU, sharing=FREE))
    assert [len(batch.mask_BT) for batch in found] == [40, 2]
    few = list(micro_batches(short[:4] + long, 64, pad_id=0, device=CPU, sharing=FREE))
    assert [len(batch.mask_BT) for batch in few] == [4, 2]
    alike = [TokenSequence([5] * n, [6] * 30) for n in range(8, 18) for _ in range(4)]
    (one,) = micro_batches(alike, 64, pad_id=0, device=CPU, sharing=FREE)
    assert len(one.mask_BT) == 40


def test_activations_computed_again_are_those_that_were_dropped():
    model = copy.deepcopy(family("Llama", "sdpa"))
    kept = ours(model, share_all(GROUPS), flat(GROUPS))
    recomputation.enable(model)
    calls = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    again = ours(model, share_all(GROUPS), flat(GROUPS))
    assert len(calls) == 2, "nothing was computed again"
    assert_same(again, kept, 0.0)


@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_every_sequence_is_in_one_micro_batch_of_at_most_the_size(size):
    sequences = [replace(s, advantage=float(i)) for i, s in enumerate(flat(GROUPS), start=1)]
    found = list(micro_batches(sequences, size, pad_id=0, device=CPU, sharing=FREE))
    assert max(len(batch.mask_BT) for batch in found) <= size
    advantages = [a for batch in found for a in batch.advantages_B.tolist()]
    assert sorted(advantages) == list(range(1, len(sequences) + 1))
    computed = sum(batch.tokens_RL.numel() for batch in found)
    alone = micro_batches(sequences, size, pad_id=0, device=CPU)
    assert size == 1 or computed < sum(batch.tokens_RL.numel() for batch in alone)


@pytest.mark.parametrize("options", [page() for page in METHODS.values()], ids=lambda o: o.name)
def test_no_methods_update_knows_of_it(options, monkeypatch):
    if "imitation" in options.optimizers:
        options = options.model_copy(update={"buffer": 1})
    groups = [
        replace(g, rollouts=[replace(s, prompt=g.rollouts[0].prompt) for s in g.rollouts])
        for g in random_groups(2, 4, seed=4, demos=True)
    ]
    alone, _ = one_step(options, options.adapters, groups=groups, share_prompts=False)
    shared = []
    monkeypatch.setattr("bridge_engine.policy.sharing_of", lambda model: FREE)
    monkeypatch.setattr(
        "bridge_engine.forward.sequences.share",
        lambda *a, **k: (shared.append(a), share(*a, **k))[1],
    )
    together, _ = one_step(options, options.adapters, groups=groups)
    assert bool(shared) == (options.turns(0, 1).rewards is not None)
    for name in options.adapters:
        assert_same_tensors(together[name], [p.detach() for p in alone[name]], tolerance=1e-8)


# --------------------------------------------------------------------------- where


def group(prompt, completion, count=8):
    return [TokenSequence([5] * prompt, [6] * completion) for _ in range(count)]


def test_it_pays_for_long_prompts_and_not_for_one_completion_or_long_ones():
    three_billion = Sharing(token=5.5e9, pair=4.0 * 2048 * 36)
    assert three_billion.pays(group(300, 200))
    assert not three_billion.pays(group(300, 200, count=1))
    assert not three_billion.pays(group(100, 3000))
    assert Sharing(token=1.5e6, pair=2048.0).pays(group(11, 32))  # bridge-tiny's own


def test_costs_are_those_of_the_model():
    model = family("Qwen2", "sdpa")
    found = sharing_of(model)
    linear = sum(
        m.weight.numel() for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)
    )
    assert found.token == pytest.approx(2 * linear, rel=0.05)  # and norms and biases


@pytest.mark.parametrize(
    ("name", "attention", "quirks"),
    [
        ("Qwen2", "eager", {}),
        ("Gemma2", "eager", {}),
        ("Mistral", "sdpa", {"sliding_window": 8}),
        (
            "Qwen2",
            "sdpa",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        ),
    ],
)
def test_another_attention_is_left_alone(name, attention, quirks):
    assert sharing_of(family(name, attention, **quirks)) is None


def test_values_of_another_depth_than_the_keys_can_share_a_prompt():
    """As where keys and values come out of one narrow product (DeepSeek)."""
    sizes = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    model = family("DeepseekV3", "sdpa", v_head_dim=8, num_key_value_heads=4, **sizes, **experts)
    assert sharing_of(model) is not None
    expected = one_at_a_time(model, flat(GROUPS))
    assert_same(ours(model, share_all(GROUPS), flat(GROUPS)), expected, 1e-6)


@pytest.mark.parametrize("deaf", ["drops the layout", "refuses it", "breaks on it"])
def test_a_model_whose_attention_is_not_told_who_belongs_to_whom_is_left_alone(deaf, monkeypatch):
    # of logits so alike that no difference would give it away
    model = family("Qwen2", "sdpa", initializer_range=1e-4)
    assert sharing_of(model) is not None
    inner = model.base_model.forward

    def forward(input_ids, position_ids, use_cache, attention_mask=None, **more):
        if more and deaf == "breaks on it":
            raise ValueError("too many values to unpack")
        assert not more or deaf == "drops the layout"
        return inner(input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask)

    def strict(input_ids, position_ids, use_cache, attention_mask=None):
        return forward(input_ids, position_ids, use_cache, attention_mask)

    monkeypatch.setattr(model.base_model, "forward", strict if deaf == "refuses it" else forward)
    assert sharing_of(model) is None


def test_of_experts_those_count_that_a_token_is_sent_to():
    sizes = {"num_local_experts": 8, "num_experts_per_tok": 2}
    model = family("Mixtral", "sdpa", torch.float32, **sizes)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    whole = sum(p.numel() for p in model.model.layers.parameters())
    assert experts > whole / 2
    assert sharing_of(model).token == pytest.approx(2 * (whole - experts * 0.75), rel=0.01)
