"""What a step is made of: rounds of sampling, updates on parts of it, updates that fail."""

import math

import pytest
import torch

from bridge_engine import correction
from bridge_engine.errors import EngineError, NonFinite
from bridge_engine.events import EventReader
from bridge_engine.methods import Exploration, make_method
from bridge_engine.objectives import importance_weights
from bridge_engine.rollout import Completion
from bridge_engine.state.run_state import Progress
from bridge_engine.token_objectives import TokenObjectives
from tests.support.reference import Reference
from tests.support.tiny import random_groups, random_policy, tiny_spec, with_advantages
from tests.support.training import SPEC, ScriptedVerifier, make_trainer
from tests.unit.test_updates import assert_same

pytestmark = pytest.mark.usefixtures("one_thread")

STUDENT = ("student",)
DEMOS = {"name": "arithmetic", "split": "demos", "limit": 16}
PAIRED = {"prompts": DEMOS, "demos": DEMOS}


@pytest.fixture
def trainer(tmp_path):
    return lambda folder="run", **changes: make_trainer(tmp_path / folder, **changes)


def rollout(**changes):
    return {**SPEC["rollout"], **changes}


def warnings(made):
    return [
        e.message
        for e in EventReader(made.events.path).read()
        if e.type == "log" and e.level == "warning"
    ]


class Recorder:
    """Stands where the method stands, and notes what it is given."""

    def __init__(self, options, fail=()):
        self.options, self.fail, self.seen, self.calls = options, fail, [], 0

    def begin(self, sets, step, steps):
        self.seen.append([])

    def step(self, objectives, sets, step, steps):
        self.calls += 1
        if self.calls in self.fail:
            raise NonFinite("the gradient of the student")
        self.seen[-1].append(objectives)
        return {"x": float(self.calls)}


# --------------------------------------------------------------------------- inner updates


def test_every_group_is_used_once_an_epoch_in_mini_batches_of_a_new_order(trainer):
    made = trainer(rl={"inner_epochs": 2, "mini_batches": 3})
    made.method = Recorder(made.spec.method)
    metrics = made._step(Progress())
    (updates,) = made.method.seen
    assert [len(u.groups) for u in updates] == [1] * 6
    prompts = [tuple(u.groups[0].rollouts[0].prompt) for u in updates]
    assert set(prompts[:3]) == set(prompts[3:])
    assert len(set(prompts[:3])) == 3
    assert metrics["x"] == pytest.approx(3.5), "the mean over the updates"
    demos = [tuple(d.completion) for u in updates for d in u.demos]
    assert len(demos) == 24
    assert len(set(demos)) == 16, "each update draws its own, epoch after epoch"


def test_advantages_over_the_batch_look_at_all_its_mini_batches():
    groups = random_groups(3, 2, rewards=[[1, 0], [1, 1], [0, 0]])
    spec = tiny_spec(rl={"advantage": "batch_std"})
    policy = random_policy("student")
    one = TokenObjectives(
        policy, make_method(spec.method), spec, groups=groups[:1], step_groups=groups
    )
    rollouts, _ = one._with_advantages(Exploration(), one.groups)
    std = torch.tensor([1.0, 0, 1, 1, 0, 0]).std().item() + 1e-4
    assert [s.advantage for s, _ in rollouts] == pytest.approx([0.5 / std, -0.5 / std])


# --------------------------------------------------------------------------- dynamic sampling


def test_groups_that_teach_nothing_are_replaced_by_groups_of_further_problems(trainer):
    made = trainer(rollout=rollout(dynamic_sampling=3))
    useless, useful = [True] * 4, [True, False, False, True]
    made.explorer.verifier = ScriptedVerifier([*useful, *useless, *useless])
    groups, metrics = made.explorer.explore(0, 0)
    assert len(groups) == 3
    assert all(g.informative for g in groups)
    assert len({tuple(g.rollouts[0].prompt) for g in groups}) == 3
    assert metrics["dynamic_sampling/rounds"] == 2
    assert metrics["dynamic_sampling/discarded"] == 6
    assert metrics["reward"] == pytest.approx(10 / 12), "of everything that was sampled"
    again, _ = made.explorer.explore(0, 0)
    assert [g.rollouts for g in again] == [g.rollouts for g in groups], "a function of the step"


