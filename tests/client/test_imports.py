"""The client is light: it must start in a fraction of a second on a machine without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ["torch", "transformers", "peft", "numpy", "sqlalchemy", "fastapi", "service", "worker"]


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    "module",
    ["bridge_client", "bridge_client.cli", "bridge_client.supervisor", "bridge_client.demo"],
)
def test_nothing_heavy_is_imported(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    assert run(code) == "[]"


def test_importing_the_client_costs_less_than_half_a_second() -> None:
    """Of processor time, the best of five: a busy machine must not decide."""
    code = (
        "import time; begun = time.process_time(); import bridge_client; "
        "print(time.process_time() - begun)"
    )
    assert min(float(run(code)) for _ in range(5)) < 0.5
