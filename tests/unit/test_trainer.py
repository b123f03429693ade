"""The loop: every answer is judged against its own problem, and every setting reaches its place."""

import json
import math

import pytest
import torch

from bridge_engine.errors import EngineError
from bridge_engine.events import EventReader
from bridge_engine.methods import METHODS, Exploration
from bridge_engine.state import run_state
from bridge_engine.token_objectives import TokenObjectives
from tests.support.resume import assert_resumes_bitwise
from tests.support.training import SPEC, ScriptedVerifier, make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def trainer(tmp_path):
    return lambda folder="run", **changes: make_trainer(tmp_path / folder, **changes)


def explore(made, step, turn):
    """The rollouts of a step as the update sees them: with advantages, without the unjudged."""
    groups, metrics = made.explorer.explore(step, turn)
    objectives = TokenObjectives(made.policy, made.method, made.spec, groups=groups)
    rollouts, _ = objectives._with_advantages(Exploration(), groups)
    return [sequence for sequence, _ in rollouts], metrics


def test_every_completion_is_judged_against_the_answer_of_its_own_problem(trainer):
    made = trainer()
    rollouts, _ = explore(made, 0, 0)
    answers = {tuple(made.data.prompt(e)): e.answer for e in made.data.prompts}
    (pairs,) = made.explorer.verifier.asked
    assert len(pairs) == len(rollouts) == 12
    for rollout, (gold, text) in zip(rollouts, pairs, strict=True):
        assert gold == answers[tuple(rollout.prompt)]
        decoded = made.policy.tokenizer.decode(rollout.completion, skip_special_tokens=True)
        assert text == decoded


def test_groups_share_a_prompt_and_advantages_are_taken_within_them(trainer):
    made = trainer(rl={"advantage": "group"})
    made.explorer.verifier = ScriptedVerifier((True, False, False, False))
    rollouts, metrics = explore(made, 0, 0)
    for start in range(0, 12, 4):
        group = rollouts[start : start + 4]
        assert len({tuple(r.prompt) for r in group}) == 1
        assert [r.advantage for r in group] == [0.75, -0.25, -0.25, -0.25]
    assert metrics["reward"] == 0.25
    made = trainer("std", rl={"advantage": "group_std"})
    made.explorer.verifier = ScriptedVerifier((True, False, False, False))
    assert explore(made, 0, 0)[0][0].advantage == pytest.approx(0.75 / (0.5 + 1e-4))


def test_an_unjudged_answer_leaves_the_batch_and_the_mean_reward(trainer):
    made = trainer()
    made.explorer.verifier = ScriptedVerifier((True, None, False, None))
    rollouts, metrics = explore(made, 0, 0)
    assert len(rollouts) == 6
    assert metrics["reward"] == 0.5
    assert metrics["verifier/unjudged"] == 0.5
    assert all(r.advantage != 0 for r in rollouts)


def test_rollouts_are_new_at_every_step_and_the_same_for_the_same_step(trainer):
    made = trainer()
    first = [r.completion for r in explore(made, 0, 0)[0]]
    assert [r.completion for r in explore(made, 0, 0)[0]] == first
    assert [r.completion for r in explore(made, 1, 0)[0]] != first, "same problems, another step"


def test_the_shadow_starts_as_the_student_and_the_teacher_does_not(trainer):
    adapters = trainer().policy.adapters
    student, teacher, shadow = map(adapters.parameters, ("student", "teacher", "shadow"))
    assert all(torch.equal(a, b) for a, b in zip(student, shadow, strict=True))
    assert not torch.equal(student[0], teacher[0])


def test_every_set_moves_at_its_own_rate(trainer):
    made = trainer(optimizer={"name": "sgd", "student_lr": 0.5, "teacher_lr": 0.25})
    rates = {name: group.learning_rate for name, group in made.sets.items()}
    assert rates == {"student": 0.5, "shadow": 0.5, "teacher": 0.25}


def test_what_does_not_fit_is_left_out_and_said(trainer):
    made = trainer(sft={"batch_size": 4, "max_tokens": 30})
    assert made.data.demos
    assert len(made.data.demos) < 16
    assert all(len(d) <= 30 for d in made.data.demos)
    assert all(d.completion[-1] == made.policy.eos_ids[0] for d in made.data.demos)
    narrow = trainer("narrow", rollout={**SPEC["rollout"], "max_new_tokens": 243})
    assert narrow.data.prompts
    assert all(len(narrow.data.prompt(e)) <= 256 - 243 for e in narrow.data.prompts)
    logs = [e.message for e in EventReader(narrow.events.path).read() if e.type == "log"]
    assert any("data.prompts" in m and "left out" in m for m in logs)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"sft": {"batch_size": 4, "max_tokens": 2}}, "data.demos"),
        ({"rollout": {**SPEC["rollout"], "max_new_tokens": 255}}, "data.prompts"),
    ],
)
def test_data_of_which_nothing_fits_is_an_error_that_says_what_and_why(trainer, changes, param):
    with pytest.raises(EngineError, match=r"^nothing of .* rows are over \d+ tokens") as error:
        trainer(**changes)
    assert (error.value.code, error.value.param) == ("no_data", param)


