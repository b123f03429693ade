"""What comes from the service cannot steer a terminal or tear a table: its control characters are
shown escaped, on a terminal and in a pipe; JSON output keeps them, as JSON writes them."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bridge_client.models import Event, Job
from bridge_client.watch import Watch
from tests.client.flaky import flaky, say
from tests.client.test_usage import bridge

EVIL = "a\nb\0c\x1b[31m\x9b1m[bold]\rd"
SHOWN = r"a\nb\x00c\x1b[31m\x9b1m[bold]\rd"
LINES = SHOWN.replace(r"\n", "\n")
"""Of a text of several lines, such as an answer, these stay."""

JOB = {"id": EVIL, "status": EVIL, "method": EVIL, "model": EVIL, "name": EVIL}
FULL = {
    **JOB,
    "waiting_for": EVIL,
    "forked_from": {"job": EVIL, "step": 3},
    "latest": {f"eval/{EVIL}/pass@1": 0.5},
    "error": {"message": EVIL, "param": EVIL, "code": EVIL},
    "adapter": EVIL,
    "created_at": EVIL,
    "kind": "eval",
}
SCORE = {"value": 0.5, "low": 0.4, "high": 0.6, "problems": 3}
SET = {
    **{"name": EVIL, "split": EVIL, "scores": {EVIL: SCORE}, "by_kind": {EVIL: SCORE}},
    **{"by_level": {}, "truncation_rate": 0.0, "mean_tokens": 3, "problems": 3, "samples": 1},
    "outcomes": dict.fromkeys(("right", "wrong", "format_error", "truncated", "unjudged"), 1),
    **{"temperature": 0, "left_out": 0, "top_p": 1, "max_new_tokens": 9},
    "template": {"kind": EVIL, "suffix": EVIL},
}
DIFFERENCE = {"ours": 0.5, "theirs": 0.5, "difference": 0, "low": 0, "high": 0, "problems": 3}
SCORES = {
    **{"job_id": EVIL, "model": EVIL, "preset": EVIL, "seconds": 1, "benchmarks": [SET]},
    "environment": {"device": EVIL, "torch": EVIL, "threads": EVIL},
    "grader": {"name": EVIL, "version": EVIL},
    "against": {
        **{"job_id": EVIL, "model": EVIL, "settings": {EVIL: [EVIL, EVIL]}},
        "benchmarks": {EVIL: {**DIFFERENCE, "better": 1, "worse": 1}},
    },
}
PROBLEM = {"code": EVIL, "detail": EVIL, "errors": [{"param": EVIL, "message": EVIL}] * 2}
STREAM = "".join(
    f"data: {json.dumps(chunk)}\n\n" for chunk in [{"choices": [{"index": 0, "text": EVIL}]}]
)


def page(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"data": list(rows), "has_more": False, "next": None}


@pytest.mark.parametrize(
    ("arguments", "answer", "shown"),
    [
        (["jobs", "list"], page(FULL), SHOWN),
        (["jobs", "show", "j"], FULL, SHOWN),
        (["jobs", "cancel", "j"], JOB, SHOWN),
        (["jobs", "prioritize", "j", "-p", "1"], JOB, SHOWN),
        (["jobs", "fork", "j"], JOB, SHOWN),
        (["jobs", "metrics", "j"], {"metrics": {EVIL: [[1, 0.5]]}}, SHOWN),
        (["jobs", "logs", "j"], EVIL, LINES),
        (["projects", "list"], page({"id": EVIL, "name": EVIL}), SHOWN),
        (["projects", "create", "p"], {"id": EVIL, "name": EVIL}, SHOWN),
        (["adapters"], page({"name": EVIL, "status": EVIL, "base_model": EVIL}), SHOWN),
        (["alias"], page({"name": EVIL, "adapter": EVIL}), SHOWN),
        (["alias", "a", "b"], {"name": EVIL, "adapter": EVIL}, SHOWN),
        (["data", "list"], page({"id": EVIL, "name": EVIL}), SHOWN),
        (["data", "upload", __file__], {"id": EVIL}, SHOWN),
        (["eval", "show", "j"], SCORES, SHOWN),
        (["eval", "compare", "j", "j"], SCORES, SHOWN),
        (["generate", "1", "-a", "job_1"], {"choices": [{"text": EVIL}]}, LINES),
        (["chat", "job_1", "1"], STREAM + "data: [DONE]\n\n", LINES),
        (["chat", "a/j", "1", "--against", "b/k"], STREAM + "data: [DONE]\n\n", LINES),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_control_characters_are_shown_escaped(
    arguments: list[str], answer: Any, shown: str
) -> None:
    kind = "text/event-stream" if arguments[0] == "chat" else "application/json"
    body = answer if isinstance(answer, str) else json.dumps(answer)
    with flaky(say(200, body, kind)) as server:
        done = bridge(*arguments, url=server.url)
        assert done.returncode == 0, done.stderr
        assert shown in done.stdout
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", done.stdout + done.stderr)
        if arguments[-1] == "list":
            assert len(done.stdout.splitlines()) == 2  # the header and one row


def test_a_refusal_is_shown_escaped() -> None:
    with flaky(say(422, json.dumps(PROBLEM))) as server:
        done = bridge("jobs", "show", "j", url=server.url)
    assert SHOWN in done.stderr
    assert len(done.stderr.splitlines()) == 3
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", done.stderr)


def test_what_a_watched_run_says_is_shown_escaped() -> None:
    events = [
        {"type": "phase", "phase": EVIL},
        {"type": "log", "level": "warning", "message": EVIL},
        {"type": "metric", "step": 1, "metrics": {f"eval/{EVIL}/pass@1": 0.5}},
        {"type": "error", "message": EVIL},
    ]
    messages = [
        f"id: {seq}\nevent: {event['type']}\ndata: {json.dumps(event)}\n\n"
        for seq, event in enumerate(events, start=1)
    ]
    ended = json.dumps({**FULL, "id": "j", "status": "failed"})
    stream = say(200, "".join(messages) + "event: end\ndata:\n\n", "text/event-stream")
    with flaky(say(200, ended), say(200, ended), stream, say(200, ended)) as server:
        done = bridge("jobs", "watch", "j", url=server.url)
    assert done.returncode == 1
    assert done.stderr.count(SHOWN) >= 4
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", done.stdout + done.stderr)


def test_the_live_bar_shows_them_escaped() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=200, no_color=True)
    with Watch(Job.model_validate({**JOB, "kind": "eval", "steps": 5}), console) as watch:
        for event in (
            {"type": "phase", "phase": EVIL},
            {"type": "metric", "step": 1, "metrics": {f"eval/{EVIL}/pass@1": 0.5}},
        ):
            watch.see(Event.model_validate({"seq": 1, **event}))
    assert isinstance(console.file, io.StringIO)
    written = console.file.getvalue()
    assert written.count(SHOWN) >= 2
    assert "\x1b[31m" not in written
    assert not re.search(r"[\0\x9b]", written)


def test_json_output_keeps_them_and_a_terminal_does_not_see_them(tmp_path: Path) -> None:
    with flaky(say(200, json.dumps(page(JOB)))) as server:
        done = bridge("jobs", "list", "-o", "json", url=server.url)
    assert json.loads(done.stdout)[0]["name"] == EVIL
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", done.stdout)