def test_dynamic_sampling_ends_where_nothing_is_ever_useful(trainer):
    made = trainer(rollout=rollout(dynamic_sampling=2))
    made.explorer.verifier = ScriptedVerifier([True])
    groups, metrics = made.explorer.explore(0, 0)
    assert len(groups) == 3
    assert metrics["dynamic_sampling/rounds"] == 2
    assert metrics["frac_reward_zero_std"] == 1


# --------------------------------------------------------------------------- what has been spent


@pytest.mark.parametrize(
    ("method", "changes", "rollouts", "updates"),
    [
        ("sft", {}, [0, 0, 0], [1, 2, 3]),
        ("rl", {}, [12, 24, 36], [1, 2, 3]),
        ("rl", {"rl": {"inner_epochs": 2, "mini_batches": 3}}, [12, 24, 36], [6, 12, 18]),
        ("bridge", {}, [12, 24, 36], [1, 2, 3]),
        ("cold_start", {}, [0, 0, 12], [1, 2, 3]),
        ("alternating", {}, [0, 12, 12], [1, 2, 3]),
        ("luffy", {"data": PAIRED}, [9, 18, 27], [1, 2, 3]),
        # two groups of three teach nothing, and no further round finds a third that does
        ("rl", {"rollout": rollout(dynamic_sampling=1)}, [24, 48, 72], [1, 2, 3]),
        ("relift", {"data": PAIRED}, [12, 24, 36], [1, 2, 3]),
    ],
)  # fmt: skip
def test_every_step_says_what_has_been_spent_so_far(trainer, method, changes, rollouts, updates):
    """So that methods can be compared by it: what is sampled, and how often θ was moved."""
    made = trainer(method=method, **changes)
    made.explorer.verifier = ScriptedVerifier([True, False, False, True, *[True] * 8])
    assert made.run()
    seen = EventReader(made.events.path).read()
    steps = [e.metrics for e in seen if e.type == "metric"]
    assert [m["num_rollouts"] for m in steps] == rollouts
    assert [m["num_updates"] for m in steps] == updates
    assert seen[-1].result["num_rollouts"] == rollouts[-1]
    assert seen[-1].result["num_updates"] == updates[-1]


def test_a_lesson_beside_the_step_is_an_update_too_and_a_skipped_one_is_none(trainer):
    made = trainer(method={"name": "relift", "buffer": 1}, data=PAIRED)
    made.explorer.verifier = ScriptedVerifier((True, *[False] * 7))  # every other group fails
    progress = Progress()
    metrics = made._step(progress)
    assert (metrics["buffer"], progress.num_updates) == (0, 2)
    failing = trainer("failing")
    failing.method = Recorder(failing.spec.method, fail=[1])
    progress = Progress()
    failing._step(progress)
    assert (progress.num_rollouts, progress.num_updates, progress.skipped) == (12, 0, 1)


# --------------------------------------------------------------------------- truncated completions


