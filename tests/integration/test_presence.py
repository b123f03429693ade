"""Who counts as dead: a worker of this machine whose lock is free, and nobody else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from worker.presence import Presence


def test_a_worker_is_gone_once_its_process_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from worker.presence import Presence\n"
        "with Presence(pathlib.Path(sys.argv[1])) as p: print(p.name, flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with (
        Presence(tmp_path) as me,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other,
    ):
        assert other.stdout
        name = other.stdout.readline().strip()
        assert not me.is_gone(f"{name}:0")
        me.forget_dead()
        assert not me.is_gone(f"{name}:0"), "nor is its file taken from it"
        other.kill()
        other.wait()
        assert me.is_gone(f"{name}:0")
        assert not me.is_gone(f"{me.name}:0")
        me.forget_dead()
        assert os.listdir(tmp_path / "workers") == [me.name]
    assert os.listdir(tmp_path / "workers") == []


@pytest.mark.parametrize(
    "worker_id", ["w", "", f"{socket.gethostname()}:1:abc:0", "elsewhere:1:abc:0", "../x:0"]
)
def test_of_a_worker_without_a_lock_here_nothing_is_known(tmp_path: Path, worker_id: str) -> None:
    with Presence(tmp_path) as me:
        (tmp_path / "workers" / "elsewhere:1:abc").touch()
        assert not me.is_gone(worker_id)


def test_a_worker_that_cannot_be_known_works_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "workers").write_text("in the way")
    with Presence(tmp_path) as me:
        assert not me.is_gone(f"{me.name}:0")
