"""Whom an evaluation judges: the adapter or whole model that a training job left behind."""

import shutil

import pytest

from bridge_engine.errors import EngineError
from bridge_engine.evaluation import job as job_page
from bridge_engine.evaluation.answers import COMPLETIONS
from bridge_engine.evaluation.checks import read_card
from bridge_engine.evaluation.job import Evaluation
from bridge_engine.events import EventWriter
from bridge_engine.spec.job import fill, parse_spec
from bridge_engine.state.checkpoint import MANIFEST
from tests.support.evaluations import SPEC, evaluation, events, lines, result, run, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(the run directory of a training job, what it measured itself)."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, train(folder)


def test_a_training_job_and_an_evaluation_give_the_same_policy_the_same_score(trained, tmp_path):
    folder, score = trained
    found = run(
        tmp_path,
        adapter=folder / "adapters" / "step-000002",
        benchmarks=[{"name": "arithmetic", "limit": 20}],
        sampling={},
    )
    (one,) = found["benchmarks"]
    assert one["max_new_tokens"] == 20  # that of its training's evaluations, as its template
    assert one["template"]["kind"] == "plain"
    pass_at_1 = one["scores"]["pass@1"]
    assert (pass_at_1["value"], pass_at_1["low"], pass_at_1["high"]) == (
        score.accuracy,
        *score.interval,
    )
    assert {k: v["value"] for k, v in one["by_kind"].items()} == score.by_kind
    base = run(tmp_path / "base", benchmarks=SPEC["benchmarks"], sampling={"max_new_tokens": 24})
    assert base["benchmarks"][0]["scores"] != one["scores"]
    texts = lines(tmp_path / COMPLETIONS), lines(tmp_path / "base" / COMPLETIONS)
    assert any(texts[0][name] != texts[1][name] for name in texts[1])


def test_a_full_students_whole_model_is_evaluated_like_an_adapter(tmp_path):
    score = train(tmp_path / "full", student="full", checkpoint={"every": 1})
    found = run(
        tmp_path / "eval",
        adapter=tmp_path / "full" / "models" / "step-000002",
        benchmarks=[{"name": "arithmetic", "limit": 20}],
        sampling={},
    )
    (one,) = found["benchmarks"]
    assert one["scores"]["pass@1"]["value"] == score.accuracy
    assert {k: v["value"] for k, v in one["by_kind"].items()} == score.by_kind
    base = run(tmp_path / "base", benchmarks=SPEC["benchmarks"], sampling={"max_new_tokens": 24})
    assert base["benchmarks"][0]["reasons"] != one["reasons"]


def test_scores_on_what_the_adapter_was_trained_on_carry_a_warning(trained, tmp_path):
    """In the log and in the result, also when the answers are judged anew; never for a base."""
    sets = [
        {"name": "arithmetic", "split": "demos", "limit": 4},
        {"name": "arithmetic", "split": "dev", "limit": 4},
        {"name": "arithmetic", "split": "train", "limit": 4, "kinds": ["add3"]},
    ]
    asked = {"benchmarks": sets, "sampling": {"max_new_tokens": 8}}
    found = run(tmp_path / "one", adapter=trained[0] / "adapters" / "step-000002", **asked)
    warnings = [one["warning"] for one in found["benchmarks"]]
    assert "arithmetic/demos shares problems with data.demos (arithmetic/demos)" in warnings[0]
    assert warnings[1] is None
    assert "data.prompts (arithmetic/train), which job_1@2 was trained on" in warnings[2]
    logged = [e.message for e in events(tmp_path / "one", "log") if e.level == "warning"]
    assert [one for one in logged if "trained on" in one] == [warnings[0], warnings[2]]

    kept = next((tmp_path / "one" / "checkpoints").iterdir())
    shutil.copytree(kept, tmp_path / "again" / "init")
    again = SPEC | asked | {"adapter": "job_1@2", "model": "bridge-tiny"}
    spec = fill(parse_spec(again), read_card(trained[0] / "adapters" / "step-000002"))
    spec = spec.model_copy(update={"completions_of": "job_2"})
    with Evaluation(spec, tmp_path / "again", EventWriter(tmp_path / "again")) as regraded:
        assert regraded.run()
    assert [one["warning"] for one in result(tmp_path / "again")["benchmarks"]] == warnings

    base = run(tmp_path / "base", **asked)
    assert [one["warning"] for one in base["benchmarks"]] == [None] * 3


def test_an_adapter_of_another_base_or_with_other_bytes_is_refused(trained, tmp_path):
    folder = trained[0] / "adapters" / "step-000002"
    with pytest.raises(EngineError) as wrong:
        job_page.load_subject("smollm2-135m-instruct", folder, parse_spec(SPEC).runtime)
    assert wrong.value.code == "wrong_base"
    shutil.copytree(folder, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(EngineError) as damaged:
        job_page.load_subject("bridge-tiny", tmp_path / "damaged", parse_spec(SPEC).runtime)
    assert damaged.value.code == "adapter_damaged"


def test_answers_of_another_adapter_of_the_same_name_are_not_gone_on_from(trained, tmp_path):
    folder = trained[0] / "adapters" / "step-000002"
    with evaluation(tmp_path / "adapter", adapter=folder):
        pass  # its directory says of which adapter it is
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    (again / MANIFEST).write_text((again / MANIFEST).read_text() + " ")
    with pytest.raises(EngineError) as other:
        evaluation(tmp_path / "adapter", adapter=again)
    assert (other.value.code, other.value.param) == ("spec_changed", "adapter")