def test_a_truncated_completion_counts_in_its_group_and_not_in_the_loss():
    groups = random_groups(1, 4, seed=3)
    groups[0].truncated[1] = True
    policy = random_policy("student")
    spec = tiny_spec(rl={"mask_truncated": True, "kl_coef": 0.1})
    objectives = TokenObjectives(policy, make_method(spec.method), spec, groups=groups)
    found = objectives.gradient("student", rl=1.0)

    reference = Reference(policy, STUDENT)
    kept = [s for i, s in enumerate(with_advantages(groups)) if i != 1]
    total = sum(len(s.completion) for s in kept)
    divergence = 0.0
    for sequence in kept:
        difference = reference.logprobs(sequence, ()).detach() - reference.logprobs(
            sequence, STUDENT
        )
        divergence = divergence + (difference.exp() - difference - 1).sum()
    objective = reference.j_rl(kept, STUDENT) - 0.1 * divergence / total
    g = reference.gradient(objective, "student")
    assert_same(found.theta.tensors, g, tolerance=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("method", ["rl", "bridge"])
def test_a_step_of_which_every_completion_is_cut_off_does_not_fail(trainer, method, masked):
    made = trainer(method=method, rollout=rollout(max_new_tokens=1), rl={"mask_truncated": masked})
    metrics = made._step(Progress())
    assert metrics["completions/clipped_ratio"] == 1
    assert all(math.isfinite(v) for v in metrics.values())
    if masked:
        assert metrics["objective/student"] == 0
    (warning,) = warnings(made)
    assert warning.startswith("none of the 12 completions of step 1 came to an end: no '<eos>'")


# --------------------------------------------------------------------------- empty completions


class Silent:
    """A sampler that writes these tokens and no more, every time."""

    def __init__(self, tokens):
        self.tokens = tokens

    def sync(self, step, names=None):
        return {}

    def sample(self, prompts, params, *, rng=None, repeats=1):
        one = Completion(self.tokens, [-0.1] * len(self.tokens), finished=True)
        return [one] * len(prompts) * repeats


@pytest.mark.parametrize("words", ["nothing", "the end alone"])
@pytest.mark.parametrize("method", ["rl", "bridge", "luffy"])
def test_a_step_of_which_every_completion_is_empty_does_not_fail(trainer, method, words):
    made = trainer(method=method, data=PAIRED)
    made.explorer.sampler = Silent([] if words == "nothing" else [made.policy.eos_ids[0]])
    made.explorer.verifier = ScriptedVerifier((True, False))  # so that all have an advantage
    metrics = made._step(Progress())
    assert metrics["completions/mean_length"] == (words == "the end alone")
    assert all(math.isfinite(v) for v in metrics.values())
    assert "skipped_steps" not in metrics


# --------------------------------------------------------------------------- importance correction


def test_correction_takes_the_ratio_to_the_trainer_and_weighs_with_the_capped_quotient():
    policy = random_policy("student")
    groups = random_groups(2, 2, seed=5)
    spec = tiny_spec(rl={"importance_correction": "truncated", "importance_cap": 1.5})
    found, metrics = correction.corrected(groups, policy, spec)
    reference = Reference(policy, STUDENT)
    drift, tokens = 0.0, 0
    for before, after in zip(groups, found, strict=True):
        for sampled, sequence in zip(before.rollouts, after.rollouts, strict=True):
            trainer = reference.logprobs(sampled, STUDENT).detach()
            sampler = torch.tensor(sampled.behaviour, dtype=torch.float64)
            assert sequence.behaviour == pytest.approx(trainer.tolist(), abs=1e-6)
            weights = (trainer - sampler).exp().clamp(max=1.5)
            assert sequence.weights == pytest.approx(weights.tolist(), rel=1e-5)
            drift += (trainer - sampler).abs().sum().item()
            tokens += len(sampler)
        assert after.rewards == before.rewards
    assert metrics["sampler_mismatch"] == pytest.approx(drift / tokens, rel=1e-5)
    assert importance_weights([0.0], [-9.0], 3.0) == [3.0]


def test_a_sampler_that_is_the_trainer_needs_no_correction(trainer):
    plain = trainer("plain", method="rl", optimizer={"name": "sgd"})
    mended = trainer(
        "mended",
        method="rl",
        optimizer={"name": "sgd"},
        rl={"importance_correction": "truncated"},
    )
    for made in (plain, mended):
        metrics = made._step(Progress())
    assert metrics["sampler_mismatch"] < 1e-5
    pairs = zip(plain.sets["student"].tensors, mended.sets["student"].tensors, strict=True)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in pairs)