def test_an_evaluation_leaves_room_for_its_own_length_not_the_rollouts(trainer):
    data = {**SPEC["data"], "eval": {"name": "arithmetic", "limit": 50}}
    made = trainer(data=data, eval={"max_new_tokens": 243})
    assert len(made.data.prompts) == 4000
    assert all(len(made.data.prompt(e)) <= 256 - 243 for e in made.data.held_out)


def test_an_evaluation_of_which_nothing_was_judged_is_no_accuracy_of_zero(trainer):
    data = {**SPEC["data"], "eval": {"name": "arithmetic", "limit": 5}}
    made = trainer(data=data)
    made.explorer.verifier = ScriptedVerifier((None,))
    progress = run_state.Progress(step=2)
    assert made._evaluate(progress) == {"eval/unjudged": 5.0}
    assert progress.best is None


@pytest.mark.parametrize("every", [{"eval": {"every": 2}}, {"eval": {"every": 0}}])
def test_rollouts_are_shown_now_and_then_and_under_the_step_they_taught(trainer, every):
    made = trainer(checkpoint={"every": 2}, **every)
    for step in range(4):
        explore(made, step, step)
    shown = [e.step for e in EventReader(made.events.path).read() if e.type == "sample"]
    assert sorted(set(shown)) == [1, 3]


def test_an_adapter_lost_between_saving_and_saying_so_is_made_and_said_on_resume(
    trainer, monkeypatch
):
    made = trainer()

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_state, "prune", die)  # after state and adapter, before the event
    with pytest.raises(KeyboardInterrupt):
        made.run()
    monkeypatch.undo()
    again = trainer()
    assert again.run()
    events = EventReader(again.events.path).read()
    (checkpoint,) = [e for e in events if e.type == "checkpoint"]
    assert (checkpoint.step, events[-1].type) == (3, "done")
    assert (made.state.exports / "step-000003" / "adapter_model.safetensors").is_file()


def test_no_state_is_ever_there_without_its_adapter(trainer, monkeypatch):
    made = trainer()

    def die(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_state, "write_exports", die)
    with pytest.raises(KeyboardInterrupt):
        made.run()
    assert not list(made.state.checkpoints.glob("step-*"))


def test_a_stop_before_the_first_step_is_heard_and_costs_nothing(trainer):
    made = trainer()
    made.stop_requested = lambda: True
    assert made.run() is False
    again = trainer()
    assert again.run() is True


def test_a_spec_that_got_a_new_field_since_can_still_be_resumed(trainer):
    made = trainer()
    assert made.run()
    state = made.state.checkpoints / "step-000003" / "state.json"
    document = json.loads(state.read_text())
    del document["spec"]["rl"]["kl_coef"]
    made.state._refuse_other_spec(document["spec"])


def test_a_policy_of_nans_is_noticed_although_its_gradient_is_zero(trainer):
    made = trainer(method="rl")
    with torch.no_grad():
        made.policy.adapters.parameters("student")[1].fill_(math.nan)
    with pytest.raises(Exception, match="NaN or infinite"):
        made._step(run_state.Progress())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_bitwise(tmp_path, method):
    """In one process, at every step; `tests/engine` kills whole processes."""
    interruptions = [(how, steps) for how in ("stopped", "killed") for steps in (1, 3)]
    assert_resumes_bitwise(tmp_path, method, interruptions)


def test_a_full_student_resumes_bitwise(tmp_path):
    interruptions = [("stopped", 1), ("killed", 3)]
    assert_resumes_bitwise(tmp_path, "bridge", interruptions, student="full")


def test_a_full_student_with_its_knobs_turned_resumes_bitwise(tmp_path):
    """In the middle of its warmup, with a reference that is the base as it was."""
    assert_resumes_bitwise(
        tmp_path,
        {"name": "bridge", "shadow_ema": 0.3},
        [("killed", 3)],
        student="full",
        rl={"inner_epochs": 2, "importance_correction": "truncated", "kl_coef": 0.05},
        optimizer={"warmup_steps": 6},
    )
