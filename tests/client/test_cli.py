"""The command line against a real service: what it prints, where, and its exit status."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pydantic_core import to_jsonable_python
from typer.testing import CliRunner

from bridge_client import Client, hints
from bridge_client.cli import app
from bridge_client.home import Home, Process, State
from bridge_engine.methods import METHODS
from tests.client.flaky import flaky, say
from tests.support.ports import port_of_a_house

pytestmark = pytest.mark.integration
EXAMPLE = Path(__file__).parents[2] / "examples" / "arithmetic-sft.yaml"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`python -m service` over a SQLite database of its own; nobody works on its jobs."""
    port = port_of_a_house()
    home = tmp_path_factory.mktemp("home")
    environment = os.environ | {"BRIDGE_HOME": str(home), "BRIDGE_PORT": str(port)}
    with (home / "service.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "service"], env=environment, stdout=log, stderr=log
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 180
        while True:
            assert process.poll() is None, (home / "service.log").read_text()
            assert time.monotonic() < deadline, (home / "service.log").read_text()
            try:
                if httpx.get(f"{address}/healthz", timeout=2).is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(120)


def bridge(
    *arguments: str, url: str | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """One `bridge …` in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BRIDGE_")}
    if url:
        environment["BRIDGE_URL"] = url
    return subprocess.run(
        [sys.executable, "-m", "bridge_client.cli", *arguments],
        env=environment | {"NO_COLOR": "1", "COLUMNS": "200"} | variables,
        capture_output=True,
        text=True,
        timeout=180,
    )


def test_submitting_prints_the_id_alone_so_that_a_script_can_use_it(url: str) -> None:
    done = bridge("jobs", "submit", str(EXAMPLE), "--set", "steps=7", url=url)
    assert done.returncode == 0, done.stderr
    with Client(url) as client:
        job = client.job(done.stdout.strip())
    assert (job.status, job.method, job.steps) == ("queued", "sft", 7)


def test_json_output_is_pure_json_for_every_command_that_has_it(url: str) -> None:
    submitted = json.loads(bridge("jobs", "submit", str(EXAMPLE), "-o", "json", url=url).stdout)
    job_id = submitted["id"]
    for command in (
        ["jobs", "list"],
        ["jobs", "show", job_id],
        ["jobs", "metrics", job_id],
        ["jobs", "compare", job_id],
        ["jobs", "submit", str(EXAMPLE), "--dry-run"],
        ["adapters"],
        ["data", "list"],
        ["methods"],
        ["jobs", "cancel", job_id],
        ["jobs", "watch", job_id],
    ):
        done = bridge(*command, "-o", "json", url=url)
        json.loads(done.stdout)


def test_a_spec_with_mistakes_is_refused_before_anything_is_sent() -> None:
    done = bridge(
        *("jobs", "submit", str(EXAMPLE), "--set", "stepz=7", "--set", "lora.rank=0"),
        url="http://127.0.0.1:9",  # nothing listens there, and nothing is missed
    )
    assert done.returncode == 2
    assert "nothing was sent" in done.stderr
    assert "did you mean 'steps'" in done.stderr
    assert "lora.rank" in done.stderr
    assert done.stdout == ""


def test_what_only_the_service_can_know_is_refused_by_the_service(url: str) -> None:
    done = bridge("jobs", "submit", str(EXAMPLE), "--set", "model=bridge-tny", url=url)
    assert done.returncode == 2
    assert "bridge-tiny" in done.stderr
    assert done.stdout == ""


def test_the_exit_status_mirrors_a_cancelled_job(url: str) -> None:
    job_id = bridge("jobs", "submit", str(EXAMPLE), url=url).stdout.strip()
    assert bridge("jobs", "cancel", job_id, url=url).stdout == f"{job_id} cancelled\n"
    assert bridge("jobs", "watch", job_id, url=url).returncode == 3
    assert bridge("jobs", "show", job_id, url=url).returncode == 0


def test_a_job_is_steered_by_commands(url: str) -> None:
    submitted = bridge("jobs", "submit", str(EXAMPLE), "--priority", "5", url=url)
    job_id = submitted.stdout.strip()
    for command, says in (
        (["pause", job_id], f"{job_id} paused"),
        (["prioritize", job_id, "-p", "-7"], f"{job_id} priority -7"),
        (["resume", job_id], f"{job_id} queued"),
        (["cancel", job_id], f"{job_id} cancelled"),
        (["retry", job_id], f"{job_id} queued"),
    ):
        done = bridge("jobs", *command, url=url)
        assert done.stdout == f"{says}\n", done.stderr
    shown = bridge("jobs", "show", job_id, url=url).stdout
    assert "waits for a worker: none is running" in shown
    assert "priority -7" in shown
    refused = bridge("jobs", "fork", job_id, "--from-checkpoint", "best", url=url)
    assert refused.returncode == 2
    assert "no accuracy" in refused.stderr
    forked = bridge("jobs", "fork", job_id, "--set", "steps=3", url=url).stdout.strip()
    with Client(url) as client:
        job = client.job(forked)
    assert (job.steps, job.forked_from) == (3, {"job": job_id, "step": None})
    again = bridge("jobs", "retry", forked, url=url)
    assert again.returncode == 1
    assert "possible now: pause, cancel or fork" in again.stderr


def test_jobs_are_put_side_by_side_and_unlike_specs_are_told(url: str) -> None:
    changes = (["seed=1"], ["seed=2", "--set", "steps=9"])
    jobs = [
        bridge("jobs", "submit", str(EXAMPLE), "--set", *change, url=url).stdout.strip()
        for change in changes
    ]
    done = bridge("jobs", "compare", *jobs, url=url)
    assert done.returncode == 0, done.stderr
    header, *rows = done.stdout.splitlines()
    assert header.split()[:3] == ["METHOD", "BEFORE", "AFTER"]
    assert [row.split()[-1] for row in rows] == jobs
    assert "not asked alike: steps (" in done.stderr
    found = json.loads(bridge("jobs", "compare", *jobs, "-o", "json", url=url).stdout)
    assert [(one["method"], one["seed"]) for one in found["jobs"]] == [("sft", 1), ("sft", 2)]
    assert list(found["unlike"]) == ["steps"]


def test_evaluations_are_not_compared_as_training_is(url: str) -> None:
    with Client(url) as client:
        spec = {"kind": "eval", "model": "bridge-tiny", "benchmarks": ["arithmetic"]}
        evaluation = client.submit(spec)
    done = bridge("jobs", "compare", evaluation.id, url=url)
    assert done.returncode == 2
    assert "bridge eval compare" in done.stderr


def test_a_project_is_chosen_by_option_or_environment(url: str) -> None:
    made = bridge("projects", "create", "maths", "--max-running", "1", url=url)
    assert made.stdout == "maths\n", made.stderr
    by_option = bridge("jobs", "submit", str(EXAMPLE), "--project", "maths", url=url).stdout.strip()
    listed = bridge("jobs", "list", "-o", "json", url=url, BRIDGE_PROJECT="maths").stdout
    assert [job["id"] for job in json.loads(listed)] == [by_option]
    assert bridge("projects", "update", "maths", "--gpu-hours", "2", url=url).returncode == 0
    projects = json.loads(bridge("projects", "list", "-o", "json", url=url).stdout)
    quotas = {p["id"]: (p["max_running"], p["gpu_hours"]) for p in projects}
    assert quotas == {"default": (None, None), "maths": (None, 2.0)}
    unknown = bridge("jobs", "submit", str(EXAMPLE), "--project", "nobody", url=url)
    assert unknown.returncode == 1
    assert "'nobody'" in unknown.stderr


def test_ctrl_c_stops_the_watching_and_not_the_job(url: str) -> None:
    job_id = bridge("jobs", "submit", str(EXAMPLE), url=url).stdout.strip()
    watching = subprocess.Popen(
        [sys.executable, "-m", "bridge_client.cli", "--url", url, "jobs", "watch", job_id],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # tests that a shell runs in the background inherit that it is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert watching.stderr is not None
    assert job_id in watching.stderr.readline()
    watching.send_signal(signal.SIGINT)
    _, complaint = watching.communicate(timeout=120)
    assert watching.returncode == 130
    assert f"{job_id} goes on" in complaint
    assert "bridge jobs cancel" in complaint
    with Client(url) as client:
        assert client.job(job_id).status == "queued"


def test_an_unknown_job_is_one_sentence_and_status_1(url: str) -> None:
    done = bridge("jobs", "show", "job_nobody", url=url)
    assert done.returncode == 1
    assert "job_nobody" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_service_is_one_sentence_and_status_4() -> None:
    done = bridge("jobs", "list", url="http://127.0.0.1:9")
    assert done.returncode == 4
    assert "bridge up" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["jobs", "submit"],
        ["jobs", "submit", "no-such-file.yaml"],
        ["frobnicate"],
        ["generate", "1+1?"],
    ],
)
def test_wrong_usage_is_status_2(arguments: list[str]) -> None:
    done = bridge(*arguments, url="http://127.0.0.1:9")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_dataset_can_be_uploaded_and_trained_on(url: str, tmp_path: Path) -> None:
    file = tmp_path / "sums.jsonl"
    rows = [{"problem": f"{i}+1+1?", "answer": str(i + 2)} for i in range(5)]
    rows[0]["solution"] = "0+1=1,1+1=2#2"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = bridge("data", "upload", str(file), url=url)
    assert done.returncode == 0, done.stderr
    name = done.stdout.strip()
    assert name.startswith("ds_")
    assert name in bridge("data", "list", url=url).stdout
    done = bridge("jobs", "submit", str(EXAMPLE), "--set", f"data.eval={name}", url=url)
    assert done.returncode == 0, done.stderr


def test_a_dataset_with_a_broken_row_names_the_line(url: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_text('{"problem": "1+1?", "answer": "2"}\n{"problem": \n')
    done = bridge("data", "upload", str(file), url=url)
    assert done.returncode == 2
    assert "line 2" in done.stderr.lower() or ":2" in done.stderr


def test_listing_can_be_limited_to_a_status(url: str) -> None:
    job_id = bridge("jobs", "submit", str(EXAMPLE), url=url).stdout.strip()
    cancelled = bridge("jobs", "submit", str(EXAMPLE), url=url).stdout.strip()
    bridge("jobs", "cancel", cancelled, url=url)
    listed = bridge("jobs", "list", "--status", "queued", url=url).stdout
    assert job_id in listed
    assert cancelled not in listed


def test_the_methods_are_those_of_the_engine_with_every_option_explained() -> None:
    told = json.loads(bridge("methods", "-o", "json", url="http://127.0.0.1:9").stdout)
    assert [method["name"] for method in told] == list(METHODS)
    for method in told:
        model = METHODS[method["name"]]
        assert method["summary"] == inspect.getdoc(model)
        assert method["source"] == model.source
        assert set(method["learns_from"]) == model.learns_from
        assert method["adapters"] == list(model(name=method["name"]).adapters)
        fields = {info.alias or name: info for name, info in model.model_fields.items()}
        assert {option["name"] for option in method["options"]} == set(fields) - {"name"}
        for option in method["options"]:
            assert option["description"]
            assert option["default"] == to_jsonable_python(fields[option["name"]].default)
    table = bridge("methods", url="http://127.0.0.1:9").stdout
    assert all(name in table for name in METHODS)
    assert "sft_lr" in table


def test_a_home_that_cannot_be_is_one_sentence_and_status_2(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for home in ("/proc/nope", str(file), str(file / "below")):
        for command in (["up"], ["up", "--detach"], ["demo"]):
            done = bridge(*command, "--home", home)
            assert done.returncode == 2, done.stderr
            assert home in done.stderr
            assert "--home" in done.stderr
            assert len(done.stderr.splitlines()) == 1
        done = bridge("down", "--home", home)
        assert (done.returncode, done.stdout) == (0, f"Nothing runs in {home}.\n")


def test_a_setting_the_service_cannot_use_ends_up_at_once_with_its_sentence(
    tmp_path: Path,
) -> None:
    """Instead of four restarts and a log to read."""
    for arguments in (["up"], ["up", "--detach"]):
        done = bridge(
            *arguments,
            *("--home", str(tmp_path), "--port", str(port_of_a_house())),
            BRIDGE_LEASE_SECONDS="soon",
        )
        assert done.returncode == 2
        assert "BRIDGE_LEASE_SECONDS" in done.stderr
        assert "Traceback" not in done.stderr
        assert "starting it again" not in done.stdout + done.stderr
    assert Home(tmp_path).state() is None


def test_a_service_of_another_home_or_port_is_told_with_commands_that_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BRIDGE_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    own, other = Home(), Home(tmp_path / "another home")
    assert hints.down(own) == f"{hints.bridge()} down"
    assert hints.elsewhere(own, "http://127.0.0.1:8000") == []
    assert hints.reaching(own, "http://127.0.0.1:8003") == hints.bridge()
    (told,) = hints.elsewhere(own, "http://127.0.0.1:8003")
    assert "export BRIDGE_URL=http://127.0.0.1:8003" in told
    words = shlex.split(hints.down(other))
    assert words[-2:] == ["--home", str(other.path)]
    assert subprocess.run(words, cwd="/", capture_output=True, timeout=120).returncode == 0
    assert hints.elsewhere(other, "http://127.0.0.1:8000")
    assert "--url http://127.0.0.1:8003" in hints.reaching(other, "http://127.0.0.1:8003")
    monkeypatch.setenv("BRIDGE_HOME", str(other.path))
    assert hints.down(Home()) == f"{hints.bridge()} down"


def test_the_demo_says_so_when_the_service_that_runs_cannot_take_a_job(tmp_path: Path) -> None:
    """One that was started long ago, or whose database is of another version."""
    home = Home(tmp_path)
    home.create()
    busy = say(503, '{"checks": {"database": "of another version"}}')
    with flaky(busy) as server:
        home.write(State(server.url, server.url, Process.of(os.getpid()), {}, True))
        done = bridge("demo", "--home", str(tmp_path))
    assert done.returncode == 1
    assert "of another version" in done.stderr
    assert f"down --home {tmp_path}" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_command_explains_itself() -> None:
    for command in (
        [],
        *(["up"], ["down"], ["demo"], ["generate"], ["adapters"], ["methods"], ["chat"], ["alias"]),
        *(["data", "upload"], ["data", "list"], ["jobs", "metrics"]),
        *(["jobs", name] for name in ("submit", "list", "show", "watch", "cancel", "logs")),
    ):
        done = CliRunner().invoke(app, [*command, "--help"])
        assert done.exit_code == 0
        assert "Usage:" in done.stdout
