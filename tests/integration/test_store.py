"""What the store promises about jobs and who works on them, on SQLite and on Postgres."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update

from service.store import (
    STATUSES,
    TERMINAL,
    Conflict,
    NotFound,
    OutboxRow,
    StaleAttempt,
    Store,
)
from tests.support.jobs import (
    LONG,
    checkpoint,
    in_parallel,
    metric,
    numbered,
    run_to,
    spec,
    submit,
)

# --------------------------------------------------------------------------- creating, listing


def test_job_comes_back_as_it_was_given(store: Store) -> None:
    given = spec(steps=7, seed=2**62)
    job, created = store.create_job(given, total_steps=7)
    read = store.get_job(job.id)
    assert created
    assert read.status == "queued"
    assert (read.method, read.model, read.total_steps) == ("bridge", "bridge-tiny", 7)
    assert read.spec == given.model_dump(mode="json", by_alias=True)
    assert list(read.spec) == list(given.model_dump(by_alias=True)), "order of keys"
    assert read.error is None
    assert read.result is None


def test_timestamps_are_utc_and_exact(store: Store) -> None:
    job, _ = store.create_job(spec(), total_steps=10)
    read = store.get_job(job.id)
    assert read.created_at == job.created_at
    assert read.created_at.utcoffset() == timedelta(0)
    assert read.created_at.isoformat().endswith("+00:00")
    assert read.created_at.tzinfo is UTC


def test_job_and_message_are_written_together(store: Store) -> None:
    job_id = submit(store)
    assert [message.job_id for message in store.outbox_batch()] == [job_id]


def test_unknown_job_is_not_found(store: Store) -> None:
    for ask in (store.get_job, store.request_cancel, store.metrics, store.samples, store.attempts):
        with pytest.raises(NotFound, match="'job_nope'"):
            ask("job_nope")


def test_same_key_and_spec_is_one_job(store: Store) -> None:
    first, created = store.create_job(spec(), total_steps=10, idempotency_key="k")
    again, created_again = store.create_job(spec(), total_steps=10, idempotency_key="k")
    assert (created, created_again) == (True, False)
    assert first.id == again.id
    assert len(store.outbox_batch()) == 1


def test_same_key_with_another_spec_is_refused(store: Store) -> None:
    job, _ = store.create_job(spec(seed=1), total_steps=10, idempotency_key="k")
    with pytest.raises(Conflict, match=job.id) as refused:
        store.create_job(spec(seed=2), total_steps=10, idempotency_key="k")
    assert refused.value.code == "idempotency_key_reused"


def test_racing_requests_with_one_key_make_one_job(store: Store) -> None:
    ids, created = [], []

    def create() -> None:
        job, new = store.create_job(spec(), total_steps=10, idempotency_key="k")
        ids.append(job.id)
        created.append(new)

    in_parallel(create, 8)
    assert len(set(ids)) == 1
    assert sum(created) == 1


def test_pages_stay_put_while_jobs_come_in(store: Store) -> None:
    before = [submit(store) for _ in range(5)][::-1]
    page, more = store.list_jobs(limit=2)
    assert ([job.id for job in page], more) == (before[:2], True)
    submit(store)
    page, more = store.list_jobs(after=page[-1].id, limit=2)
    assert ([job.id for job in page], more) == (before[2:4], True)
    page, more = store.list_jobs(after=page[-1].id, limit=2)
    assert ([job.id for job in page], more) == (before[4:], False)


def test_list_filters(store: Store) -> None:
    running, queued = run_to(store, "running"), submit(store, child=True)
    assert [job.id for job in store.list_jobs(status="running")[0]] == [running]
    assert [job.id for job in store.list_jobs(name='{"child": true}')[0]] == [queued]
    assert store.list_jobs(method="sft") == ([], False)
    assert store.count_jobs() == {"running": 1, "queued": 1}


# --------------------------------------------------------------------------- claiming


def test_racing_threads_claim_each_job_once(store: Store) -> None:
    jobs = [submit(store) for _ in range(6)]
    won: list[str] = []

    def claim_all() -> None:
        while claim := store.claim_next("w", LONG):
            won.append(claim.job.id)

    in_parallel(claim_all, 4)
    assert sorted(won) == jobs


def test_racing_processes_claim_a_job_once(store: Store, database_url: str) -> None:
    job_id = submit(store)
    code = (
        "import sys; from service.store import Store; s = Store(sys.argv[1]); s.ping();"
        "print('ready', flush=True); sys.stdin.readline();"
        "print(s.claim(sys.argv[2], 'w', 60) is not None)"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code, database_url, job_id],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for racer in racers:
        assert racer.stdout
        assert racer.stdout.readline() == "ready\n"
    won = [racer.communicate("go\n")[0].strip() for racer in racers]
    assert sorted(won) == ["False", "False", "True"]
    assert store.get_job(job_id).attempt == 1


def test_jobs_are_claimed_in_the_order_they_came(store: Store) -> None:
    jobs = [submit(store) for _ in range(3)]
    claims = [store.claim_next("w", LONG) for _ in range(4)]
    assert [claim.job.id if claim else None for claim in claims] == [*jobs, None]


@pytest.mark.parametrize("status", [s for s in STATUSES if s != "queued"])
def test_only_queued_jobs_can_be_claimed(store: Store, status: str) -> None:
    job_id = run_to(store, status)
    assert store.claim(job_id, "w2", LONG) is None


def test_claim_answers_the_message(store: Store) -> None:
    job_id = submit(store)
    store.claim(job_id, "w", LONG)
    assert store.outbox_batch() == []


# --------------------------------------------------------------------------- leases and fencing


def test_every_write_of_a_stale_attempt_is_refused(store: Store) -> None:
    job_id = submit(store)
    store.claim(job_id, "old", 0.01)
    time.sleep(0.05)
    assert store.requeue_expired() == [job_id]
    before_new_claim = True
    for _ in range(2):
        for write in (
            lambda: store.heartbeat(job_id, 1, LONG),
            lambda: store.append_events(job_id, 1, numbered(metric(1))),
            lambda: store.finish(job_id, 1, "succeeded", result={}),
            lambda: store.release(job_id, 1),
        ):
            with pytest.raises(StaleAttempt, match=job_id):
                write()
        if before_new_claim:
            claim = store.claim(job_id, "new", LONG)
            assert claim
            assert claim.attempt == 2
        before_new_claim = False
    job = store.get_job(job_id)
    assert (job.status, job.worker_id, job.attempt) == ("running", "new", 2)
    assert store.events_after(job_id) == []
    assert [(a.worker_id, a.outcome) for a in store.attempts(job_id)] == [
        ("old", "lost"),
        ("new", None),
    ]


@pytest.mark.parametrize("status", sorted(TERMINAL))
def test_an_ended_job_takes_no_writes(store: Store, status: str) -> None:
    job_id = run_to(store, status)
    with pytest.raises(StaleAttempt):
        store.heartbeat(job_id, 1, LONG)
    with pytest.raises(StaleAttempt):
        store.append_events(job_id, 1, numbered(metric(1)))


def test_heartbeat_keeps_the_lease(store: Store) -> None:
    job_id = submit(store)
    store.claim(job_id, "w", 0.01)
    assert store.heartbeat(job_id, 1, LONG) == "run"
    time.sleep(0.05)
    assert store.requeue_expired() == [], "as long as the heartbeat said, and not the claim"
    assert store.heartbeat(job_id, 1, 0.01) == "run"
    time.sleep(0.05)
    assert store.requeue_expired() == [job_id]


def test_expired_lease_is_requeued_once_with_a_message(store: Store) -> None:
    job_id = submit(store)
    store.claim(job_id, "w", 0.01)
    time.sleep(0.05)
    requeued: list[str] = []
    in_parallel(lambda: requeued.extend(store.requeue_expired()), 4)
    assert requeued == [job_id]
    assert store.get_job(job_id).status == "queued"
    assert [message.job_id for message in store.outbox_batch()] == [job_id]


def lose(store: Store, job_id: str) -> None:
    assert store.claim(job_id, "w", 0.01)
    time.sleep(0.03)
    store.requeue_expired()


def test_job_is_given_up_after_attempts_without_progress(store: Store) -> None:
    job_id = submit(store)
    for _ in range(3):
        assert store.get_job(job_id).status == "queued"
        lose(store, job_id)
    job = store.get_job(job_id)
    assert job.status == "failed"
    assert job.error
    assert (job.error["category"], job.error["code"]) == ("infra", "worker_lost")
    assert job.error["retryable"] is True
    assert "3 times" in job.error["message"]


def test_a_new_checkpoint_resets_the_count(store: Store) -> None:
    job_id = submit(store)
    lose(store, job_id)
    lose(store, job_id)
    claim = store.claim(job_id, "w", LONG)
    assert claim
    store.append_events(job_id, claim.attempt, numbered(checkpoint(4)))
    store.release(job_id, claim.attempt, {"code": "engine_killed", "message": "killed."})
    assert store.get_job(job_id).status == "queued"


def test_an_old_checkpoint_does_not_reset_the_count(store: Store) -> None:
    job_id = submit(store)
    lose(store, job_id)
    claim = store.claim(job_id, "w", LONG)
    assert claim
    store.append_events(job_id, claim.attempt, numbered(checkpoint(4)))
    for seq in (2, 3, 4):
        claim = claim if seq == 2 else store.claim(job_id, "w", LONG)
        assert claim
        store.append_events(job_id, claim.attempt, numbered(checkpoint(4), start=seq))
        store.release(job_id, claim.attempt, {"code": "engine_killed", "message": "killed."})
    job = store.get_job(job_id)
    assert job.status == "failed"
    assert job.error
    assert job.error["code"] == "engine_killed"


def test_handing_back_on_purpose_is_never_counted(store: Store) -> None:
    job_id = submit(store)
    for attempt in range(1, 6):
        assert store.claim(job_id, "w", LONG)
        assert store.release(job_id, attempt).status == "queued"


# --------------------------------------------------------------------------- cancelling


@pytest.mark.parametrize(
    ("status", "after"),
    [
        ("queued", "cancelled"),
        ("running", "cancelling"),
        ("cancelling", "cancelling"),
        ("cancelled", "cancelled"),
        ("succeeded", "succeeded"),
        ("failed", "failed"),
    ],
)
def test_cancel_in_each_status(store: Store, status: str, after: str) -> None:
    job_id = run_to(store, status)
    assert store.request_cancel(job_id).status == after
    assert store.request_cancel(job_id).status == after, "asking twice is the same as once"


def test_cancelled_in_the_queue_is_never_run(store: Store) -> None:
    job_id = submit(store)
    store.request_cancel(job_id)
    assert store.claim_next("w", LONG) is None
    assert store.outbox_batch() == []
    assert store.get_job(job_id).finished_at is not None


def test_worker_hears_of_the_cancel_by_heartbeat(store: Store) -> None:
    job_id = run_to(store, "running")
    store.request_cancel(job_id)
    assert store.heartbeat(job_id, 1, LONG) == "cancel"
    assert store.release(job_id, 1).status == "cancelled"
    assert [a.outcome for a in store.attempts(job_id)] == ["cancelled"]


def test_a_look_at_what_is_wanted_is_fenced_and_renews_nothing(store: Store) -> None:
    job_id = run_to(store, "running")
    lease = store.get_job(job_id).lease_expires_at
    assert store.wanted(job_id, 1) == "run"
    store.request_cancel(job_id)
    assert store.wanted(job_id, 1) == "cancel"
    assert store.get_job(job_id).lease_expires_at == lease
    store.release(job_id, 1)
    with pytest.raises(StaleAttempt):
        store.wanted(job_id, 1)


def test_lost_worker_of_a_cancelled_job_cancels_it(store: Store) -> None:
    job_id = submit(store)
    store.claim(job_id, "w", 0.01)
    store.request_cancel(job_id)
    time.sleep(0.05)
    assert store.requeue_expired() == []
    assert store.get_job(job_id).status == "cancelled"
    assert [a.outcome for a in store.attempts(job_id)] == ["lost"]


def test_jobs_of_dead_workers_alone_are_taken_before_their_lease_ends(store: Store) -> None:
    dead, alive, cancelled, waiting = [submit(store) for _ in range(4)]
    for job_id, worker_id in ((dead, "dead"), (alive, "alive"), (cancelled, "dead")):
        store.claim(job_id, worker_id, LONG)
    store.request_cancel(cancelled)
    assert store.release_lost(lambda worker_id: worker_id == "dead") == [dead]
    states = [store.get_job(job_id).status for job_id in (dead, alive, cancelled, waiting)]
    assert states == ["queued", "running", "cancelled", "queued"]
    job = store.get_job(dead)
    assert (job.lost_attempts, store.attempts(dead)[0].outcome) == (1, "lost")
    assert dead in [message.job_id for message in store.outbox_batch()]
    assert store.release_lost(lambda _: True) == [alive]


def test_a_run_that_ends_before_it_hears_of_the_cancel_has_succeeded(store: Store) -> None:
    job_id = run_to(store, "cancelling")
    assert store.finish(job_id, 1, "succeeded", result={"x": 1}).status == "succeeded"


@pytest.mark.parametrize("status", ["running", "pausing"])
def test_no_worker_ends_a_job_as_cancelled_that_nobody_wants_cancelled(
    store: Store, status: str
) -> None:
    job_id = run_to(store, status)
    with pytest.raises(StaleAttempt):
        store.finish(job_id, 1, "cancelled")
    assert store.get_job(job_id).status == status
    assert store.request_cancel(job_id).status == "cancelling"
    assert store.finish(job_id, 1, "cancelled").status == "cancelled"


# --------------------------------------------------------------------------- the outbox


def send_all(store: Store, *, long_ago: bool = False) -> None:
    """As the relay does, whatever has its turn."""
    batch = store.outbox_batch()
    for message in batch:
        store.mark_sent(message)
    ids = [message.id for message in batch]
    if long_ago:
        with store.write() as session:
            past = datetime.now(UTC) - timedelta(hours=1)
            session.execute(update(OutboxRow).where(OutboxRow.id.in_(ids)).values(sent_at=past))


def test_messages_are_sent_once_and_again_if_lost(store: Store) -> None:
    job_id = submit(store)
    send_all(store)
    assert store.outbox_batch() == []
    assert store.resend_unclaimed(LONG) == 0
    time.sleep(0.02)
    assert store.resend_unclaimed(0.01) == 1
    assert [m.job_id for m in store.outbox_batch()] == [job_id]


def test_a_lost_message_is_sent_again_while_others_wait(store: Store) -> None:
    old = [submit(store) for _ in range(2)]
    send_all(store, long_ago=True)
    young = submit(store)
    send_all(store)
    assert store.resend_unclaimed(LONG, at_broker={"any": 3}) == 0, "none is missing"
    assert store.resend_unclaimed(LONG, at_broker={"any": 2}) == 2, "one is, of the old ones"
    again = [message.job_id for message in store.outbox_batch()]
    assert again == old
    assert young not in again


def test_a_message_lost_on_one_queue_is_no_loss_on_another(store: Store) -> None:
    submit(store)
    needs_gpu = submit(store, gpus=1)
    send_all(store, long_ago=True)
    assert store.resend_unclaimed(LONG, at_broker={"any": 1, "gpu": 0}) == 1
    assert [message.job_id for message in store.outbox_batch()] == [needs_gpu]
