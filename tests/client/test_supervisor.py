"""What `bridge up` promises about its children, shown with tiny ones that start at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from bridge_client import _core, supervisor
from bridge_client.home import Home, Process, State
from tests.support.ports import port_of_a_house
from tests.support.waiting import until

pytestmark = pytest.mark.integration


@contextmanager
def house(path: Path, *crashers: str) -> Iterator[tuple[subprocess.Popen[str], Home]]:
    port = port_of_a_house()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.client.tiny_house", str(path), str(port), *crashers],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process, Home(path)
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(120)


def ready(home: Home) -> State:
    until(lambda: (state := home.running()) and state.ready)
    state = home.running()
    assert state is not None
    return state


def test_where_vllm_answers_no_inference_process_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRIDGE_INFERENCE_BACKEND", "vllm")
    monkeypatch.setenv("BRIDGE_INFERENCE_URL", "http://127.0.0.1:8010")
    with house(tmp_path) as (process, home):
        state = ready(home)
        assert set(state.children) == {"service", "worker"}
        assert state.inference_url == "http://127.0.0.1:8010"
        process.terminate()
        assert process.wait(120) == 0


def test_all_children_stop_politely_on_sigterm_and_nothing_is_left(tmp_path: Path) -> None:
    with house(tmp_path) as (process, home):
        state = ready(home)
        assert set(state.children) == {"service", "worker", "inference"}
        process.terminate()
        assert process.wait(120) == 0
    assert not any(child.alive() for child in state.children.values())
    for name in state.children:
        assert home.log(name).read_text().splitlines() == ["started", "stopped politely"]
    assert home.state() is None


def test_a_killed_child_is_started_again_and_the_others_are_left_alone(tmp_path: Path) -> None:
    with house(tmp_path) as (_, home):
        before = ready(home)
        os.kill(before.children["worker"].pid, signal.SIGKILL)

        def again() -> bool:
            state = home.running()
            worker = state.children.get("worker") if state else None
            return worker is not None and worker != before.children["worker"] and worker.alive()

        until(again)
        after = home.running()
        assert after is not None
        assert after.children["service"] == before.children["service"]
        assert after.children["inference"] == before.children["inference"]


def test_a_child_that_cannot_start_ends_it_all_with_the_end_of_its_log(tmp_path: Path) -> None:
    with house(tmp_path, "service") as (process, home):
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "service ended 4 times (last: status 3)" in out
    assert "I cannot go on" in out
    assert str(home.log("service")) in out


@pytest.mark.parametrize("seconds", [0, 1.5])  # the others are up long before the latter
@pytest.mark.parametrize("name", ["service", "worker", "inference"])
def test_a_child_that_says_why_it_cannot_start_ends_it_all_at_once(
    tmp_path: Path, name: str, seconds: float
) -> None:
    home = Home(tmp_path)
    home.create()
    home.log(name).write_text("of an earlier start\n")
    with house(tmp_path, f"{name}=2:{seconds}") as (process, _):
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert out == "I cannot go on\n"
    assert home.state() is None


def test_a_proxy_of_the_environment_does_not_keep_a_service_from_getting_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with house(tmp_path) as (_, home):
        ready(home)


def test_down_after_a_killed_supervisor_says_what_it_stopped(tmp_path: Path) -> None:
    with house(tmp_path) as (process, home):
        state = ready(home)
        process.kill()
        process.wait()
    stopped = supervisor.stop(home)
    assert stopped is not None
    assert stopped.url == state.url
    assert set(stopped.leftovers) == {"service", "worker", "inference"}
    assert not any(child.alive() for child in state.children.values())
    assert supervisor.stop(home) is None


def test_children_of_a_killed_supervisor_are_stopped_by_the_next_one(tmp_path: Path) -> None:
    with house(tmp_path) as (process, home):
        orphans = ready(home).children
        process.kill()
        process.wait()
    assert all(child.alive() for child in orphans.values())
    assert home.running() is None
    with house(tmp_path) as (_, home):
        ready(home)
        assert not any(child.alive() for child in orphans.values())


def test_the_same_command_starts_a_home_whose_supervisor_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its children hold the port until they are stopped, which is seen to before it is looked at,
    by `up` and by what `up --detach` does before it leaves a supervisor behind."""
    ways = (supervisor.serve, supervisor.detach)
    monkeypatch.setattr(supervisor.Supervisor, "run", lambda self: 0)
    monkeypatch.setattr(supervisor, "_leave_behind", lambda *_: None)
    for way in ways:
        with house(tmp_path) as (process, home):
            left = ready(home)
            process.kill()
            process.wait()
        said: list[str] = []
        way(home, urlsplit(left.url).port or 0, say=said.append)
        assert said == [
            "Stopped what a killed supervisor had left running: service, worker, inference"
        ]
        assert not any(child.alive() for child in left.children.values())


