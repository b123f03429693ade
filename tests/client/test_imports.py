"""The client is light: it must start in a fraction of a second on a machine without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ["torch", "transformers", "peft", "numpy", "sqlalchemy", "fastapi", "service", "worker"]


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    "module",
    ["bridge_client", "bridge_client.cli", "bridge_client.supervisor", "bridge_client.demo"],
)
def test_nothing_heavy_is_imported(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    assert run(code) == "[]"
