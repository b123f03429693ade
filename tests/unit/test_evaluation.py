"""The evaluation job in this process, on bridge-tiny: what it asks, keeps, counts and refuses."""

import json
import shutil
from math import comb

import pytest
import torch

from bridge_engine.errors import EngineError
from bridge_engine.evaluation import job as job_page
from bridge_engine.evaluation.answers import COMPLETIONS, PROBLEMS
from bridge_engine.spec.job import parse_spec
from tests.support.evaluations import SPEC, evaluation, events, lines, result, run


@pytest.fixture(autouse=True, scope="module")
def one_base():
    """Every test asks the same base model: it is read from the disk once."""
    patch, loaded = pytest.MonkeyPatch(), {}
    bare = job_page.load_subject

    def once(base, folder, runtime):
        if folder is not None:
            return bare(base, folder, runtime)
        return loaded.setdefault(base, bare(base, None, runtime))

    patch.setattr(job_page, "load_subject", once)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, one_base):
    """A whole run, for others to be compared with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run(folder)


def test_scores_are_those_of_an_independent_count_of_the_answers(undisturbed):
    folder, found = undisturbed
    (one,) = found["benchmarks"]
    kept = next((folder / "checkpoints").iterdir()) / COMPLETIONS
    verdicts = [
        [answer["verdict"] for answer in line["answers"]]
        for line in map(json.loads, kept.read_text().splitlines())
        if "answers" in line
    ]
    rights = [each.count("right") for each in verdicts]
    assert (len(rights), one["problems"], one["samples"]) == (14, 14, 3)
    assert 0 < sum(rights) < 42  # or the rest of this proves nothing
    assert one["scores"]["avg@3"] == one["scores"]["pass@1"]
    for k in (1, 2, 3):
        expected = sum(1 - comb(3 - c, k) / comb(3, k) for c in rights) / 14
        assert one["scores"][f"pass@{k}"]["value"] == pytest.approx(expected)
    assert one["outcomes"]["right"] == sum(rights)
    assert sum(one["outcomes"].values()) == 42
    for score in one["scores"].values():
        assert score["low"] <= score["value"] <= score["high"]
    assert set(one["by_kind"]) == {"add3", "add5", "times", "paren", "mixed"}
    problems = json.loads((kept.parent / PROBLEMS).read_text())["arithmetic"]["problems"]
    assert [p["right"] for p in problems] == rights


def test_a_result_says_what_the_model_read_and_what_read_it(undisturbed, tmp_path):
    folder, found = undisturbed
    (one,) = found["benchmarks"]
    kept = next((folder / "checkpoints").iterdir()) / COMPLETIONS
    asked = [json.loads(line).get("problem") for line in kept.read_text().splitlines()]
    first = next(filter(None, asked))
    assert one["prompt"] == first
    assert one["template"] == {"kind": "plain", "system": None, "suffix": ""}
    assert found["engine"] == "native"
    again = run(tmp_path, template={"system": "(2+", "suffix": "="}, sampling={"max_new_tokens": 4})
    assert again["benchmarks"][0]["prompt"] == f"(2+{first}="


def test_the_stream_has_progress_and_at_last_the_scores(undisturbed):
    folder, found = undisturbed
    assert [e.steps for e in events(folder, "phase")] == [14]
    metrics = events(folder, "metric")
    assert [e.step for e in metrics] == [4, 8, 12, 14, 14]
    score = found["benchmarks"][0]["scores"]["pass@1"]
    last = metrics[-1].metrics
    assert last["eval/arithmetic/pass@1"] == score["value"]
    assert last["eval/arithmetic/pass@1/low"] == score["low"]
    assert {e.source for e in events(folder, "sample")} == {"eval"}


def test_a_run_that_is_killed_asks_no_finished_problem_again_and_ends_alike(
    undisturbed, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    asked = []

    def counting(made, die_after=None):
        subject = made._examiner()
        ask = subject[0].ask

        def count(problems, *arguments, **options):
            if die_after is not None and len(asked) >= die_after:
                raise Killed
            asked.extend(p.id for p in problems)
            return ask(problems, *arguments, **options)

        subject[0].ask = count
        made._examiner = lambda: subject
        return made

    with pytest.raises(Killed), counting(evaluation(tmp_path), die_after=8) as made:
        made.run()
    assert len(asked) == 8
    with (tmp_path / COMPLETIONS).open("a") as file:
        file.write('{"benchmark": 0, "id": "half')  # what a kill leaves of a line
    with counting(evaluation(tmp_path)) as made:
        assert made.run()
    assert len(asked) == len(set(asked)) == 14
    assert result(tmp_path) == undisturbed[1]
    assert [e.step for e in events(tmp_path, "resume")] == [8]


def test_a_run_that_is_stopped_leaves_a_checkpoint_that_another_machine_goes_on_from(
    undisturbed, tmp_path
):
    here, there = tmp_path / "here", tmp_path / "there"
    stops = iter([False, False, True])
    with evaluation(here, stop=lambda: next(stops)) as made:
        assert not made.run()
    assert events(here)[-1].type == "stopped"
    assert len(lines(here / COMPLETIONS)) == 8
    there.mkdir()
    shutil.copytree(here / "checkpoints", there / "checkpoints")  # all that was published
    assert run(there) == undisturbed[1]
    assert lines(there / COMPLETIONS) == lines(undisturbed[0] / COMPLETIONS)


def test_an_answer_depends_on_seed_problem_and_sample_alone(undisturbed, tmp_path):
    before = lines(undisturbed[0] / COMPLETIONS)
    sampling = {**SPEC["sampling"], "batch_size": 5, "samples": 2}
    fewer = {"name": "arithmetic", "limit": 14, "kinds": ["add3", "paren"]}
    run(tmp_path / "other", sampling=sampling, benchmarks=[fewer])
    after = lines(tmp_path / "other" / COMPLETIONS)
    both = [name for name in after if name in before]
    assert len(both) >= 5
    assert all(after[name] == before[name][:2] for name in both)
    assert any(len(set(answers)) > 1 for answers in before.values())  # samples of their own
    run(tmp_path / "seed", seed=1)
    assert lines(tmp_path / "seed" / COMPLETIONS) != before


def test_answers_are_judged_anew_without_a_model(undisturbed, tmp_path, monkeypatch):
    folder, before = undisturbed
    shutil.copytree(next((folder / "checkpoints").iterdir()), tmp_path / "init")
    monkeypatch.setattr(job_page, "load_subject", None)  # whoever loads one fails
    again = run(tmp_path, completions_of="job_1", grader="exact")
    assert again["grader"]["name"] == "exact"
    for how in ("template", "prompt"):
        assert again["benchmarks"][0][how] == before["benchmarks"][0][how]
    # these answers are plain numbers: as texts they are equal where they are equal as numbers
    assert again["benchmarks"][0]["scores"] == before["benchmarks"][0]["scores"]


def test_answers_to_other_questions_are_refused(undisturbed, tmp_path):
    folder, _ = undisturbed
    shutil.copytree(folder, tmp_path / "run")
    with pytest.raises(EngineError) as changed:
        evaluation(tmp_path / "run", seed=5)
    assert (changed.value.code, changed.value.param) == ("spec_changed", "seed")
    shutil.copytree(next((folder / "checkpoints").iterdir()), tmp_path / "more" / "init")
    with pytest.raises(EngineError) as other:
        run(
            tmp_path / "more",
            completions_of="job_1",
            benchmarks=[{"name": "arithmetic", "limit": 20}],
        )
    assert other.value.code == "spec_changed"


def test_problems_that_leave_no_room_for_an_answer_are_told_and_no_failures(tmp_path):
    template = {"suffix": "1+" * 110}
    found = run(tmp_path, template=template, sampling={"max_new_tokens": 24})
    (one,) = found["benchmarks"]
    assert one["problems"] + one["left_out"] == 14
    assert 0 < one["left_out"] < 14
    assert sum(one["outcomes"].values()) == one["problems"]
    (warning,) = [e for e in events(tmp_path, "log") if e.level == "warning"]
    assert f"{one['left_out']} of 14 problems left out" in warning.message


def test_the_prompt_that_is_shown_is_of_a_problem_that_was_asked(tmp_path):
    """Not of the first of all, where that leaves no room; nor does going on change it."""
    changes = {
        "benchmarks": [{"name": "arithmetic", "limit": 4, "kinds": ["add5", "add3"]}],
        "template": {"suffix": "1+" * 110},
        "sampling": {"max_new_tokens": 24, "batch_size": 1},
    }
    stops = iter([False, False, True])  # after the long ones, and the first that is asked
    with evaluation(tmp_path, stop=lambda: next(stops), **changes) as made:
        assert not made.run()
        long, short = (made.sets[0].problems[n].problem for n in (0, 1))
        assert [bool(a) for a in lines(tmp_path / COMPLETIONS).values()] == [False, True]
    (one,) = run(tmp_path, **changes)["benchmarks"]
    assert len(long) > len(short)
    assert (one["left_out"], one["problems"]) == (1, 3)
    assert one["prompt"] == short + "1+" * 110


def test_a_run_whose_preset_missed_the_chat_template_warns_of_its_scores(tmp_path, monkeypatch):
    """The spec was resolved where nobody could see the tokenizer's files."""
    changes = {
        "preset": "qwen2.5-math",
        "benchmarks": [{"name": "arithmetic", "limit": 2, "template": {"kind": "plain"}}],
        "sampling": {"max_new_tokens": 4},
    }
    run(tmp_path / "plain", **changes)
    assert [e for e in events(tmp_path / "plain", "log") if e.level == "warning"] == []
    subject = job_page.load_subject("bridge-tiny", None, parse_spec(SPEC).runtime)
    tokenizer = subject.policy.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content }}")
    run(tmp_path / "chat", **changes)
    (warning,) = [e for e in events(tmp_path / "chat", "log") if e.level == "warning"]
    assert "plain prompt of preset qwen2.5-math" in warning.message