# --------------------------------------------------------------------------- updates that fail


def test_an_update_that_is_not_finite_is_skipped_counted_and_said(trainer):
    made = trainer(rl={"mini_batches": 3})
    made.method = Recorder(made.spec.method, fail={2})
    progress = Progress()
    metrics = made._step(progress)
    assert metrics["skipped_steps"] == progress.skipped == 1
    assert progress.skipped_in_a_row == 0, "the third update was fine"
    assert any("step 1: an update was skipped" in w for w in warnings(made))


def test_more_skipped_updates_in_a_row_than_the_limit_fail_the_run(trainer):
    made = trainer(optimizer={"max_skipped": 2})
    made.method = Recorder(made.spec.method, fail=range(100))
    progress = Progress()
    for _ in range(2):
        made._step(progress)
    with pytest.raises(EngineError, match="3 updates in a row") as failure:
        made._step(progress)
    assert failure.value.code == "non_finite"


def test_a_gradient_of_nan_moves_nothing_and_leaves_nothing_behind(trainer):
    made = trainer()
    before = {n: [t.detach().clone() for t in s.tensors] for n, s in made.sets.items()}
    teacher = made.sets["teacher"].tensors
    handle = teacher[0].register_hook(lambda g: g * math.nan)
    made._step(Progress())
    handle.remove()
    for name, values in before.items():
        now = made.sets[name].tensors
        assert all(torch.equal(a, b) for a, b in zip(now, values, strict=True)), name
        assert all(t.grad is None for t in now)
        assert not made.sets[name].optimizer.state


@pytest.mark.parametrize("where", ["_step", "_evaluate"])
def test_memory_that_runs_out_is_told_with_the_step_it_ran_out_in(trainer, monkeypatch, where):
    made = trainer(method="sft", steps=4, eval={"every": 2})
    progress = Progress()
    made._advance(progress)

    def fail(_):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(made, where, fail)
    with pytest.raises(EngineError, match="memory ran out") as failure:
        made._advance(progress)
    assert (failure.value.code, failure.value.step) == ("out_of_memory", 2)


# --------------------------------------------------------------------------- what is said aloud


def test_many_unjudged_answers_are_said_aloud_and_not_for_ever(trainer):
    made = trainer(rollout=rollout(group_size=5))
    made.explorer.verifier = ScriptedVerifier((True, False, False, False, None))
    for _ in range(5):
        made._step(Progress())
    assert sum("20% of a step's answers could not be judged" in w for w in warnings(made)) == 3


def test_the_student_is_measured_without_its_teacher_too(trainer):
    data = {**SPEC["data"], "eval": {"name": "arithmetic", "limit": 5}}
    made = trainer(data=data)
    progress = Progress()
    metrics = made._evaluate(progress)
    assert metrics["accuracy/student_alone"] == progress.student_alone[0]
    assert "accuracy_student_alone" in progress.result(made.spec)
    off = trainer("off", data=data, eval={"student_alone": False})
    assert "accuracy/student_alone" not in off._evaluate(Progress())
    alone = trainer("rl", data=data, method="rl")
    assert "accuracy/student_alone" not in alone._evaluate(Progress())


def test_what_is_measured_as_the_student_alone_has_no_teacher_in_it(trainer):
    data = {**SPEC["data"], "eval": {"name": "arithmetic", "limit": 8}}
    made = trainer(data=data)
    with torch.no_grad():  # a teacher that spoils everything
        for tensor in made.sets["teacher"].tensors:
            tensor.add_(1.0)
    made._evaluate(Progress())
    (policy_pairs, student_pairs) = made.explorer.verifier.asked
    bare = trainer("bare", data=data)
    bare._evaluate(Progress())
    assert student_pairs == bare.explorer.verifier.asked[1]
    assert policy_pairs != student_pairs
