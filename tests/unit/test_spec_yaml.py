"""Specs as text: what people write means what JSON would say, and nothing else gets through."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bridge_engine.spec.yaml import load_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("-1E5", -1e5),
        (".5e3", 500.0),
        ("1e", "1e"),
        ("2026-01-31", "2026-01-31"),
        ("2026-99-99", "2026-99-99"),
        ("2026-01-31T12:00:00Z", "2026-01-31T12:00:00Z"),
        ("=", "="),
        ("", None),
        ("{a: [1, true, null, x]}", {"a": [1, True, None, "x"]}),
    ],
)
def test_words_mean_what_people_mean_by_them(text: str, value: Any) -> None:
    found = load_yaml(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        *("!!timestamp 2026-01-31", "!!binary aGk=", "!!set {a}", "!!python/object:os.system x"),
        *(
            "a: &a [1]\nb: *a",
            "&a [*a]",
            "!!int x",
            "[" * 5000,
            "9" * 5000,
            '{"a": NaN}',
            "a: b: c",
            "\x00",
        ),
    ],
)
def test_what_json_does_not_know_is_a_yaml_error_and_never_another_one(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)


def test_an_error_knows_its_place() -> None:
    with pytest.raises(yaml.MarkedYAMLError) as caught:
        load_yaml("steps: 5\nseed: *other\n")
    mark = caught.value.problem_mark
    assert mark is not None
    assert (mark.line, mark.column) == (1, 6)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps: 5\nseed: *other\n", "line 2, column 7: aliases are not accepted here"),
        ("a: b: c", "line 1, column 5: mapping values are not allowed here"),
        ("a: [1, 2", "line 1, column 9: while parsing a flow sequence, expected ',' or ']'"),
        ("steps: " + "9" * 6000, "a number has thousands of digits"),
        ('{"steps": ' + "9" * 6000 + "}", "a number has thousands of digits"),
    ],
)
def test_an_error_speaks_of_the_text_and_not_of_what_reads_it(text: str, says: str) -> None:
    with pytest.raises(yaml.YAMLError) as caught:
        load_yaml(text)
    assert says in str(caught.value)
    assert "unicode string" not in str(caught.value)
    assert "sys." not in str(caught.value)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), JSON), st.booleans(), st.sampled_from([None, 2]))
def test_json_is_read_as_json(value: Any, ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert load_yaml(text) == value


@given(st.text(alphabet="[]{}:,-?&*!|>'\"%@`#=~ \n\tab019.e+_<"))
def test_whatever_is_read_can_be_sent_as_json(text: str) -> None:
    try:
        value = load_yaml(text)
    except yaml.YAMLError:
        return
    json.dumps(value)


@pytest.mark.parametrize(
    "text", ["steps: 5\nseed: 1\nsteps: 80", '{"steps": 5, "seed": 1, "steps": 80}']
)
@pytest.mark.parametrize("inside", [False, True])
def test_a_key_that_is_there_twice_is_refused_and_named(text: str, inside: bool) -> None:
    if inside:
        text = (
            f'{{"a": [{text}]}}' if text.startswith("{") else "a:\n- " + text.replace("\n", "\n  ")
        )
    with pytest.raises(yaml.YAMLError, match="the key 'steps' is there twice"):
        load_yaml(text)
