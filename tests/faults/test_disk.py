"""A disk that fills up under a run: a small one of its own, where this user may mount one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bridge_engine.state.checkpoint import is_whole, step_folder
from service.settings import Settings
from service.store import Store
from service.store.migrate import upgrade
from tests.faults.checks import STEPS, Undisturbed, adapter_sha256, real_spec
from tests.faults.house import REPOSITORY
from tests.support.jobs import wait_until
from worker.execute import execute_job

SIZE, LEFT = 128 << 20, 24 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a disk of 128 MB to fill up")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_ends_the_job_and_room_lets_it_go_on_to_the_same_bytes(
    small_disk: Path, tmp_path: Path, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    url = f"sqlite:///{tmp_path / 'bridge.db'}"
    upgrade(url)
    settings = Settings(home=small_disk, database_url=url, poll_seconds=0.05)
    store, spec = Store(url, max_attempts=1), real_spec(1)
    job, _ = store.create_job(spec, total_steps=spec.steps)
    options = {"store": store, "settings": settings, "worker_id": "w", "stop": threading.Event()}
    thread = threading.Thread(target=execute_job, args=(job.id,), kwargs=options)
    thread.start()
    wait_until(store, job.id, lambda job: job.checkpoint_step == 2, seconds=300)
    hog = small_disk / "hog"
    with hog.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, psutil.disk_usage(str(small_disk)).free - LEFT)
    thread.join(300)

    failed, run = store.get_job(job.id), settings.run_dir(job.id)
    assert failed.error
    assert (failed.status, failed.attempt) == ("failed", 1), failed.error
    assert (failed.error["category"], failed.error["code"]) == ("infra", "disk_full")
    # 24 of them, unless a save was under way while the disk was filled up
    assert "MiB free" in failed.error["message"]
    assert is_whole(run / "checkpoints" / step_folder(2))
    assert not list(run.rglob("*.tmp"))

    hog.unlink()
    command = [sys.executable, "-m", "bridge_engine", "run", str(run / "spec.json")]
    subprocess.run([*command, "--dir", str(run)], cwd=REPOSITORY, check=True)
    assert (run / "checkpoints" / step_folder(STEPS)).exists()
    assert adapter_sha256(run) == undisturbed.adapters["real 1"]
    store.close()
