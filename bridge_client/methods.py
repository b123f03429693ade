"""`bridge methods`: what can be trained with, told by the options themselves. Needs no service."""

from __future__ import annotations

import inspect
from typing import Any

from bridge_client import output
from bridge_client.text import escape
from bridge_engine.methods import METHODS, Options

SOURCES = ("demos", "rewards")
"""What a method may learn from, in the order it is told."""


def describe() -> list[dict[str, Any]]:
    """Each method with its options, defaults and descriptions; JSON-able."""
    return [_describe(name, options) for name, options in METHODS.items()]


def _describe(name: str, options: type[Options]) -> dict[str, Any]:
    schema = options.model_json_schema(by_alias=True)
    return {
        "name": name,
        "summary": inspect.getdoc(options),
        "source": options.source,
        "learns_from": [source for source in SOURCES if source in options.learns_from],
        "adapters": list(options(name=name).adapters),
        "options": [
            {
                "name": option,
                "default": about.get("default"),
                "description": " ".join(about.get("description", "").split()),
            }
            for option, about in schema["properties"].items()
            if option != "name"
        ],
    }


def show() -> None:
    """The methods as a table; their options in full are in the JSON form and docs/methods.md."""
    rows = [
        [
            method["name"],
            ", ".join(method["learns_from"]),
            escape(method["summary"].splitlines()[0]),
            ", ".join(option["name"] for option in method["options"]),
        ]
        for method in describe()
    ]
    columns = ["METHOD", "LEARNS FROM", "WHAT IT IS", "OPTIONS"]
    output.table(columns, rows, wrapping=columns[2:])
