"""Who hangs up is not written for any more, whether they waited for text or for a place."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from inference.app import create_app
from tests.inference.house import Held, hang_up_on
from tests.support.served import Served

ROWS = 4


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("steps", [0, 3])
def test_nothing_more_is_written_for_who_hangs_up(
    house: Path, monkeypatch: pytest.MonkeyPatch, steps: int, stream: bool
) -> None:
    app = create_app(lambda name: house / name, device="cpu")
    body = {"model": "plain", "prompt": "1", "n": ROWS, "max_tokens": 40, "seed": 1}
    with Served(app) as server:
        warm = {"model": "plain", "prompt": "1", "max_tokens": 1}
        assert httpx.post(f"{server.url}/v1/completions", json=warm, timeout=120).is_success
        held = Held(app, monkeypatch, after=steps)
        written = hang_up_on(held, server.url, "/v1/completions", **body, stream=stream)
        assert bool(written) == bool(steps)