def test_answers_of_another_dtype_are_not_gone_on_from(undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "dtype")
    with pytest.raises(EngineError) as changed:
        evaluation(tmp_path / "dtype", runtime={"threads": 1, "dtype": "bfloat16"})
    assert (changed.value.code, changed.value.param) == ("spec_changed", "runtime.dtype")


def test_a_set_that_is_finished_is_reported_once_and_at_its_own_step(tmp_path):
    sets = [{"name": "arithmetic", "split": split, "limit": 4} for split in ("dev", "test")]
    changes = {"benchmarks": sets, "sampling": {"max_new_tokens": 8, "batch_size": 2}}
    stops = iter([False, False, False, True])
    with evaluation(tmp_path, stop=lambda: next(stops), **changes) as made:
        assert not made.run()  # in the second set
    with evaluation(tmp_path, **changes) as made:
        assert made.run()
    final = [
        (event.step, name)
        for event in events(tmp_path, "metric")
        for name in event.metrics
        if name.endswith("/right")
    ]
    assert set(final) == {(4, "eval/arithmetic:dev/right"), (8, "eval/arithmetic:test/right")}
    shown = [(event.step, event.problem) for event in events(tmp_path, "sample")]
    assert len(shown) == len(set(shown)) == 8


def test_judging_that_takes_long_is_heard_of_and_heeds_a_stop_without_losing_answers(
    undisturbed, tmp_path, monkeypatch
):
    for name, value in {"QUIET_SECONDS": 0.0, "JUDGED_AT_ONCE": 4, "JUDGING_SECONDS": 0.1}.items():
        monkeypatch.setattr(job_page, name, value)
    folder, before = undisturbed
    shutil.copytree(next((folder / "checkpoints").iterdir()), tmp_path / "init")
    changes = {"completions_of": "job_1"}
    asked_to = iter([False] * 12 + [True])  # three answers to each problem, one verdict at a time
    monkeypatch.setattr(job_page, "MOST_JUDGES", 1)
    with evaluation(tmp_path, stop=lambda: next(asked_to), **changes) as made:
        assert not made.run()
    assert [e.step for e in events(tmp_path, "metric")] == [0] * 11 + [4]
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert lines(checkpoint / COMPLETIONS) == lines(folder / COMPLETIONS)  # judged or not
    again = run(tmp_path, **changes)
    assert again["benchmarks"] == before["benchmarks"]


