"""Who is next, who may run, and what it costs the project, on SQLite and on Postgres."""

from __future__ import annotations

import time
from typing import Any

import pytest
from sqlalchemy import select, update

from service.store import JobRow, NotFound, Offer, OutboxRow, ProjectRow, Store
from service.store.database import epoch_now
from service.store.leases import LONGEST_BACKOFF, backoff
from service.store.queues import QUEUES
from tests.support.jobs import LONG, in_parallel, submit

GPU_WORKER = Offer(gpus=2, free=2)
CPU_WORKER = Offer(("any", "cpu"), gpus=0, free=0)


def claimed(store: Store, times: int, offer: Offer | None = None) -> list[str | None]:
    """The jobs that so many looks take, in order."""
    claims = [store.claim_next("w", LONG, *([offer] if offer else [])) for _ in range(times)]
    return [claim.job.id if claim else None for claim in claims]


def project(store: Store, name: str, **quotas: Any) -> str:
    return store.create_project(name, project_id=name, **quotas).id


# --------------------------------------------------------------------------- order


def test_the_higher_priority_goes_first_then_the_older(store: Store) -> None:
    low, first, second, high = (submit(store, priority=p) for p in (-1, 0, 0, 5))
    assert claimed(store, 5) == [high, first, second, low, None]


def test_projects_take_turns_however_many_jobs_one_has_queued(store: Store) -> None:
    big, small = project(store, "big"), project(store, "small")
    many = [submit(store, project=big) for _ in range(3)]
    few = [submit(store, project=small) for _ in range(2)]
    assert claimed(store, 5) == [many[0], few[0], many[1], few[1], many[2]]


def test_of_projects_with_as_many_running_the_one_served_longest_ago_is_next(store: Store) -> None:
    names = [project(store, name) for name in "abc"]
    for name in names:
        submit(store, project=name)
    for job_id in claimed(store, 3):
        assert job_id
        store.finish(job_id, 1, "succeeded")
    jobs = {name: submit(store, project=name) for name in reversed(names)}
    assert claimed(store, 3) == [jobs["a"], jobs["b"], jobs["c"]]


def test_a_project_whose_jobs_still_run_lets_the_other_go_first(store: Store) -> None:
    busy, idle = project(store, "busy"), project(store, "idle")
    submit(store, project=busy)
    claimed(store, 1)
    before, after = submit(store, project=busy), submit(store, project=idle)
    assert claimed(store, 2) == [after, before]


# --------------------------------------------------------------------------- queues


def test_a_worker_takes_only_what_it_can_serve(store: Store) -> None:
    two, one, none, any_ = (submit(store, gpus=gpus) for gpus in (2, 1, 0, None))
    assert claimed(store, 3, CPU_WORKER) == [none, any_, None]
    assert store.claim(one, "w", LONG, CPU_WORKER) is None
    assert claimed(store, 3, Offer(gpus=2, free=1)) == [one, None, None]
    assert claimed(store, 1, GPU_WORKER) == [two]
    held = {job_id: store.get_job(job_id).gpus_held for job_id in (two, one, none, any_)}
    assert held == {two: 2, one: 1, none: 0, any_: 0}


def test_a_job_without_a_wish_gets_a_gpu_where_there_is_one(store: Store) -> None:
    first, second = submit(store), submit(store)
    claim = store.claim_next("w", LONG, Offer(gpus=1, free=1))
    assert claim
    assert (claim.job.id, claim.gpus) == (first, 1)
    assert store.claim_next("w", LONG, Offer(gpus=1, free=0)) is None
    assert store.attempts(first)[0].gpus == 1
    assert store.get_job(second).status == "queued"


# --------------------------------------------------------------------------- what broke down

BROKE = {"category": "infra", "code": "engine_killed", "message": "killed."}
FULL = {"category": "infra", "code": "disk_full", "message": "no room."}


def break_down(store: Store, job_id: str, worker: str = "w:0", error: Any = BROKE) -> JobRow:
    """A worker takes the job and gives it back as broken down (or, without an error, in order)."""
    claim = store.claim(job_id, worker, LONG)
    assert claim
    return store.release(job_id, claim.attempt, error)


