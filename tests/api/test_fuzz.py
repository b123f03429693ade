"""Whatever is posted, the answer is a job or a problem: never an unforeseen error."""

from __future__ import annotations

import copy
import json
from typing import Any

from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.api.conftest import BRIDGE

FULL: dict[str, Any] = {
    **BRIDGE,
    "method": {"name": "bridge", "lambda": {"start": 0, "end": 1}, "meta": True},
    "data": {role: {"name": "arithmetic", "limit": 5} for role in ("prompts", "demos", "eval")},
    "name": "n",
    "seed": 0,
    "lora": {"rank": 8, "alpha": 16, "target_modules": ["q_proj"]},
    "optimizer": {"betas": [0.9, 0.98], "max_grad_norm": None},
    "rollout": {"group_size": 8, "max_new_tokens": 64},
    "rl": {"clip_low": 0.2, "clip_high": 0.2},
    "sft": {"max_tokens": 64},
    "template": {"kind": "plain", "system": None, "suffix": ""},
}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)
EVALUATION: dict[str, Any] = {
    "kind": "eval",
    "model": "bridge-tiny",
    "adapter": None,
    "benchmarks": {"name": "arithmetic", "limit": 5, "samples": 2, "template": {"suffix": ""}},
    "preset": "bridge",
    "sampling": {"temperature": 1.0, "top_p": 0.9, "samples": 2, "max_new_tokens": 24},
    "template": {"kind": "plain", "system": None},
    "grader": {"name": "math", "tolerance": 0.1},
    "pass_at": [1],
    "completions_of": None,
    "runtime": {"threads": 1},
    "resources": {"gpus": None},
}


def _paths(spec: dict[str, Any]) -> list[tuple[str, ...]]:
    inside = [(k, inner) for k, v in spec.items() if isinstance(v, dict) for inner in v]
    return [(key,) for key in spec] + inside


PATHS = [(FULL, path) for path in _paths(FULL)]
PATHS += [(FULL, ("data", "eval", last)) for last in ("name", "limit")]
PATHS += [(FULL, ("method", "lambda", "end"))]
PATHS += [(EVALUATION, path) for path in _paths(EVALUATION)]

FUZZ = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)


@FUZZ
@given(field=st.sampled_from(PATHS), value=JSON)
def test_any_value_in_any_field_of_a_spec(
    client: TestClient, field: tuple[dict[str, Any], tuple[str, ...]], value: Any
) -> None:
    spec, path = copy.deepcopy(field[0]), field[1]
    holder = spec
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    headers = {"Content-Type": "application/json"}
    response = client.post("/jobs?dry_run=true", content=json.dumps(spec), headers=headers)
    assert response.status_code in (200, 422), (spec, response.text)
    if response.status_code == 422:
        assert response.json()["detail"]
        assert response.json()["errors"]


@FUZZ
@given(content=st.binary(max_size=200), kind=st.sampled_from(["json", "yaml"]))
def test_any_bytes_as_a_spec(client: TestClient, content: bytes, kind: str) -> None:
    headers = {"Content-Type": f"application/{kind}"}
    response = client.post("/jobs", content=content, headers=headers)
    assert response.status_code in (400, 422), response.text


@FUZZ
@given(content=st.binary(max_size=200))
def test_any_bytes_as_a_dataset(client: TestClient, content: bytes) -> None:
    assert client.post("/datasets", content=content).status_code == 422


@FUZZ
@given(body=st.dictionaries(st.sampled_from(["adapter", "prompt", "messages", "n", "stop"]), JSON))
def test_any_generate_request(client: TestClient, body: dict[str, Any]) -> None:
    response = client.post(
        "/generate", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    assert response.status_code in (404, 422), (body, response.text)
