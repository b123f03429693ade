"""The kernel's counters of out-of-memory kills, in each form that a machine may have them."""

from pathlib import Path

import pytest

from worker.memory import OomWatch, counts


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def machine(root: Path, form: str, kills: int) -> None:
    """A file system as the kernel would show it after so many kills."""
    write(root, "proc/vmstat", "nr_free_pages 7\noom_kill 900\n")
    write(root, "proc/self/cgroup", "0::/\n")
    if form == "version 2":
        write(root, "proc/self/cgroup", "0::/jobs/a\n")
        events = f"low 0\noom 3\noom_kill {kills}\noom_group_kill 0\n"
        write(root, "sys/fs/cgroup/jobs/a/memory.events", events)
    elif form == "version 2, in a container":  # the host's path, the container's mount
        write(root, "proc/self/cgroup", "0::/docker/abc\n")
        write(root, "sys/fs/cgroup/memory.events", f"oom 3\noom_kill {kills}\n")
    elif form == "version 1":
        write(root, "proc/self/cgroup", "4:cpu,memory:/jobs/a\n0::/\n")
        control = f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n"
        write(root, "sys/fs/cgroup/memory/jobs/a/memory.oom_control", control)
    else:
        write(root, "proc/vmstat", f"nr_free_pages 7\noom_kill {kills}\n")


FORMS = ["version 2", "version 2, in a container", "version 1", "none"]


@pytest.mark.parametrize("form", FORMS)
def test_a_kill_for_memory_is_seen_and_no_kill_is_not(tmp_path: Path, form: str) -> None:
    machine(tmp_path, form, 4)
    watch = OomWatch(tmp_path)
    watch.look()
    assert not watch.blind
    assert not watch.rose()
    machine(tmp_path, form, 5)
    assert watch.rose()


def test_kills_of_others_on_the_machine_do_not_count_where_groups_do(tmp_path: Path) -> None:
    machine(tmp_path, "version 2", 0)
    watch = OomWatch(tmp_path)
    write(tmp_path, "proc/vmstat", "oom_kill 999\n")
    assert not watch.rose()


def test_a_kill_long_before_the_end_is_another_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(tmp_path, "version 2", 0)
    watch = OomWatch(tmp_path)
    machine(tmp_path, "version 2", 1)
    monkeypatch.setattr("worker.memory.WINDOW_SECONDS", 0.0)
    watch.look()
    watch.look()
    assert not watch.rose()


def test_a_system_without_counters_is_known_to_be_blind(tmp_path: Path) -> None:
    watch = OomWatch(tmp_path)
    assert watch.blind
    assert not watch.rose()
    assert counts(tmp_path) == {}
