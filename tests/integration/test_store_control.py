"""What an owner can ask of a job in each status, on SQLite and on Postgres."""

from __future__ import annotations

import time
from typing import get_args

import pytest

from bridge_engine import events as ev
from service.store import (
    REQUESTS,
    STATUSES,
    TERMINAL,
    Conflict,
    NotFound,
    Request,
    StaleAttempt,
    Store,
)
from tests.support.jobs import LONG, checkpoint, metric, numbered, run_to, submit

EFFECTS = {
    "pause": {"queued": "paused", "running": "pausing", "pausing": "pausing", "paused": "paused"},
    "resume": {"queued": "queued", "running": "running", "pausing": "running", "paused": "queued"},
    "cancel": {
        **{"queued": "cancelled", "running": "cancelling", "pausing": "cancelling"},
        **{"paused": "cancelled", "cancelling": "cancelling", "cancelled": "cancelled"},
        **{"succeeded": "succeeded", "failed": "failed"},
    },
    "retry": {"failed": "queued", "cancelled": "queued"},
}
"""Written down here once more: a change of the table must be meant."""
WANTED = {"pausing": "pause", "paused": "pause", "cancelling": "cancel", "cancelled": "cancel"}


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("request_", get_args(Request))
def test_each_request_in_each_status(store: Store, request_: Request, status: str) -> None:
    job_id = run_to(store, status)
    before = store.get_job(job_id)
    after = EFFECTS[request_].get(status)
    if after is None:
        with pytest.raises(Conflict, match=f"is {status} and cannot be") as refused:
            store.request(job_id, request_)
        assert refused.value.code == f"cannot_{request_}"
        for instead in refused.value.allowed or []:
            if instead != "fork":
                assert EFFECTS[instead][status] != status, "what is offered changes something"
        assert "fork" in (refused.value.allowed or [])
        job = store.get_job(job_id)
        assert (job.status, job.wanted) == (status, before.wanted), "a refusal changes nothing"
    else:
        for _ in range(2):
            job = store.request(job_id, request_)
            assert job.status == after, "asking twice is the same as once"
            assert job.wanted == WANTED.get(after, "run")
    waiting = [message.job_id for message in store.outbox_batch()]
    assert waiting == ([job_id] if job.status == "queued" else [])
    assert (job.finished_at is not None) == (job.status in TERMINAL)
    held = job.status in ("running", "pausing", "cancelling")
    assert (job.worker_id is not None, job.lease_expires_at is not None) == (held, held)


def test_the_table_is_what_is_tested() -> None:
    assert REQUESTS == EFFECTS


def test_a_request_about_no_job_is_not_found(store: Store) -> None:
    with pytest.raises(NotFound):
        store.request("job_nope", "pause")


# --------------------------------------------------------------------------- pause and resume


def test_a_worker_hears_of_the_pause_and_hands_the_job_over_as_paused(store: Store) -> None:
    job_id = run_to(store, "running")
    store.request(job_id, "pause")
    assert store.heartbeat(job_id, 1, LONG) == "pause"
    job = store.release(job_id, 1)
    assert (job.status, job.wanted, job.finished_at) == ("paused", "pause", None)
    assert [a.outcome for a in store.attempts(job_id)] == ["paused"]
    assert store.claim(job_id, "w", LONG) is None
    assert store.claim_next("w", LONG) is None
    assert store.request(job_id, "resume").status == "queued"
    claim = store.claim_next("w", LONG)
    assert claim
    assert (claim.job.id, claim.attempt, claim.job.lost_attempts) == (job_id, 2, 0)


def test_resumed_before_it_left_the_job_is_queued_again(store: Store) -> None:
    """The engine may have been told to stop already: it saves and leaves all the same."""
    job_id = run_to(store, "pausing")
    store.request(job_id, "resume")
    assert store.wanted(job_id, 1) == "run"
    assert store.release(job_id, 1).status == "queued"


@pytest.mark.parametrize(
    ("status", "becomes"), [("pausing", "paused"), ("cancelling", "cancelled")]
)
def test_a_lost_workers_job_becomes_what_it_was_on_its_way_to(
    store: Store, status: str, becomes: str
) -> None:
    job_id = submit(store)
    store.claim(job_id, "w", 0.01)
    store.request(job_id, "pause" if status == "pausing" else "cancel")
    time.sleep(0.05)
    assert store.requeue_expired() == []
    assert store.get_job(job_id).status == becomes
    assert [a.outcome for a in store.attempts(job_id)] == ["lost"]
    with pytest.raises(StaleAttempt):
        store.release(job_id, 1)


@pytest.mark.parametrize("status", ["succeeded", "failed"])
def test_a_run_may_end_before_it_hears_of_the_pause(store: Store, status: str) -> None:
    job_id = run_to(store, "pausing")
    assert store.finish(job_id, 1, status).status == status  # type: ignore[arg-type]


# --------------------------------------------------------------------------- retry


def test_a_retry_goes_on_from_the_checkpoint_with_a_fresh_budget(store: Store) -> None:
    job_id = submit(store)
    for attempt in (1, 2, 3):
        assert store.get_job(job_id).status == "queued"
        assert store.claim(job_id, "w", LONG)
        if attempt == 1:
            store.append_events(job_id, 1, numbered(checkpoint(4), ev.Log(message="x")))
        store.release(job_id, attempt, {"code": "engine_killed", "message": "killed."})
    failed = store.get_job(job_id)
    assert (failed.status, failed.lost_attempts) == ("failed", 3)
    job = store.request(job_id, "retry")
    assert (job.status, job.lost_attempts, job.retries, job.error) == ("queued", 0, 1, None)
    assert (job.finished_at, job.checkpoint_step, job.retried_seq) == (None, 4, 2)
    assert store.request(job_id, "retry").retries == 1, "asking twice is the same as once"
    claim = store.claim(job_id, "w", LONG)
    assert claim
    assert claim.attempt == 4, "attempts are counted on: an old one stays refused"
    assert store.request(job_id, "retry").status == "running", "as it is being retried"


def test_a_retry_of_what_never_ended_is_refused(store: Store) -> None:
    for status in ("queued", "running"):
        job_id = run_to(store, status)
        with pytest.raises(Conflict) as refused:
            store.request(job_id, "retry")
        assert refused.value.allowed == ["pause", "cancel", "fork"]


def test_figures_of_a_failed_attempt_stand_until_the_retry_says_otherwise(store: Store) -> None:
    job_id = submit(store)
    store.claim(job_id, "w", LONG)
    failed = ev.Failed(step=2, category="user", code="not_finite", message="no number")
    store.append_events(job_id, 1, numbered(metric(1), failed))
    store.finish(job_id, 1, "failed", error={"code": "not_finite"})
    store.request(job_id, "retry")
    assert store.metrics(job_id)["reward"] == [(1, 0.1)]
    store.claim(job_id, "w", LONG)
    store.append_events(job_id, 2, numbered(ev.Resume(step=0), start=3))
    assert store.metrics(job_id) == {}


# --------------------------------------------------------------------------- priority


@pytest.mark.parametrize("status", STATUSES)
def test_priority_can_be_changed_while_the_job_waits(store: Store, status: str) -> None:
    job_id = run_to(store, status)
    if status in ("queued", "paused"):
        assert store.set_priority(job_id, 7).priority == 7
        return
    assert store.set_priority(job_id, 0).priority == 0, "as it is"
    with pytest.raises(Conflict) as refused:
        store.set_priority(job_id, 7)
    assert refused.value.code == "not_waiting"
    assert store.get_job(job_id).priority == 0
