"""The project's Dockerfile, its steps carried out one by one where no Docker engine runs.

A target is built into a root of its own (`tests.support.rootfs`). What differs from `docker build`
is said here and nowhere else: FROM names an image that nobody fetches, so this machine's Python and
system libraries stand in for it, and `pip` works in a virtual environment for that target alone.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from dockerfile_parse import DockerfileParser

from tests.support.rootfs import RootFs

ROOT = Path(__file__).parents[2]


@dataclass
class Image:
    """What a built target starts its services with."""

    environment: dict[str, str]
    folder: str = "/"
    user: str = "root"
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)


def stages(path: Path = ROOT / "Dockerfile") -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, those of the stage it is built on first."""
    found: dict[str, list[tuple[str, str]]] = {}
    steps: list[tuple[str, str]] = []
    for step in DockerfileParser(path=str(path)).structure:
        kind, value = step["instruction"], step["value"]
        if kind == "COMMENT":
            continue
        if kind == "FROM":
            image, _, name = value.split()
            steps = found[name] = list(found.get(image, []))
        else:
            steps.append((kind, value))
    return found


def build(root: RootFs, machines: Mapping[str, Mapping[str, str]]) -> dict[str, Image]:
    """Carries out the steps of several targets in `root`, those of a stage they share once.

    `machines`: for each target the machine's part of its environment (PATH, and how pip reaches its
    index). An instruction there is no rule for fails.
    """
    ran: set[tuple[tuple[str, str], ...]] = set()
    images = {}
    for target, environment in machines.items():
        image = images[target] = Image(dict(environment))
        steps = stages()[target]
        for number, (kind, value) in enumerate(steps, 1):
            if kind == "RUN" and tuple(steps[:number]) in ran:
                continue
            ran.add(tuple(steps[:number]))
            _carry_out(kind, value, image, root)
    return images


def _carry_out(kind: str, value: str, image: Image, root: RootFs) -> None:
    match kind:
        case "ENV":
            pairs = (pair.partition("=") for pair in shlex.split(value))
            image.environment |= {name: text for name, _, text in pairs}
        case "WORKDIR":
            image.folder = value
            root.inside(value).mkdir(parents=True, exist_ok=True)
        case "RUN":
            root.run(["bash", "-euc", value], image.environment, folder=image.folder)
        case "COPY":
            *sources, into = value.split()
            for source in sources:
                _copy(source, root.inside(PurePosixPath(image.folder, into)))
        case "USER":
            image.user = value
        case "CMD":
            image.command = json.loads(value)
        case "HEALTHCHECK":
            image.healthcheck = json.loads(value.partition("CMD ")[2])
        case "EXPOSE":
            pass  # says which port it is and opens none
        case _:
            raise AssertionError(f"no rule for {kind} {value}")


def _copy(source: str, into: Path) -> None:
    """COPY of what git tracks (or will) and .dockerignore lets through."""
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[0] == "*", "the rules below are for a list of what is let in"
    kept = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        path = PurePosixPath(name)
        let_in = any(path.is_relative_to(keep) for keep in kept)
        if not let_in or not (ROOT / name).exists() or not path.is_relative_to(source):
            continue
        # a folder's content is copied, a file goes into the folder it is given
        relative = path.relative_to(source) if (ROOT / source).is_dir() else path.name
        target = into / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