def test_leftovers_are_stopped_by_whoever_holds_the_lock_of_their_home_alone(
    tmp_path: Path,
) -> None:
    with house(tmp_path) as (process, home):
        orphans = ready(home).children
        process.kill()
        process.wait()
    with home.lock() as mine:
        assert mine
        with pytest.raises(supervisor.CannotStartError):
            supervisor.serve(home, 1)
        assert supervisor.stop(home) is None
        assert all(child.alive() for child in orphans.values())
    assert supervisor.stop(home)


def test_a_service_whose_supervisor_was_killed_is_found_while_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRIDGE_HOME", str(tmp_path))
    monkeypatch.delenv("BRIDGE_URL", raising=False)
    with house(tmp_path) as (process, home):
        url = ready(home).url
        process.kill()
        process.wait()
    assert _core.default_url() == url
    supervisor.stop(home)
    assert _core.default_url() == _core.DEFAULT_URL


def test_a_second_detached_start_returns_when_the_first_one_is_ready(tmp_path: Path) -> None:
    home = Home(tmp_path)
    found: list[State] = []
    me = Process.of(os.getpid())
    with home.lock() as mine:
        assert mine
        second = threading.Thread(target=lambda: found.append(supervisor.detach(home, 1)))
        second.start()
        home.write(State("http://x", "http://y", me, {}, False))
        second.join(0.5)
        assert second.is_alive()
        home.write(State("http://x", "http://y", me, {}, True))
        second.join(120)
    assert [state.url for state in found] == ["http://x"]


def test_a_home_has_one_supervisor(tmp_path: Path) -> None:
    with house(tmp_path) as (_, home):
        first = ready(home)
        with house(tmp_path) as (second, _):
            assert second.wait(120) == 9
        assert home.running() == first


def test_ctrl_c_in_the_terminal_reaches_the_supervisor_alone(tmp_path: Path) -> None:
    """Or the engine would be torn down with the children instead of saving its state."""
    with house(tmp_path) as (process, home):
        state = ready(home)
        groups = {os.getpgid(child.pid) for child in state.children.values()}
        assert len(groups) == 3
        assert os.getpgid(process.pid) not in groups


def test_down_stops_what_runs_and_says_when_nothing_does(tmp_path: Path) -> None:
    with house(tmp_path) as (process, home):
        state = ready(home)
        stopped = supervisor.stop(home)
        assert stopped is not None
        assert (stopped.url, stopped.leftovers) == (state.url, ())
        assert process.wait(120) == 0
    assert supervisor.stop(home) is None


def test_a_process_is_known_by_its_start_too_so_a_reused_pid_is_never_stopped(
    tmp_path: Path,
) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        mine = Process.of(bystander.pid)
        assert mine.alive()
        older = replace(mine, started=mine.started - 100, after=mine.after - 100)
        assert not older.alive()
        home = Home(tmp_path)
        home.create()
        home.write(State("http://x", "http://y", older, {"worker": older}, True))
        assert supervisor.stop(home) is None
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    assert not mine.alive()


def test_a_clock_that_is_set_makes_no_process_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, boot = Process.of(os.getpid()), psutil.boot_time()
    for module in ("psutil", "psutil._psplatform"):
        monkeypatch.setattr(f"{module}.boot_time", lambda: boot + 3600)
    assert psutil.Process().create_time() - mine.started == pytest.approx(3600)
    assert mine.alive()
    assert not replace(mine, boot="another").alive(), "after a boot that pid may be anybody's"


def test_a_taken_port_is_told_with_its_holder_and_a_way_out(tmp_path: Path) -> None:
    import socket

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(supervisor.CannotStartError) as caught:
            supervisor.check_port(Home(tmp_path), port)
    message = str(caught.value)
    assert caught.value.status == 2
    assert f"Port {port} is taken by" in message
    assert f"pid {os.getpid()}" in message
    assert f"bridge up --home {tmp_path} --port " in message
    assert psutil.pid_exists(os.getpid())


def test_a_torn_or_foreign_pids_file_counts_as_none(tmp_path: Path) -> None:
    home = Home(tmp_path)
    for text in ("", "{", "[]", '{"url": 1}'):
        home.pids.write_text(text)
        assert home.running() is None
