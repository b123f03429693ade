"""A student that is the base's own weights: the paper's form, against the float64 reference."""

import pytest
import torch
from torch.func import functional_call

from bridge_engine.forward.sequences import TokenSequence, pad
from bridge_engine.methods import make_method
from bridge_engine.methods.bridge import BridgeOptions
from bridge_engine.methods.mix import MixOptions
from bridge_engine.methods.rl import RlOptions
from bridge_engine.methods.sft import SftOptions
from bridge_engine.parameters import ParameterSet
from bridge_engine.policy import Policy
from bridge_engine.rollout import SamplingParams, sample
from bridge_engine.spec.train import StudentSpec
from bridge_engine.token_objectives import TokenObjectives
from tests.support.tiny import PAD, full_policy, random_model, random_sequences, tiny_spec
from tests.unit.test_updates import ALPHA, BETA, DEMOS, GROUPS, ROLLOUTS, SGD, assert_same

NAMES = ("student", "teacher", "shadow")


class FullReference:
    """J_SFT and J_RL of (θ + teacher's ΔW) with every weight of θ a leaf; no code of the engine."""

    def __init__(self, policy):
        self.model = random_model()
        self.scale = policy.adapters.lora.alpha / policy.adapters.lora.rank
        self.paths = list(policy.adapters.layers)
        weights = [p.detach().clone() for p in self.model.parameters()]
        self.keys = [name for name, _ in self.model.named_parameters()]
        self.leaves = {
            "student": [w.clone().requires_grad_() for w in weights],
            "shadow": [w.clone().requires_grad_() for w in weights],
        }
        if "teacher" in policy.adapters.names:
            tensors = policy.adapters.parameters("teacher")
            self.leaves["teacher"] = [t.detach().clone().requires_grad_() for t in tensors]

    def logprobs(self, sequence, base):
        weights = dict(zip(self.keys, self.leaves[base], strict=True))
        for index, path in enumerate(self.paths if "teacher" in self.leaves else []):
            a, b = self.leaves["teacher"][2 * index : 2 * index + 2]
            key = f"{path}.weight"
            weights[key] = weights[key] + self.scale * b @ a
        tokens = torch.tensor([sequence.prompt + sequence.completion])
        logits = functional_call(self.model, weights, (tokens,)).logits[0]
        rows = torch.log_softmax(logits[len(sequence.prompt) - 1 : -1], -1)
        return rows[torch.arange(len(sequence.completion)), torch.tensor(sequence.completion)]

    def j_sft(self, base="student"):
        return sum(self.logprobs(d, base).sum() for d in DEMOS) / sum(
            len(d.completion) for d in DEMOS
        )

    def j_rl(self, base="student"):
        value = 0.0
        for rollout in ROLLOUTS:
            old = torch.tensor(rollout.behaviour, dtype=torch.float32).double()
            advantage = torch.tensor(rollout.advantage, dtype=torch.float32).double()
            ratio = (self.logprobs(rollout, base) - old).exp()
            value = value + torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
        return value / sum(len(r.completion) for r in ROLLOUTS)

    def moved(self, name, rate, objective):
        leaves = self.leaves[name]
        found = torch.autograd.grad(objective, leaves, retain_graph=True, allow_unused=True)
        return [
            leaf.detach() + rate * (0 if g is None else g)
            for leaf, g in zip(leaves, found, strict=True)
        ]


def one_step(options, policy):
    rates = {"teacher": BETA}
    sets = {
        n: ParameterSet(n, policy.parameters(n), SGD, rates.get(n, ALPHA)) for n in options.adapters
    }
    method = make_method(options)
    objectives = TokenObjectives(
        policy, method, tiny_spec(options, micro_batch=3), demos=DEMOS, groups=GROUPS
    )
    metrics = method.step(objectives, sets, 0, 1)
    return {n: [p.detach() for p in policy.parameters(n)] for n in options.adapters}, metrics


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_bridge_moves_all_three_by_the_papers_equations(lam):
    policy = full_policy(*NAMES)
    reference = FullReference(policy)
    moved, _ = one_step(BridgeOptions(**{"lambda": lam}), policy)
    joint = (1 - lam) * reference.j_sft() + lam * reference.j_rl()
    assert_same(moved["student"], reference.moved("student", ALPHA, joint), 1e-6)
    alone = reference.j_rl("shadow")
    assert_same(moved["shadow"], reference.moved("shadow", ALPHA, alone), 1e-6)
    assert_same(moved["teacher"], reference.moved("teacher", BETA, joint - lam * alone), 1e-6)


@pytest.mark.parametrize(
    ("options", "weights"),
    [(SftOptions(), (1, 0)), (RlOptions(), (0, 1)), (MixOptions(), (0.5, 0.5))],
    ids=lambda x: getattr(x, "name", ""),
)
def test_methods_without_a_teacher_train_every_weight(options, weights):
    policy = full_policy("student")
    reference = FullReference(policy)
    moved, _ = one_step(options, policy)
    objective = weights[0] * reference.j_sft() + weights[1] * reference.j_rl()
    assert_same(moved["student"], reference.moved("student", ALPHA, objective), 1e-6)