def test_each_breakdown_in_a_row_doubles_the_wait_and_a_random_part_is_taken_off() -> None:
    for times in range(1, 20):
        waits = {backoff(5.0, times) for _ in range(50)}
        longest = min(5.0 * 2 ** (times - 1), LONGEST_BACKOFF)
        assert longest / 2 <= min(waits) < max(waits) <= longest
    assert backoff(5.0, 10_000) <= LONGEST_BACKOFF


def test_a_job_that_broke_down_is_offered_to_nobody_until_its_time_has_come(store: Store) -> None:
    store.retry_seconds = 60
    with store.read() as session:
        before = session.scalar(select(epoch_now())) or 0.0
    job_id, other = submit(store), submit(store)
    job = break_down(store, job_id)
    assert job.status == "queued"
    assert job.not_before is not None
    assert 30 <= job.not_before - before < 90
    assert claimed(store, 2) == [other, None]
    assert store.claim(job_id, "w:0", LONG) is None, "a message too many is no way around"
    assert send(store) == []
    assert store.overdue_job(0, "w:0") is None
    store.announce_worker("w", QUEUES, gpus=8, slots=1, seconds=LONG)
    said = store.waiting_for([store.get_job(job_id)])[job_id]
    assert said == f"its next try at {job.retry_at:%H:%M:%S} UTC, as attempt 1 broke down: killed."
    with store.write() as session:
        session.execute(update(JobRow).where(JobRow.id == job_id).values(not_before=before))
        session.execute(update(OutboxRow).values(not_before=None))
    assert store.waiting_for([store.get_job(job_id)])[job_id] == "a free worker"
    assert send(store) == [job_id]
    claim = store.claim(job_id, "w:0", LONG)
    assert claim
    assert claim.job.not_before is None


def test_a_job_that_was_handed_back_in_order_waits_for_nothing(store: Store) -> None:
    store.retry_seconds = 60
    job_id = submit(store)
    assert break_down(store, job_id, error=None).not_before is None
    assert claimed(store, 1) == [job_id]


def test_a_lost_worker_counts_as_a_breakdown(store: Store) -> None:
    store.retry_seconds = 60
    job_id = submit(store)
    store.claim(job_id, "w:0", -1)
    assert store.requeue_expired() == [job_id]
    assert store.get_job(job_id).retry_at is not None
    assert claimed(store, 1) == [None]


def test_an_owner_who_asks_need_not_wait(store: Store) -> None:
    store.retry_seconds = 60
    resumed, paused, retried = submit(store), submit(store), submit(store)
    for job_id in (resumed, paused):
        break_down(store, job_id)
    store.request(resumed, "resume")
    store.request(paused, "pause")
    assert store.get_job(paused).retry_at is None, "it is not tried again by itself"
    store.request(paused, "resume")
    break_down(store, retried)
    store.request(retried, "cancel")
    store.request(retried, "retry")
    assert claimed(store, 4) == [resumed, paused, retried, None]


def test_a_worker_without_room_for_a_job_leaves_it_to_others_that_live(store: Store) -> None:
    for name in ("a", "b", "c"):
        store.announce_worker(name, ["any", "cpu"], gpus=0, slots=2, seconds=LONG)
    store.announce_worker("d", ["gpu"], gpus=1, slots=2, seconds=LONG)
    job_id, next_one = submit(store), submit(store)

    def may(worker: str) -> bool:
        return store.overdue_job(0, f"{worker}:0") == job_id

    assert [may(name) for name in "abc"] == [True, True, True]
    break_down(store, job_id, "a:0", FULL)
    assert [may(name) for name in "abc"] == [False, True, True]
    assert store.claim(job_id, "a:1", LONG) is None, "nor to another slot of the same"
    assert store.overdue_job(0, "a:1") == next_one, "it is not held up by the job it cannot have"
    break_down(store, job_id, "b:0", FULL)
    assert [may(name) for name in "abc"] == [False, False, True]
    store.retire_worker("c")
    assert [may(name) for name in "ab"] == [True, True], "one that lives is better than none"
    job = break_down(store, job_id, "a:0", FULL)
    assert (job.status, job.error and job.error["code"]) == ("failed", "disk_full")
    store.request(job_id, "retry")
    store.announce_worker("c", ["any"], gpus=0, slots=1, seconds=LONG)
    assert may("a"), "its owner may have made room"


