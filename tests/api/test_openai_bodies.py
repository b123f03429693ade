"""Bodies of /v1 that are refused: one sentence for a mistake, and every mistake named."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

FORMS = "a text, a list of token ids, or up to 64 of either in a list"


def refused(client: TestClient, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    answer = client.post(path, json={"model": "bridge-tiny", "prompt": "1"} | body)
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (["1"] * 65, "there are 65 prompts; a request takes at most 64"),
        ([[1]] * 70, "there are 70 prompts; a request takes at most 64"),
        ([["a"]], FORMS),
        ([["1"]], FORMS),
        ([-1], FORMS),
        ([*range(70), "a"], FORMS),
        ([], FORMS),
        ([[]], FORMS),
        (["1", [1]], FORMS),
        ({}, FORMS),
        (5, FORMS),
    ],
)
def test_a_prompt_of_no_known_form_gets_one_sentence(
    client: TestClient, prompt: Any, said: str
) -> None:
    error = refused(client, prompt=prompt)
    assert error["param"] == "prompt"
    assert said in error["message"]
    assert "more" not in error["message"]
    assert len(error["errors"]) == 1


def test_stops_and_contents_of_no_known_form_get_one_sentence(client: TestClient) -> None:
    assert "at most 16 texts" in refused(client, stop=["x"] * 17)["message"]
    answer = client.post("/generate", json={"model": "m", "prompt": "1", "stop": [5]}).json()
    assert answer["param"] == "stop"
    assert "at most 16 texts" in answer["detail"]
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]
    chat = {"model": "bridge-tiny", "messages": picture}
    error = client.post("/v1/chat/completions", json=chat).json()["error"]
    assert error["param"] == "messages.0.content"
    assert '{"type": "text", "text": …}' in error["message"]


def test_every_mistake_is_in_the_body(client: TestClient) -> None:
    error = refused(client, temperature=9, n=0)
    assert "see errors" in error["message"]
    assert [wrong["param"] for wrong in error["errors"]] == ["temperature", "n"]
