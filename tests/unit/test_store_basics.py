"""What the store builds on: the states of a job, ids, and text that every database can hold."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.store import QUEUES, REQUESTS, STATUSES, TERMINAL, TRANSITIONS, Offer, new_id
from service.store.database import clean, database_url, load_json
from service.store.models import JobRow

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES, st.booleans())
def test_stored_json_is_read_as_the_standard_library_reads_it(value: object, ascii: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii)
    assert repr(load_json(text)) == repr(json.loads(text)), "to the last bit, keys in their order"


def test_half_a_surrogate_pair_is_read_as_it_was_written() -> None:
    assert load_json(r'{"text": "\ud83d"}') == {"text": "\ud83d"}


def test_every_state_can_be_left_or_is_an_end() -> None:
    assert set(STATUSES) == set().union(*TRANSITIONS.values())
    assert {"succeeded", "failed", "cancelled"} == TERMINAL


@pytest.mark.parametrize("request_", REQUESTS)
def test_no_request_takes_a_way_that_the_table_has_not(request_: str) -> None:
    for before, after in REQUESTS[request_].items():
        assert after == before or after in TRANSITIONS[before]
        assert REQUESTS[request_].get(after, after) == after, "asking twice is the same as once"


@pytest.mark.parametrize("status", sorted(TERMINAL))
def test_an_end_is_left_by_a_retry_alone(status: str) -> None:
    ways = {r: e[status] for r, e in REQUESTS.items() if e.get(status, status) != status}
    assert ways == {"retry": "queued"} if status != "succeeded" else ways == {}
    assert TRANSITIONS[status] == frozenset(ways.values())


@pytest.mark.parametrize(
    ("offer", "takes"),
    [
        (Offer(), {"any": 0, "cpu": 0, "gpu": 1, "gpu:2": 2, "gpu:8": 8}),
        (Offer(gpus=0, free=0), {"any": 0, "cpu": 0, "gpu": None, "gpu:2": None}),
        (Offer(gpus=2, free=2), {"any": 1, "cpu": 0, "gpu": 1, "gpu:2": 2, "gpu:3": None}),
        (Offer(gpus=2, free=1), {"any": 1, "cpu": 0, "gpu": 1, "gpu:2": None}),
        (Offer(gpus=2, free=0), {"any": None, "cpu": 0, "gpu": None}),
        (Offer(("gpu",), gpus=2, free=2), {"any": None, "cpu": None, "gpu": 1, "gpu:2": None}),
    ],
)
def test_a_worker_takes_what_it_serves_and_has_the_gpus_for(
    offer: Offer, takes: dict[str, int | None]
) -> None:
    assert {queue: offer.takes(queue) for queue in takes} == takes
    assert offer.takes("gpu:9") is None
    assert set(offer.wanted) == {q for q in QUEUES if offer.takes(q) is not None}


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


@pytest.mark.parametrize(
    ("kind", "student", "best", "reached", "adapter"),
    [
        ("train", {"form": "lora"}, None, 4, "j@4"),
        ("train", {"form": "full"}, None, 4, None),
        ("train", {"form": "full"}, 2, 4, "j@2"),
        ("train", {"form": "full"}, None, 9, "j@9"),
        ("train", {"form": "full"}, None, None, None),
        ("eval", {}, None, 9, None),
    ],
)
def test_a_jobs_adapter_is_the_best_or_the_newest_and_a_whole_model_where_one_is_written(
    kind: str, student: dict[str, str], best: int | None, reached: int | None, adapter: str | None
) -> None:
    """Whole models are, at the best and at the last step; an evaluation has nothing to use."""
    row = JobRow(
        id="j",
        kind=kind,
        spec={"student": student},
        best_step=best,
        checkpoint_step=reached,
        total_steps=9,
    )
    assert row.adapter == adapter