def test_a_breakdown_for_another_reason_may_be_tried_by_the_same_worker(store: Store) -> None:
    for name in ("a", "b"):
        store.announce_worker(name, ["any"], gpus=0, slots=2, seconds=LONG)
    job_id = submit(store)
    break_down(store, job_id, "a:0", BROKE)
    assert store.claim(job_id, "a:0", LONG)


# --------------------------------------------------------------------------- quotas


def test_racing_workers_never_exceed_a_projects_running_jobs(store: Store) -> None:
    name = project(store, "p", max_running=2)
    jobs = [submit(store, project=name) for _ in range(6)]
    won: list[str] = []

    def work() -> None:
        for job_id in jobs:  # as messages do, and as the local dispatcher does
            if claim := store.claim(job_id, "w", LONG) or store.claim_next("w", LONG):
                won.append(claim.job.id)

    in_parallel(work, 4)
    assert len(won) == len(set(won)) == 2
    assert store.count_jobs() == {"running": 2, "queued": 4}
    store.finish(won[0], 1, "succeeded")
    assert len([j for j in claimed(store, 2) if j]) == 1


def test_a_full_project_keeps_nobody_else_waiting(store: Store) -> None:
    full = project(store, "full", max_running=1)
    first = submit(store, project=full, priority=9)
    submit(store, project=full, priority=9)
    other = submit(store)
    assert claimed(store, 3) == [first, other, None]


def test_gpu_seconds_are_counted_and_the_quota_stops_what_takes_a_gpu(store: Store) -> None:
    name = project(store, "p", gpu_hours=0.3 / 3600)
    job_id = submit(store, project=name, gpus=2)
    assert claimed(store, 1, GPU_WORKER) == [job_id]
    time.sleep(0.2)
    submit(store, project=name, gpus=1)
    cpu = submit(store, project=name, gpus=0)
    assert claimed(store, 2, GPU_WORKER) == [cpu, None], "what runs counts already: 0.4 of 0.3 s"
    assert store.project(name).gpu_seconds_used == 0
    store.release(job_id, 1)
    used = store.project(name).gpu_seconds_used
    assert 0.4 <= used < 60
    store.finish(cpu, 1, "succeeded")
    assert store.project(name).gpu_seconds_used == used
    assert claimed(store, 1, GPU_WORKER) == [None]
    store.update_project(name, name="p", max_running=None, gpu_hours=1)
    assert claimed(store, 1, GPU_WORKER) == [job_id]


def test_a_lost_attempt_costs_what_its_lease_covered(store: Store) -> None:
    job_id = submit(store, gpus=2)
    assert store.claim_next("w", LONG, GPU_WORKER)
    with store.write() as session:  # claimed a minute ago for ten seconds
        job = session.get_one(JobRow, job_id)
        assert job.claimed_at is not None
        job.claimed_at -= 60
        job.lease_expires_at = job.claimed_at + 10
    assert store.requeue_expired() == [job_id]
    assert store.project("default").gpu_seconds_used == pytest.approx(20)
    assert store.get_job(job_id).gpus_held == 0


def test_a_job_of_no_project_is_refused(store: Store) -> None:
    with pytest.raises(NotFound, match="'nobody'"):
        submit(store, project="nobody")
    assert store.count_jobs() == {}


# --------------------------------------------------------------------------- messages


def send(store: Store, window: int = 2) -> list[str]:
    """What the relay sends now."""
    sent = []
    while found := store.next_message(window):
        store.mark_sent(found[0])
        sent.append(found[0].job_id)
    return sent


