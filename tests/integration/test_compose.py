"""The deployed form as its files describe it: the Dockerfile's steps in a root of its own, and the
compose file's very commands, environments, names and ports, over real Postgres and Redis."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.compose import SERVICES, Composition, composition
from tests.support.dockerfile import Image, build
from tests.support.rootfs import RootFs, rootfs, why_not

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=f"no root of its own: {why_not()}"),
    pytest.mark.timeout(900),
]

PASSWORD = "p@ss/w:rd%20"
SPEC: dict[str, Any] = {
    "method": "bridge",
    "data": {"prompts": "arithmetic", "demos": {"name": "arithmetic", "limit": 16}},
    "steps": 4,
    "rollout": {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 24},
    "sft": {"batch_size": 2},
    "checkpoint": {"every": 2},
}


@pytest.fixture(scope="module")
def root() -> Iterator[RootFs]:
    with rootfs(list(SERVICES), [sys.prefix, sys.base_prefix]) as made:
        yield made


@pytest.fixture(scope="module")
def images(root: RootFs) -> dict[str, Image]:
    return build(root, {"api": fresh(root), "worker": whole(root)})


@pytest.fixture(scope="module")
def house(
    root: RootFs, images: dict[str, Image], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Composition]:
    logs = tmp_path_factory.mktemp("logs")
    with composition(root, images, logs, POSTGRES_PASSWORD=PASSWORD) as made:
        made.up(*SERVICES)
        yield made


def fresh(root: RootFs, name: str = "api") -> dict[str, str]:
    """Python with nothing installed, in an environment of that name."""
    machine = {k: v for k, v in os.environ.items() if k.startswith("PIP_") or "PROXY" in k.upper()}
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    made = [sys.executable, "-m", "venv", "--without-pip", f"/venv/{name}"]
    root.run(made, {"PATH": path}, folder="/")
    # a pip that works on another environment than its own: seconds less than installing one there
    pip = root.inside(f"/venv/{name}/bin/pip")
    pip.write_text(
        f'#!/bin/sh\nexec {sys.executable} -m pip --python /venv/{name}/bin/python "$@"\n'
    )
    pip.chmod(0o755)
    return {**machine, "PATH": f"/venv/{name}/bin:{path}"}


def whole(root: RootFs) -> dict[str, str]:
    """Python with the libraries of the environment that runs the tests, torch among them: they
    are gigabytes, and installed from the same lock. pip finds them there already."""
    environment = fresh(root, "worker")
    libraries = Path(sysconfig.get_path("purelib"))
    site = root.inside(Path("/venv/worker") / libraries.relative_to(sys.prefix))
    (site / "libraries.pth").write_text(f"{libraries}\n")
    return {**environment, "PATH": f"{environment['PATH']}:{sys.prefix}/bin"}


def bridge(house: Composition, *words: str, seconds: float = 240) -> Any:
    """`docker compose exec api bridge …`: its JSON."""
    done = house.ask("api", ["bridge", *words, "-o", "json"], seconds)
    logs = "\n".join(f"== {name}\n{run.output(1500)}" for name, run in house.running.items())
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}\n{logs}"
    return json.loads(done.stdout)


def submit(house: Composition, **changes: Any) -> str:
    path = house.root.inside("/tmp/spec.json")
    path.write_text(json.dumps({**SPEC, **changes}))
    return bridge(house, "jobs", "submit", "/tmp/spec.json")["id"]


def until(house: Composition, job_id: str, true: Any, seconds: float = 300) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while not true(job := bridge(house, "jobs", "show", job_id)):
        assert time.monotonic() < end, job
        time.sleep(0.5)
    return dict(job)


def test_every_service_starts_in_its_order_and_passes_its_health_check(house: Composition) -> None:
    """The start itself waited for each `depends_on`, and a password of odd characters opened
    Postgres."""
    for name in SERVICES:
        if name == "migrate":
            assert house.running[name].process.returncode == 0
            continue
        assert house.running[name].process.poll() is None, house.running[name].output()
        if not SERVICES[name].get("healthcheck", {}).get("disable") and name != "worker":
            house.wait(name, "service_healthy")


def test_a_job_is_trained_and_its_adapter_answers(house: Composition) -> None:
    job = until(house, submit(house), lambda job: job["status"] not in ("queued", "running"))
    assert job["status"] == "succeeded", job
    answer = bridge(house, "generate", "12+3-5?", "--adapter", job["adapter"])
    assert answer["adapter"] == f"{job['id']}@4"
    assert answer["choices"][0]["text"]


def test_a_worker_told_to_stop_hands_its_job_back_within_its_grace(house: Composition) -> None:
    """`docker compose stop worker`, then `up`: the next one goes on from what was saved."""
    job_id = submit(house, steps=100_000)
    until(house, job_id, lambda job: job["step"] >= 2)
    house.stop("worker")
    job = bridge(house, "jobs", "show", job_id)
    assert job["status"] == "queued", job
    assert job["attempt"] == 1
    saved = job["step"]
    house.start("worker")
    job = until(house, job_id, lambda job: job["attempt"] == 2 and job["step"] > saved)
    bridge(house, "jobs", "cancel", job_id)
    until(house, job_id, lambda job: job["status"] == "cancelled")


def test_workers_beside_each_other_run_jobs_at_the_same_time(house: Composition) -> None:
    """`docker compose up --scale worker=2`."""
    house.start("worker", "worker-2")
    jobs = [submit(house, steps=100_000) for _ in range(2)]
    running = partial(bridge, house, "jobs", "list", "--status", "running")
    end = time.monotonic() + 300
    while len(running()) < 2:
        assert time.monotonic() < end, house.running["worker-2"].output()
        time.sleep(0.5)
    for job_id in jobs:
        bridge(house, "jobs", "cancel", job_id)
        until(house, job_id, lambda job: job["status"] == "cancelled")
    house.stop("worker-2")


def test_the_api_image_is_without_torch_and_runs_as_nobody_special(house: Composition) -> None:
    import_torch = house.ask("api", ["python", "-c", "import torch"])
    assert "No module named 'torch'" in import_torch.stderr
    assert house.ask("api", ["id", "-un"]).stdout.strip() == "bridge"


def test_every_service_leaves_within_its_grace(house: Composition) -> None:
    for name in ("worker", "relay", "inference", "api", "redis"):
        house.stop(name)
