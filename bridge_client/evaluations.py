"""Evaluations as tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bridge_client import output
from bridge_client.models import Scores
from bridge_client.text import escape
from bridge_client.watch import percent

OUTCOMES = ("right", "wrong", "format_error", "truncated", "unjudged")


def show(scores: Scores) -> None:
    """The scores with their intervals, what became of the answers, and how they were asked for."""
    console = output.out()
    console.print(
        f"[bold]{escape(scores.adapter or scores.model or '?')}[/]  {escape(scores.job_id)}"
    )
    rows = [
        [escape(one["name"]), escape(name), *_figures(score)]
        for one in scores.benchmarks
        for name, score in one["scores"].items()
    ]
    output.table(["SET", "SCORE", "VALUE", "95 %", "PROBLEMS"], rows)
    parts = [
        [escape(one["name"]), f"{by} {escape(part)}", *_figures(score)]
        for one in scores.benchmarks
        for by in ("kind", "level")
        for part, score in one[f"by_{by}"].items()
    ]
    if parts:
        console.print()
        output.table(["SET", "PART", "PASS@1", "95 %", "PROBLEMS"], parts)
    console.print()
    columns = ["SET", *(name.upper().replace("_", " ") for name in OUTCOMES), "CUT OFF", "TOKENS"]
    output.table(columns, [_outcomes(one) for one in scores.benchmarks])
    console.print()
    for one in scores.benchmarks:
        console.print(escape(f"{one['name']}/{one['split']}: {_how(one)}"))
    console.print(escape(_where(scores)))


def compare(scores: Scores) -> None:
    """The paired differences to another evaluation."""
    against = scores.against or {}
    console = output.out()
    ours, theirs = scores.adapter or scores.model, against.get("adapter") or against.get("model")
    console.print(escape(f"{scores.job_id} ({ours}) against {against.get('job_id')} ({theirs})"))
    rows = [
        [
            escape(name),
            escape(score),
            percent(one["ours"]),
            percent(one["theirs"]),
            _points(one["difference"]),
            f"{_points(one['low'])} to {_points(one['high'])}",
            str(one["problems"]),
            f"{one['better']} / {one['worse']}",
        ]
        for name, first in against.get("benchmarks", {}).items()
        for score, one in {"pass@1": first, **against.get("others", {}).get(name, {})}.items()
    ]
    columns = ["SET", "SCORE", "OURS", "THEIRS", "DIFFERENCE", "95 %", "PROBLEMS", "BETTER / WORSE"]
    output.table(columns, rows)
    for name, (mine, their) in against.get("settings", {}).items():
        output.err().print(escape(f"set otherwise: {name} is {mine!r} here and {their!r} there"))


def _figures(score: Mapping[str, Any]) -> list[str]:
    """The value, its interval, and of how many problems it is."""
    interval = f"{100 * score['low']:.1f} to {100 * score['high']:.1f}"
    return [percent(score["value"]), interval, str(score["problems"])]


def _points(difference: float) -> str:
    """A difference of two shares, in percentage points."""
    return f"{100 * difference:+.1f}"


def _outcomes(one: Mapping[str, Any]) -> list[str]:
    counts = [str(one["outcomes"][name]) for name in OUTCOMES]
    rate, tokens = percent(one["truncation_rate"]), f"{one['mean_tokens']:.0f}"
    return [escape(one["name"]), *counts, rate, tokens]


def _how(one: Mapping[str, Any]) -> str:
    template = one["template"]
    asked = f"{one['problems']} problems × {one['samples']}, temperature {one['temperature']:g}"
    left_out = f", {one['left_out']} left out" if one["left_out"] else ""
    said = "".join(
        f", {name} {template[name]!r}" for name in ("system", "suffix") if template.get(name)
    )
    return (
        f"{asked}, top_p {one['top_p']:g}, at most {one['max_new_tokens']} tokens, "
        f"{template['kind']} template{said}{left_out}"
    )


def _where(scores: Scores) -> str:
    grader, made = scores.grader, scores.environment
    versions = ", ".join(
        f"{name} {made[name]}" for name in ("torch", "transformers", "vllm") if name in made
    )
    device = made.get("device")
    if device == "cpu" and made.get("processor"):
        device = f"cpu, {made['processor']}"
    return (
        f"preset {scores.preset}, grader {grader.get('name')} {grader.get('version')}, seed "
        f"{scores.seed}, {scores.seconds:.0f} s on {device} "
        f"({made.get('threads')} threads), {versions}"
    )