def test_few_messages_lie_at_the_broker_so_that_a_later_job_can_overtake(store: Store) -> None:
    jobs = [submit(store) for _ in range(4)]
    assert send(store) == jobs[:2]
    urgent = submit(store, priority=1)
    assert send(store) == []
    assert store.claim(jobs[0], "w", LONG)
    assert send(store) == [urgent]
    gpu = submit(store, gpus=1)
    assert send(store) == [gpu], "each queue has a window of its own"
    found = store.next_message(100)
    assert found
    assert (found[0].job_id, found[1]) == (jobs[2], "any")


def test_a_job_that_no_worker_serves_holds_back_none_of_its_project(store: Store) -> None:
    """Told of, it would count as under way."""
    name = project(store, "p", max_running=1)
    store.announce_worker("w:1", ("any", "cpu"), gpus=0, slots=1, seconds=LONG)
    big, small = submit(store, project=name, gpus=8), submit(store, project=name, gpus=0)
    assert send(store) == [small]
    assert claimed(store, 1, CPU_WORKER) == [small]
    store.finish(small, 1, "succeeded")
    store.announce_worker("w:2", ("gpu:8",), gpus=8, slots=1, seconds=LONG)
    assert send(store) == [big]
    later = submit(store, project=name, gpus=0)
    assert send(store) == []
    store.retire_worker("w:2")
    time.sleep(0.02)
    assert store.resend_unclaimed(0.01, at_broker={"gpu:8": 1}) == 1, "its worker has left"
    assert send(store) == [later]


def test_a_message_that_was_declined_before_it_was_marked_is_sent_again(store: Store) -> None:
    name = project(store, "p", max_running=1)
    first, second = submit(store, project=name), submit(store, project=name)
    assert store.claim(first, "w", LONG)
    (message,) = (m for m in store.outbox_batch() if m.job_id == second)
    assert store.claim(second, "w", LONG) is None, "declined by a worker that was fast"
    store.mark_sent(message)
    assert [m.job_id for m in store.outbox_batch()] == [second]


def test_messages_go_out_in_the_order_of_claims_and_within_the_quotas(store: Store) -> None:
    big, small = project(store, "big", max_running=1), project(store, "small")
    first, second = submit(store, project=big), submit(store, project=big)
    other = [submit(store, project=small) for _ in range(2)]
    assert send(store, window=9) == [first, *other], "the second would exceed the quota"
    assert store.claim(first, "w", LONG)
    assert send(store, window=9) == []
    store.finish(first, 1, "succeeded")
    assert send(store, window=9) == [second]


def test_a_claim_that_is_declined_comes_again_later(store: Store) -> None:
    name = project(store, "p", max_running=1)
    first, second = submit(store, project=name), submit(store, project=name)
    for message in store.outbox_batch():
        store.mark_sent(message)
    assert store.claim(first, "w", LONG)
    assert store.claim(second, "w", LONG) is None
    job = store.get_job(second)
    assert (job.status, job.attempt, store.attempts(second)) == ("queued", 0, [])
    store.finish(first, 1, "succeeded")
    assert send(store) == [], "not at once: it would go to and fro"
    with store.write() as session:
        session.execute(update(OutboxRow).values(not_before=1.0))
    assert send(store) == [second]
    assert store.claim(second, "w", LONG)


def test_workers_are_known_as_long_as_they_are_heard_of(store: Store) -> None:
    store.announce_worker("a", ["any", "gpu"], gpus=1, slots=1, seconds=LONG)
    store.announce_worker("b", QUEUES, gpus=8, slots=2, seconds=0.01)
    store.announce_worker("a", ["any"], gpus=1, slots=1, seconds=LONG)
    time.sleep(0.05)
    assert [(w.id, w.queues) for w in store.live_workers()] == [("a", ["any"])]
    store.retire_worker("a")
    assert store.live_workers() == []


def test_the_default_project_is_there(store: Store) -> None:
    with store.read() as session:
        assert session.scalars(select(ProjectRow.id)).all() == ["default"]
