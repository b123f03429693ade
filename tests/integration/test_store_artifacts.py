"""What the tables say of artifacts, what of it may go, and the deletion of jobs; both databases."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import func, select, update

from bridge_engine import events as ev
from bridge_engine.spec.train import TrainSpec
from bridge_engine.state.checkpoint import publish
from service.artifacts import ArtifactStore
from service.artifacts.removal import remove
from service.settings import Settings
from service.store import Artifact, Conflict, NotFound, StaleAttempt, Store
from service.store.artifacts import publication
from service.store.models import RemainRow, Row
from tests.support.jobs import LONG, checkpoint, metric, numbered, run_to, sample, spec, submit
from worker.sweep import LINGERS_SECONDS, sweep_remains


def published(step: int, attempt: int = 1) -> list[Artifact]:
    """What a checkpoint leaves in the artifact store."""
    paths = [f"checkpoints/step-{step:06d}", f"adapters/step-{step:06d}"]
    hashes = ("a" * 64, "b" * 64)
    return [
        Artifact(path, step, publication("job", path, attempt, sha), sha, 10)
        for path, sha in zip(paths, hashes, strict=True)
    ]


def queued(store: Store, **rules: object) -> str:
    given = spec().model_dump(by_alias=True)
    given["checkpoint"] |= rules
    return store.create_job(TrainSpec.model_validate(given), total_steps=10)[0].id


def save(store: Store, job_id: str, steps: dict[int, float | None]) -> None:
    for seq, (step, accuracy) in enumerate(steps.items(), 1):
        events = numbered(checkpoint(step, accuracy), start=seq)
        store.append_events(job_id, 1, events, published(step))


def adapters(store: Store, job_id: str) -> list[int]:
    return sorted(row.step for row in store.adapters(job_id)[0])


def test_the_rows_of_a_checkpoint_appear_with_its_event(store: Store) -> None:
    job_id = queued(store)
    store.claim(job_id, "w", LONG)
    events = numbered(checkpoint(2))
    store.append_events(job_id, 1, events, published(2))
    store.append_events(job_id, 1, events, published(2))  # the acknowledgement was lost
    row = store.artifact(job_id, "adapters/step-000002")
    assert row is not None
    assert (row.prefix, row.bytes) == (f"job/adapters/step-000002/1-{'b' * 16}", 10)
    with pytest.raises(StaleAttempt):
        store.append_events(job_id, 2, numbered(checkpoint(4), start=2), published(4))
    assert store.artifact(job_id, "adapters/step-000004") is None


def test_a_resume_voids_what_was_published_later(store: Store) -> None:
    job_id = queued(store)
    store.claim(job_id, "w", LONG)
    save(store, job_id, {2: None, 4: None})
    store.append_events(job_id, 1, numbered(ev.Resume(step=2), start=3))
    assert [row.step for row in store.states(job_id)] == [2]
    assert store.garbage(job_id, {"job/adapters/step-000004/1-bbbb"}) == set(), "it may come again"


@pytest.mark.parametrize(
    ("keep", "accuracies", "left"),
    [
        ("all", {2: 0.1, 4: 0.2, 6: 0.1, 8: 0.1}, [2, 4, 6, 8]),
        (1, {2: 0.1, 4: 0.9, 6: 0.1, 8: 0.1}, [4, 8]),
        (2, {2: 0.9, 4: 0.1, 6: 0.1, 8: 0.1}, [2, 6, 8]),
        (2, {2: None, 4: None, 6: None, 8: None}, [6, 8]),
    ],
)
def test_retention_keeps_the_newest_and_always_the_best(
    store: Store, keep: object, accuracies: dict[int, float | None], left: list[int]
) -> None:
    job_id = queued(store, keep=2, keep_adapters=keep)
    store.claim(job_id, "w", LONG)
    save(store, job_id, accuracies)
    dropped = store.retain(job_id, 1)
    assert adapters(store, job_id) == left
    best = store.get_job(job_id).best_step
    assert [row.step for row in store.states(job_id)] == sorted({8, 6, best or 8}, reverse=True)
    gone = [step for step in accuracies if step not in left]
    dead = {2, 4} - {best}
    states = {f"job/checkpoints/step-{step:06d}/1-{'a' * 16}" for step in dead}
    exports = {f"job/adapters/step-{step:06d}/1-{'b' * 16}" for step in gone}
    assert set(dropped.prefixes) == states | exports
    assert {f"adapters/step-{step:06d}" for step in gone} <= set(dropped.paths)
    assert store.adapter(job_id).step in left
    assert [c.step for c in store.checkpoints(job_id) if c.adapter] == left
    assert store.retain(job_id, 1).prefixes == []
    with pytest.raises(StaleAttempt):
        store.retain(job_id, 2)


def test_garbage_is_what_no_row_names_of_attempts_that_are_over(store: Store) -> None:
    job_id = queued(store)
    store.claim(job_id, "w", LONG)
    save(store, job_id, {2: None})
    store.release(job_id, 1)
    store.claim(job_id, "w", LONG)
    named, half, living = (
        f"job/adapters/step-000002/1-{'b' * 16}",
        "job/adapters/step-000004/1-cc",
        "job/adapters/step-000004/2-dd",
    )
    assert store.garbage(job_id, {named, half, living, "job"}) == {half}
    store.finish(job_id, 2, "succeeded")
    assert store.garbage(job_id, {named, half, living}) == {half, living}
    assert store.garbage("job_unknown", {half}) == set(), "another database's"


@pytest.mark.parametrize("status", ["queued", "running", "cancelling"])
def test_a_job_that_has_not_ended_is_not_deleted(store: Store, status: str) -> None:
    job_id = run_to(store, status)
    with pytest.raises(Conflict) as caught:
        store.mark_deleted(job_id)
    assert caught.value.code == "job_not_ended"
    assert store.get_job(job_id).status == status


def test_a_deleted_job_is_gone_for_everybody_and_then_altogether(store: Store) -> None:
    other = submit(store)
    job, _ = store.create_job(spec(), total_steps=10, idempotency_key="once")
    store.claim(job.id, "w", LONG)
    events = [metric(1), sample(1), checkpoint(2), metric(3)]
    store.append_events(job.id, 1, numbered(*events), published(2))
    store.finish(job.id, 1, "succeeded")

    store.mark_deleted(job.id)
    store.mark_deleted(job.id)
    with pytest.raises(NotFound):
        store.get_job(job.id)
    with pytest.raises(NotFound):
        store.adapter(f"{job.id}@2")
    assert [row.id for row in store.list_jobs()[0]] == [other]
    assert store.count_jobs() == {"queued": 1}
    assert store.deleted_jobs() == [job.id]

    store.forget(job.id)
    store.forget(job.id)
    with store.read() as session:
        for table in Row.metadata.sorted_tables:
            if "job_id" in table.columns:
                rows = session.scalar(
                    select(func.count()).select_from(table).where(table.c.job_id == job.id)
                )
                assert rows == 0, table.name
    assert store.deleted_jobs() == []
    with pytest.raises(NotFound):
        store.mark_deleted(job.id)
    again, created = store.create_job(spec(), total_steps=10, idempotency_key="once")
    assert created
    assert again.id != job.id


def folder_with(path: Path, text: str) -> Path:
    publish(path, lambda folder: (folder / "weights").write_text(text))
    return path


def test_what_an_upload_still_brings_of_a_deleted_job_is_swept(
    store: Store, tmp_path: Path
) -> None:
    """Its engine's worker was cut off in the middle, and wakes after everything was removed."""
    settings = Settings(home=tmp_path, artifacts_url=f"file://{tmp_path / 'shared'}")
    artifacts, folder = ArtifactStore(settings.artifacts_url), folder_with(tmp_path / "a", "1")
    deleted, kept = run_to(store, "succeeded"), run_to(store, "succeeded")
    elsewhere = "job_of_another_database"
    for job_id in (deleted, kept, elsewhere):
        artifacts.put(folder, publication(job_id, "adapters/step-000002", 1, "b" * 64))
    store.mark_deleted(deleted)
    remove(deleted, store, settings)
    assert artifacts.publications(deleted) == set()
    artifacts.put(folder, publication(deleted, "adapters/step-000004", 1, "c" * 64))
    sweep_remains(store, artifacts)
    assert artifacts.publications(deleted), "the upload may still go on"
    grow_old(store)
    sweep_remains(store, artifacts)
    assert artifacts.publications(deleted) == set()
    assert store.remains(0) == []
    assert artifacts.publications(kept)
    assert artifacts.publications(elsewhere)


def grow_old(store: Store) -> None:
    """All remains were noted long ago."""
    with store.write() as session:
        session.execute(update(RemainRow).values(noted_at=RemainRow.noted_at - LINGERS_SECONDS))


def test_a_job_that_was_not_marked_is_not_forgotten(store: Store) -> None:
    job_id = run_to(store, "succeeded")
    store.forget(job_id)
    assert store.get_job(job_id).status == "succeeded"
