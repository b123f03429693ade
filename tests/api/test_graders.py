"""POST /graders/run: what a grader says of given answers, and that it can hurt nobody."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient

from service.graders import bench
from tests.api.conftest import problem
from tests.support.waiting import until

HANGS = r"\boxed{9^{9^{9^{9^9}}}}"


def run(client: TestClient, items, **more):
    return client.post("/graders/run", json={"items": items, **more})


def test_answers_are_judged_in_order_with_their_reasons(client: TestClient) -> None:
    items = [
        {"gold": r"\frac{1}{2}", "answer": r"so \boxed{0.5}"},
        {"gold": "5x", "answer": r"\boxed{x \cdot 5}"},
        {"gold": "1331 and 1728", "answer": r"\boxed{1728}"},
        {"gold": "3 apples", "answer": r"\boxed{3 \text{ pears}}"},
        {"gold": "7", "answer": "It is seven."},
        {"gold": "4", "answer": r"Not as in \boxed{4}: no.", "prompt": r"Not as in \boxed{4}"},
        {"gold": "", "answer": r"\boxed{8.72e8}", "gold_value": 8.7e8},
    ]
    response = run(client, items)
    assert response.status_code == 200, response.text
    body = response.json()
    assert [(g["verdict"], g["reason"], g["stated"]) for g in body["data"]] == [
        ("right", "equal_number", "0.5"),
        ("right", "equal_value", r"x \cdot 5"),
        ("wrong", "other_count", "1728"),
        ("unjudged", "unknown_unit", r"3 \text{ pears}"),
        ("wrong", "no_answer", None),
        ("wrong", "no_answer", None),
        ("right", "within_tolerance", "8.72e8"),
    ]
    assert all(grade["detail"] for grade in body["data"])
    assert (body["right"], body["wrong"], body["unjudged"]) == (3, 3, 1)
    assert body["version"]


def test_graders_go_by_name_and_have_options(client: TestClient) -> None:
    items = [{"gold": "100", "answer": r"\boxed{103}"}, {"gold": "1/2", "answer": r"\boxed{0.5}"}]
    verdicts = {
        str(grader): [g["verdict"] for g in run(client, items, grader=grader).json()["data"]]
        for grader in ("math", "exact", "numeric", {"name": "numeric", "tolerance": 0.05})
    }
    assert list(verdicts.values()) == [
        ["wrong", "right"],
        ["wrong", "wrong"],
        ["wrong", "right"],
        ["right", "right"],
    ]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"items": []}, "items"),
        ({"items": [{"gold": "5"}]}, "items.0.answer"),
        ({"items": [{"gold": "5", "answer": "5", "more": 1}]}, "items.0.more"),
        ({"items": [{"gold": "5", "answer": "5"}], "grader": "maths"}, "grader.name"),
        ({"items": [{"gold": "5", "answer": "5"}] * 1001}, "items"),
        ({"items": [{"gold": "5" * 10_001, "answer": "5"}]}, "items.0.gold"),
    ],
)
def test_a_bad_request_is_refused_with_the_field(client: TestClient, body, param: str) -> None:
    assert problem(client.post("/graders/run", json=body), 422)["param"] == param


def test_a_hostile_answer_costs_its_limit_and_keeps_nobody_waiting(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [{"gold": "5x", "answer": HANGS}, {"gold": "5x", "answer": r"\boxed{x5}"}]
    with ThreadPoolExecutor(1) as pool:
        grading = pool.submit(run, client, items)
        judging = client.app.state.grading._lock  # type: ignore[attr-defined]
        until(judging.locked)
        answered = 0
        while judging.locked():
            assert client.get("/healthz").status_code == 200
            answered += judging.locked()
        body = grading.result().json()
    assert answered > 2, "while it was judged, and not after it"
    assert [g["verdict"] for g in body["data"]] == ["unjudged", "right"]
    monkeypatch.setattr(bench, "REQUEST_SECONDS", 0.0)
    late = run(client, items).json()
    assert [g["reason"] for g in late["data"]] == ["request_timed_out"] * 2


def test_while_one_request_is_graded_another_is_told_to_come_back(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "WAIT_SECONDS", 0.05)
    grading = client.app.state.grading  # type: ignore[attr-defined]
    with grading._lock:
        refused = run(client, [{"gold": "5", "answer": "5"}])
    assert problem(refused, 429, "too_many_gradings")
    assert refused.headers["retry-after"]


def test_the_api_judges_without_sympy_in_its_own_process() -> None:
    code = (
        "import sys, service.app\n"
        "from service.graders.bench import GradingBench\n"
        "from bridge_engine.rewards.graders import GraderSpec\n"
        "from bridge_engine.rewards import Case\n"
        "b = GradingBench()\n"
        "assert b.run(GraderSpec(), [Case('5x', r'\\boxed{x5}')])[0].value is True\n"
        "b.close()\n"
        "print([m for m in ('torch', 'sympy', 'math_verify') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