def test_answers_that_are_judged_anew_are_of_the_environment_they_were_given_in(
    undisturbed, tmp_path
):
    shutil.copytree(next((undisturbed[0] / "checkpoints").iterdir()), tmp_path / "init")
    answers = tmp_path / "init" / COMPLETIONS
    head, rest = answers.read_text().split("\n", 1)
    there = {"device": "NVIDIA H100", "torch": "2.13.0"}
    answers.write_text(json.dumps({**json.loads(head), "environment": there}) + "\n" + rest)
    elsewhere = {"threads": 1, "dtype": "bfloat16", "device": "cpu"}
    again = run(tmp_path, completions_of="job_1", runtime=elsewhere)
    assert again["environment"] == there


def test_two_splits_of_one_set_have_figures_of_their_own(tmp_path):
    sets = [{"name": "arithmetic", "split": split, "limit": 3} for split in ("dev", "test")]
    found = run(tmp_path, benchmarks=sets, sampling={"max_new_tokens": 16})
    assert [one["name"] for one in found["benchmarks"]] == ["arithmetic:dev", "arithmetic:test"]
    assert "eval/arithmetic:test/pass@1" in events(tmp_path, "metric")[-1].metrics


def test_a_generator_a_row_gives_each_row_the_numbers_of_its_own():
    from bridge_engine.rollout.native import _uniforms

    def numbered(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = _uniforms(2, 5, numbered(1, 2))
    assert torch.equal(both[1:], _uniforms(1, 5, numbered(2)))
    with pytest.raises(ValueError, match="1 generators for 2 rows"):
        _uniforms(2, 5, numbered(1))
