"""What the store makes of a run's events, on SQLite and on Postgres."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from sqlalchemy import event

from bridge_engine import events as ev
from bridge_engine.evaluation.spec import EvaluationSpec
from service.store import NotFound, Store
from tests.support.jobs import (
    LONG,
    checkpoint,
    in_parallel,
    metric,
    numbered,
    run_to,
    sample,
    submit,
)


@pytest.fixture
def job_id(store: Store) -> str:
    """A running job, attempt 1."""
    return run_to(store, "running")


def everything(store: Store, job_id: str) -> object:
    job = store.get_job(job_id)
    return (
        [(e.seq, e.type, e.step, e.attempt, e.data) for e in store.events_after(job_id)],
        store.metrics(job_id),
        [(s.step, s.completion) for s in store.samples(job_id)],
        [(c.step, c.accuracy, c.best) for c in store.checkpoints(job_id)],
        [(a.name, a.path) for a in store.adapters(job_id)[0]],
        (job.latest, job.progress_step, job.best_step, job.checkpoint_step),
    )


def test_appending_twice_is_the_same_as_once(store: Store, job_id: str) -> None:
    batch = numbered(metric(1), sample(1), checkpoint(1, 0.5), metric(2), ev.Log(message="x"))
    assert store.append_events(job_id, 1, batch) == 5
    before = everything(store, job_id)
    assert store.append_events(job_id, 1, batch) == 0
    assert store.append_events(job_id, 1, batch[2:]) == 0
    assert everything(store, job_id) == before
    assert store.last_seq(job_id) == 5


def test_overlapping_batches_append_what_is_new(store: Store, job_id: str) -> None:
    batch = numbered(metric(1), sample(1), metric(2), sample(2))
    store.append_events(job_id, 1, batch[:3])
    assert store.append_events(job_id, 1, batch[1:]) == 1
    assert store.metrics(job_id) == {"reward": [(1, 0.1), (2, 0.2)]}
    assert len(store.samples(job_id)) == 2


def test_racing_appends_store_each_event_once(store: Store, job_id: str) -> None:
    batch = numbered(*(e for step in range(20) for e in (metric(step), sample(step))))
    in_parallel(lambda: store.append_events(job_id, 1, batch), 4)
    assert [e.seq for e in store.events_after(job_id)] == list(range(1, 41))
    assert len(store.samples(job_id)) == 20


def test_samples_are_paged_by_step_and_id(store: Store, job_id: str) -> None:
    written = numbered(*(sample(step) for step in (1, 2, 2, 3, 3)))
    store.append_events(job_id, 1, written)
    everyone = [(s.step, s.id) for s in store.samples(job_id)]
    assert everyone == sorted(everyone, key=lambda key: (-key[0], key[1]))
    paged, after = [], None
    while page := store.samples(job_id, limit=2, after=after):
        paged += [(s.step, s.id) for s in page]
        after = page[-1].id
    assert paged == everyone
    assert [s.step for s in store.samples(job_id, step=2, after=everyone[2][1])] == [2]
    for gone in (10**17, 0):
        with pytest.raises(NotFound, match=str(gone)):
            store.samples(job_id, after=gone)
    with pytest.raises(NotFound):
        store.samples(run_to(store, "running"), after=everyone[0][1])


def test_resume_voids_later_rows(store: Store, job_id: str) -> None:
    store.append_events(
        job_id,
        1,
        numbered(
            *(metric(1), sample(1), checkpoint(1, 0.4)),
            *(metric(2), sample(2), checkpoint(2, 0.9), metric(3, reward=0.3, gain=1.0)),
        ),
    )
    assert store.get_job(job_id).adapter == f"{job_id}@2"
    store.append_events(job_id, 1, numbered(ev.Resume(step=1), start=8))
    assert store.metrics(job_id) == {"reward": [(1, 0.1)]}
    assert [s.step for s in store.samples(job_id)] == [1]
    assert [(c.step, c.best) for c in store.checkpoints(job_id)] == [(1, True)]
    assert [a.name for a in store.adapters(job_id)[0]] == [f"{job_id}@1"]
    job = store.get_job(job_id)
    assert (job.progress_step, job.best_step, job.checkpoint_step) == (1, 1, 1)
    assert job.latest == {"reward": 0.1}
    assert len(store.events_after(job_id)) == 8, "events are history: they stay"


def test_resume_within_a_batch_voids_only_what_came_before_it(store: Store, job_id: str) -> None:
    events = numbered(
        metric(1), metric(2, reward=0.5), sample(2), ev.Resume(step=1), metric(2), sample(2, "5")
    )
    store.append_events(job_id, 1, events)
    assert store.metrics(job_id) == {"reward": [(1, 0.1), (2, 0.2)]}
    assert [s.completion for s in store.samples(job_id)] == ["5"]


def test_best_is_the_most_accurate_checkpoint(store: Store, job_id: str) -> None:
    accuracies = {1: 0.5, 2: 0.7, 3: None, 4: 0.7, 5: 0.6}
    for seq, (step, accuracy) in enumerate(accuracies.items(), 1):
        store.append_events(job_id, 1, numbered(checkpoint(step, accuracy), start=seq))
    assert [c.step for c in store.checkpoints(job_id) if c.best] == [4], "of equals the latest"
    assert store.adapter(job_id).step == 4
    assert store.adapter(f"{job_id}@best").step == 4
    assert store.adapter(f"{job_id}@latest").step == 5
    assert store.adapter(f"{job_id}@3").name == f"{job_id}@3"


def test_an_adapter_has_the_template_that_its_run_decided_on(store: Store, job_id: str) -> None:
    decided = {"kind": "chat", "system": None, "suffix": "!"}
    store.append_events(job_id, 1, numbered(checkpoint(1)))
    event = checkpoint(2).model_copy(update={"template": decided})
    store.append_events(job_id, 1, numbered(event, start=2))
    assert store.adapter(f"{job_id}@1").template["kind"] == "auto", "an older run said none"
    assert store.adapter(f"{job_id}@2").template == decided


def test_unknown_adapters_say_what_is_missing(store: Store, job_id: str) -> None:
    with pytest.raises(NotFound, match="no job 'job_x'"):
        store.adapter("job_x@best")
    with pytest.raises(NotFound, match="no adapter yet"):
        store.adapter(job_id)
    store.append_events(job_id, 1, numbered(checkpoint(4)))
    assert store.adapter(job_id).step == 4, "the newest where nothing was measured"
    with pytest.raises(NotFound, match="no accuracy was measured"):
        store.adapter(f"{job_id}@best")
    with pytest.raises(NotFound, match="saved: 4"):
        store.adapter(f"{job_id}@5")
    with pytest.raises(NotFound, match="stands a step"):
        store.adapter(f"{job_id}@newest")


def queries(store: Store) -> list[str]:
    """From now on every query goes onto this list."""
    asked: list[str] = []

    @event.listens_for(store.engine, "before_cursor_execute")
    def _note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        asked.extend([statement] * statement.startswith("SELECT"))

    return asked


NAMES = {
    "JOB@2": "JOB@2",
    "JOB@2-student": "JOB@2-student",
    "JOB": "JOB@2",
    "JOB@best": "JOB@2",
    "JOB@best-student": "JOB@2-student",
    "JOB@latest": "JOB@4",
    "JOB@latest-student": "JOB@4-student",
    "tutor": "JOB@4-student",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_every_form_is_found_by_one_query(store: Store, job_id: str, name: str) -> None:
    """Every request to an adapter asks."""
    for seq, (step, accuracy) in enumerate({2: 0.7, 4: 0.5}.items(), 1):
        saved = checkpoint(step, accuracy)
        saved.student, saved.student_sha256, saved.student_rank = f"{step}-student", "f" * 64, 4
        store.append_events(job_id, 1, numbered(saved, start=seq))
    store.set_alias("tutor", f"{job_id}@4-student")
    asked = queries(store)
    found = store.adapter(name.replace("JOB", job_id))
    assert found.name == NAMES[name].replace("JOB", job_id)
    assert len(asked) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_every_form_follows_what_becomes_of_the_job(
    store: Store, job_id: str, name: str
) -> None:
    name = name.replace("JOB", job_id)
    with pytest.raises(NotFound, match=r"no adapter yet|no job 'tutor'"):
        store.adapter(name)
    saved = checkpoint(2, 0.7)
    saved.student, saved.student_sha256, saved.student_rank = "student", "f" * 64, 4
    store.append_events(job_id, 1, numbered(saved))
    store.set_alias("tutor", job_id)
    assert store.adapter(name).step == 2
    saved.sha256 = saved.student_sha256 = "e" * 64
    store.append_events(job_id, 1, numbered(ev.Resume(step=0), saved, start=2))
    if name == "tutor":  # it went with what it meant
        with pytest.raises(NotFound, match="no job 'tutor'"):
            store.adapter(name)
        store.set_alias("tutor", f"{job_id}@2")
    assert store.adapter(name).sha256 == "e" * 64, "saved again with other bytes"
    store.finish(job_id, 1, "succeeded", result={})
    store.mark_deleted(job_id)
    with pytest.raises(NotFound, match=f"no job '({job_id}|tutor)'"):
        store.adapter(name)


def test_the_best_is_asked_for_where_none_was_measured(store: Store, job_id: str) -> None:
    store.append_events(job_id, 1, numbered(checkpoint(2)))
    assert store.adapter(job_id).step == store.adapter(f"{job_id}@latest").step == 2
    with pytest.raises(NotFound, match=f"{job_id}@latest is step 2"):
        store.adapter(f"{job_id}@best")


def test_adapter_status_is_kept(store: Store, job_id: str) -> None:
    store.append_events(job_id, 1, numbered(checkpoint(4)))
    assert store.adapter(job_id).status == "registered"
    assert store.mark_adapter(store.adapter(job_id), "failed", "no answer")
    assert (store.adapter(job_id).status, store.adapter(job_id).error) == ("failed", "no answer")


def test_what_is_found_out_about_weights_is_not_said_of_others_of_their_name(
    store: Store, job_id: str
) -> None:
    store.append_events(job_id, 1, numbered(checkpoint(4)))
    before = store.adapter(job_id)
    before.sha256 = "another"  # what was loaded; saved again since
    assert not store.mark_adapter(before, "ready")
    assert store.adapter(job_id).status == "registered"


def test_adapter_pages(store: Store, job_id: str) -> None:
    store.append_events(job_id, 1, numbered(*(checkpoint(step) for step in (1, 2, 3))))
    page, more = store.adapters(limit=2)
    assert ([a.step for a in page], more) == ([3, 2], True)
    page, more = store.adapters(after=page[-1].name, limit=2)
    assert ([a.step for a in page], more) == ([1], False)


def test_odd_text_and_figures_are_kept_alike(store: Store, job_id: str) -> None:
    odd = 'λ\u2028"\x00"\U0001f600'
    events = numbered(sample(1, odd), metric(1, reward=None, big=1e300), ev.Log(message=odd))
    store.append_events(job_id, 1, events)
    kept = odd.replace("\x00", "\ufffd")
    assert store.samples(job_id)[0].completion == kept
    assert store.events_after(job_id, 2)[0].data["message"] == kept
    assert store.metrics(job_id) == {"reward": [(1, None)], "big": [(1, 1e300)]}
    done = store.finish(job_id, 1, "succeeded", result={"a": float("nan"), "b": [1, "\x00"]})
    assert store.get_job(done.id).result == {"a": None, "b": [1, "\ufffd"]}


def test_events_page_by_seq(store: Store, job_id: str) -> None:
    store.append_events(job_id, 1, numbered(*(metric(step) for step in range(5))))
    assert [e.seq for e in store.events_after(job_id, 2, limit=2)] == [3, 4]
    (event,) = store.events_after(job_id, 4)
    assert ev.parse(json.dumps(event.data)) == ev.Metric(
        seq=5, time=1.7e9 + 5, step=4, metrics={"reward": 0.4}
    )


# --------------------------------------------------------------------------- metrics


def test_thinning_keeps_extremes_and_ends(store: Store, job_id: str) -> None:
    values = [0.5] * 1000
    values[137], values[803] = 9.0, -9.0
    store.append_events(
        job_id, 1, numbered(*(metric(step, reward=v, few=v) for step, v in enumerate(values)))
    )
    points = store.metrics(job_id, keys=["reward"], max_points=50)["reward"]
    assert len(points) <= 50
    assert (137, 9.0) in points
    assert (803, -9.0) in points
    assert points[0] == (0, 0.5)
    assert points[-1] == (999, 0.5)
    assert points == sorted(points)
    assert set(points) <= set(enumerate(values))


def test_short_series_are_not_thinned(store: Store, job_id: str) -> None:
    figures = [metric(1, a=1.0, b=None), metric(2, a=2.0), metric(3, a=3.0), metric(4, a=4.0)]
    store.append_events(job_id, 1, numbered(*figures))
    whole = {"a": [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)], "b": [(1, None)]}
    assert store.metrics(job_id, max_points=4) == whole == store.metrics(job_id)
    assert store.metrics(job_id, after_step=2) == {"a": [(3, 3.0), (4, 4.0)]}
    assert store.metrics(job_id, keys=["none"]) == {}


def test_thinning_prefers_figures_to_gaps(store: Store, job_id: str) -> None:
    values = [None if step % 2 else float(step) for step in range(100)]
    store.append_events(
        job_id, 1, numbered(*(metric(step, reward=v) for step, v in enumerate(values)))
    )
    points = store.metrics(job_id, max_points=10)["reward"]
    assert sum(value is None for _, value in points) <= 1, "the last point may be a gap"


def test_the_student_alone_is_an_adapter_of_its_own_name_and_never_the_jobs(
    store: Store, job_id: str
) -> None:
    for seq, (step, accuracy) in enumerate({2: 0.7, 4: 0.5}.items(), 1):
        one = checkpoint(step, accuracy)
        one.student, one.student_sha256, one.student_rank = f"adapters/{step}-student", "f" * 64, 4
        one.student_accuracy = 0.9
        store.append_events(job_id, 1, numbered(one, start=seq))
    assert store.adapter(job_id).name == f"{job_id}@2", "the policy, though the student scored more"
    alone = store.adapter(f"{job_id}@best-student")
    assert (alone.name, alone.step, alone.rank) == (f"{job_id}@2-student", 2, 4)
    assert (alone.accuracy, alone.path) == (0.9, "adapters/2-student")
    assert store.adapter(f"{job_id}@latest-student").step == 4
    assert store.adapter(f"{job_id}@4-student").name == f"{job_id}@4-student"
    with pytest.raises(NotFound, match="saved: 2, 2-student, 4, 4-student"):
        store.adapter(f"{job_id}@3-student")
    store.append_events(job_id, 1, numbered(ev.Resume(step=2), start=3))
    assert [a.name for a in store.adapters(job_id)[0]] == [f"{job_id}@2", f"{job_id}@2-student"]


def test_adapters_of_one_step_are_paged_without_losing_or_repeating_one(
    store: Store, job_id: str
) -> None:
    for seq, step in enumerate((1, 2, 3), 1):
        one = checkpoint(step)
        one.student, one.student_sha256, one.student_rank = f"{step}-student", "f" * 64, 4
        store.append_events(job_id, 1, numbered(one, start=seq))
    seen, after = [], None
    while True:
        page, more = store.adapters(job_id, after=after, limit=1)
        seen += [row.name for row in page]
        if not more:
            break
        after = seen[-1]
    assert seen == [f"{job_id}@{s}{end}" for s in (3, 2, 1) for end in ("", "-student")]


def test_a_checkpoint_without_an_adapter_is_a_checkpoint_all_the_same(
    store: Store, job_id: str
) -> None:
    bare = checkpoint(3, 0.5)
    bare.adapter = bare.sha256 = bare.rank = None
    store.append_events(job_id, 1, numbered(bare))
    assert [c.step for c in store.checkpoints(job_id)] == [3]
    assert store.adapters(job_id)[0] == []
    with pytest.raises(NotFound, match="saved: none"):
        store.adapter(job_id)


# --------------------------------------------------------------------------- evaluations


def test_evaluations_are_found_by_the_adapter_they_are_of(store: Store) -> None:
    def evaluated(adapter: str | None, status: Literal["succeeded", "failed"]) -> str:
        asked = EvaluationSpec.model_validate(
            {"kind": "eval", "model": "m", "adapter": adapter, "benchmarks": "arithmetic"}
        )
        job, _ = store.create_job(asked, total_steps=0)
        claim = store.claim(job.id, "w", LONG)
        assert claim is not None
        told = numbered(ev.Phase(phase="evaluating", steps=7))
        store.append_events(job.id, claim.attempt, told)
        store.finish(job.id, claim.attempt, status)
        return job.id

    submit(store)
    first, second = (evaluated("job_a@2", "succeeded") for _ in range(2))
    evaluated("job_a@22", "succeeded")
    evaluated(None, "succeeded")
    evaluated("job_a@2", "failed")
    assert [job.id for job in store.evaluations_of("job_a@2")] == [second, first]
    job = store.get_job(first)
    assert (job.method, job.model, job.total_steps, job.adapter) == ("eval", "m", 7, None)
    assert len(store.list_jobs(kind="eval")[0]) == 5
    assert [job.kind for job in store.list_jobs(kind="train")[0]] == ["train"]
