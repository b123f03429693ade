"""Reads YAML as people mean it and as JSON can say it; and JSON, which is almost YAML.

Everybody who reads a spec reads it here, so that one file means the same to the command line, the
service and the engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import yaml

_JSON_TAGS = ("map", "seq", "str", "int", "float", "bool", "null")
_NOT_IN_JSON = ("timestamp", "value")
"""What plain words would mean to YAML alone: dates, and `=`."""


class _Loader(yaml.SafeLoader):
    """`3e-4` is a number and `2026-01-31` a text. What JSON does not know (dates, bytes, sets),
    aliases (which can expand without bound) and a key twice (which of them was meant?) are not
    accepted."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own name, meant to be replaced
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag.rpartition(":")[2] not in _NOT_IN_JSON
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {  # noqa: RUF012
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in _JSON_TAGS
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not accepted here", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        name = repeated(key.value for key in keys)
        if name is not None:
            mark = [key.start_mark for key in keys if key.value == name][1]
            raise yaml.constructor.ConstructorError(None, None, _twice(name), mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+"),
    list("-+0123456789."),
)


def load_yaml(text: str) -> Any:
    """The value the text stands for; None for an empty one.

    Raises `yaml.YAMLError`, as `MarkedYAMLError` with the position where it is known.
    """
    try:
        if text.lstrip().startswith("{"):
            with suppress(json.JSONDecodeError):  # then it is YAML's `{a: 1}`
                return json.loads(
                    text, parse_constant=_no_constant, object_pairs_hook=_each_key_once
                )
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        raise _Placed(error) from None
    except ValueError as error:  # `!!int x`, or one of which Python makes no number
        many = "integer string conversion" in str(error)
        raise yaml.YAMLError("a number has thousands of digits" if many else str(error)) from None


class _Placed(yaml.MarkedYAMLError):
    """The same error, whose words are for whoever wrote the text: it has no name but theirs."""

    def __init__(self, error: yaml.MarkedYAMLError) -> None:
        super().__init__(error.context, error.context_mark, error.problem, error.problem_mark)

    def __str__(self) -> str:
        words = ", ".join(part for part in (self.context, self.problem) if part)
        mark = self.problem_mark or self.context_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {words}" if mark else words


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (name := repeated(name for name, _ in pairs)) is not None:
        raise yaml.YAMLError(_twice(name))
    return dict(pairs)


def repeated(names: Iterable[str]) -> str | None:
    """The first of these names that has come before."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _twice(name: str) -> str:
    return f"the key {name!r} is there twice"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")