def test_the_shadow_is_a_copy_of_its_own_with_the_very_same_teacher():
    policy = full_policy(*NAMES)
    student, shadow = policy.parameters("student"), policy.parameters("shadow")
    assert len(student) == len(shadow) == len(list(random_model().parameters()))
    assert all(torch.equal(a, b) for a, b in zip(student, shadow, strict=True))
    assert not {p.data_ptr() for p in student} & {p.data_ptr() for p in shadow}
    assert list(policy.copies) == ["shadow"], "one more model, not two"
    batch = pad(random_sequences(3), pad_id=PAD, device=policy.device)
    with torch.no_grad():
        for tensor in policy.parameters("teacher"):
            tensor.mul_(3.0)  # seen through both
        with policy.using("student", "teacher"):
            one, _ = policy.logprobs(batch)
        with policy.using("shadow", "teacher"):
            other, _ = policy.logprobs(batch)
        with policy.using("student"):
            bare, _ = policy.logprobs(batch)
    assert torch.equal(one, other)
    assert not torch.allclose(one, bare)
    assert policy.module is policy.model, "out of use, the model is the student's again"


def test_the_kl_reference_is_the_initial_model_wherever_the_student_has_gone():
    policy = full_policy("student")
    policy.keep_initial()
    batch = pad(random_sequences(3), pad_id=PAD, device=policy.device)
    with torch.no_grad():
        with policy.using("student"):
            before, _ = policy.logprobs(batch)
        for tensor in policy.parameters("student"):
            tensor.add_(0.1)
        with policy.using():
            reference, _ = policy.logprobs(batch)
    assert torch.equal(reference, before)


@pytest.mark.parametrize("merged", [False, True])
def test_the_samplers_logprobs_are_the_forward_pass(merged):
    policy = full_policy(*NAMES, dtype=torch.float32)
    prompts = [[3, 4, 5], [7]]
    with policy.using("student", "teacher", merged=merged):
        drawn = sample(
            policy.module,
            prompts,
            SamplingParams(6),
            eos_ids=[1],
            pad_id=PAD,
            generator=torch.Generator().manual_seed(0),
        )
    sequences = [TokenSequence(p, c.tokens) for p, c in zip(prompts, drawn, strict=True)]
    with torch.no_grad(), policy.using("student", "teacher"):
        logprobs_BT, _ = policy.logprobs(pad(sequences, pad_id=PAD, device=policy.device))
    for row, completion in zip(logprobs_BT.tolist(), drawn, strict=True):
        assert row[: len(completion.tokens)] == pytest.approx(completion.logprobs, abs=1e-5)


def test_a_shadow_in_bfloat16_takes_half_the_memory_and_gives_its_gain_to_three_digits():
    exact = full_policy(*NAMES, dtype=torch.float32)
    rounded = full_policy(
        *NAMES, dtype=torch.float32, student=StudentSpec(form="full", shadow_dtype="bfloat16")
    )
    size = [sum(p.nbytes for p in q.parameters("shadow")) for q in (exact, rounded)]
    assert size[1] * 2 == size[0]
    _, one = one_step(BridgeOptions(), exact)
    moved, other = one_step(BridgeOptions(), rounded)
    assert other["objective/shadow"] == pytest.approx(one["objective/shadow"], rel=0.05, abs=0.02)
    assert other["objective/student"] == pytest.approx(one["objective/student"], rel=1e-6)
    assert {t.dtype for t in moved["shadow"]} == {torch.bfloat16}
    assert {t.dtype for t in moved["teacher"]} == {torch.float32}


def test_a_student_that_computes_in_bfloat16_keeps_its_weights_and_moments_in_float32():
    policy = full_policy(*NAMES, dtype=torch.float32, compute_dtype=torch.bfloat16)
    exact = full_policy(*NAMES, dtype=torch.float32)
    moved, metrics = one_step(BridgeOptions(), policy)
    expected, close = one_step(BridgeOptions(), exact)
    assert {t.dtype for ts in moved.values() for t in ts} == {torch.float32}
    assert metrics["sft/nll"] == pytest.approx(close["sft/nll"], rel=0.03)
    assert not torch.equal(moved["student"][0], expected["student"][0]), "it did round"


def test_an_offloaded_shadow_is_on_the_device_for_its_passes_alone(monkeypatch):
    """There is one device here, so it is told apart by counting the moves."""
    policy = full_policy(*NAMES, student=StudentSpec(form="full", shadow_offload=True))
    moves = []
    shadow = policy.copies["shadow"]
    monkeypatch.setattr(shadow, "move_base", moves.append)
    monkeypatch.setattr(type(shadow), "base_device", property(lambda _: "elsewhere"))
    one_step(BridgeOptions(), policy)
    assert len(moves) >= 2
    assert moves[0] == policy.device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_offloaded_shadow_gives_the_same_step_on_a_gpu():
    device = torch.device("cuda")
    results = []
    for offload in (False, True):
        student = StudentSpec(form="full", shadow_offload=offload)
        policy: Policy = full_policy(*NAMES, dtype=torch.float32, student=student, device=device)
        moved, _ = one_step(BridgeOptions(), policy)
        results.append(moved)
        assert moved["shadow"][0].device.type == ("cpu" if offload else "cuda")
    for name in NAMES:
        assert_same([t.cpu() for t in results[0][name]], [t.cpu() for t in results[1][name]], 1e-5)
