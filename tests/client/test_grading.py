"""`bridge grade`: a line out for every line in, in order, and no bad line passed over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bridge_client.cli import app

GOOD = {"gold": "1/2", "answer": r"so \boxed{0.5}", "id": 7}
X = {"gold": "5x", "answer": r"\boxed{x5}"}


def grade(lines: list[str], *arguments: str):
    result = CliRunner().invoke(app, ["grade", *arguments], input="\n".join(lines) + "\n")
    return result, [json.loads(line) for line in result.stdout.splitlines()]


def test_each_line_comes_back_with_its_verdict_and_what_else_it_had() -> None:
    wrong = {"gold": 5, "answer": "6 or 5"}
    result, found = grade([json.dumps(line) for line in (GOOD, X, wrong)])
    assert result.exit_code == 0, result.output
    assert [f["verdict"] for f in found] == ["right", "right", "wrong"]
    assert [f["reason"] for f in found] == ["equal_number", "equal_value", "no_answer"]
    assert found[0] | GOOD == found[0]
    assert "2 right, 1 wrong, 0 unjudged" in result.stderr


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("oops", "line 2 is not JSON"),
        ('{"gold": "1"}', "line 2 has a wrong `answer`"),
        ("[1]", "line 2 is not an object"),
        ('{"gold": "1", "answer": null}', "line 2 has a wrong `answer`"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('{"gold": "1", "answer": "1", "gold_value": "x"}', "line 2 has a wrong `gold_value`"),
    ],
)
def test_a_bad_line_is_named_and_ends_nothing(line: str, says: str) -> None:
    result, found = grade([json.dumps(GOOD), line, json.dumps(GOOD)])
    assert result.exit_code == 1
    assert says in result.stderr
    assert [f["verdict"] for f in found] == ["right", "unjudged", "right"]
    assert found[1]["line"] == 2
    assert says in found[1]["error"]


def test_options_and_a_file(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"gold": "100", "answer": "#103"}) + "\n\n", "utf-8")
    result, found = grade([], "--file", str(file), "--grader", "numeric", "--tolerance", "0.05")
    assert (result.exit_code, found[0]["reason"]) == (0, "within_tolerance")
    assert grade([], "--grader", "maths")[0].exit_code == 2
