"""What the store builds on: the states of a job, ids, and text that every database can hold."""

from __future__ import annotations

import math

from service.store import STATUSES, TERMINAL, TRANSITIONS, new_id
from service.store.database import clean, database_url


def test_every_state_can_be_left_or_is_an_end() -> None:
    assert set(STATUSES) == set().union(*TRANSITIONS.values()) | {"queued"}
    assert {"succeeded", "failed", "cancelled"} == TERMINAL


def test_every_job_can_end() -> None:
    reachable = set(TERMINAL)
    while grown := {s for s in STATUSES if TRANSITIONS[s] & reachable} - reachable:
        reachable |= grown
    assert reachable == set(STATUSES)


def test_ids_sort_by_time_and_never_repeat() -> None:
    ids = [new_id("job") for _ in range(2000)]
    assert len(set(ids)) == 2000
    assert [i[:15] for i in ids] == sorted(i[:15] for i in ids)
    assert {len(i) for i in ids} == {20}


def test_clean_leaves_nothing_a_database_refuses() -> None:
    odd = {"a\x00": [math.nan, math.inf, 1.5, "x\x00"], "b": (None, True, 2**60)}
    assert clean(odd) == {"a\ufffd": [None, None, 1.5, "x\ufffd"], "b": [None, True, 2**60]}


def test_urls_as_people_write_them_get_the_driver() -> None:
    expected = "postgresql+psycopg://u:p%40ss@h/db"
    for scheme in ("postgres", "postgresql", "postgresql+psycopg"):
        assert database_url(f"{scheme}://u:p%40ss@h/db") == expected
