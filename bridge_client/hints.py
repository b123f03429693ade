"""The commands Bridge tells people to type next: they work as they are printed."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

from bridge_client._core import DEFAULT_URL
from bridge_client.home import Home, default_home


def bridge() -> str:
    """How to call our `bridge` from this shell. Linux has another one (iproute2's), so that a
    `bridge` on the PATH may not be it."""
    ours = Path(sys.executable).with_name("bridge")
    if shutil.which("bridge") == str(ours):
        return "bridge"
    return short(ours) if ours.exists() else f"{short(Path(sys.executable))} -m bridge_client.cli"


def short(path: Path) -> str:
    """Relative to the working directory where it lies below it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def of_home(home: Home) -> str:
    """` --home PATH`, or nothing for the home a command takes by itself."""
    return "" if home.path == default_home() else f" --home {shlex.quote(str(home.path))}"


def reaching(home: Home, url: str) -> str:
    """The beginning of a command that talks to the service of this home."""
    return f"{bridge()} --url {url}" if of_home(home) else bridge()


def down(home: Home) -> str:
    """The command that stops the service of this home."""
    return f"{bridge()} down{of_home(home)}"


def up(home: Home, port: int) -> str:
    """The command that starts a service in this home on that port."""
    return f"{bridge()} up{of_home(home)} --port {port}"


def elsewhere(home: Home, url: str) -> list[str]:
    """A line on how commands and programs find a service that is not where they look by
    themselves; none for one that is."""
    if url == DEFAULT_URL and not of_home(home):
        return []
    return [f"Other commands and programs find it with: export BRIDGE_URL={url}"]
