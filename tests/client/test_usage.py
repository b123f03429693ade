"""What cannot be sent or written is one sentence and an exit status, in the SDK one of our errors:
never a traceback, and never a request."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bridge_client import AsyncClient, BridgeError, Client, SpecError, UsageError
from tests.client.flaky import flaky, say

JOB = json.dumps({"id": "job_1", "status": "queued"})
SPEC = {"method": "sft", "data": {"demos": "arithmetic"}}


def bridge(
    *arguments: str | bytes, url: str = "http://127.0.0.1:9", text: bytes = b"", **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BRIDGE_")}
    done = subprocess.run(
        [sys.executable, "-m", "bridge_client.cli", *arguments],
        env=environment | {"BRIDGE_URL": url, "NO_COLOR": "1"} | variables,
        input=text,
        capture_output=True,
        timeout=180,
    )
    out, err = (stream.decode("utf-8", "backslashreplace") for stream in (done.stdout, done.stderr))
    assert "Traceback" not in err
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def said(done: subprocess.CompletedProcess[str], status: int) -> str:
    """The one sentence."""
    assert done.returncode == status, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("bridge: ")
    return line


def test_a_folder_that_cannot_be_written_is_named_with_the_reason() -> None:
    archive = say(200, "x", "application/zip", Repr_Digest="sha-256=:AAAA:")
    with flaky(archive) as server:
        for more in ([], ["--unpack"]):
            done = bridge("adapters", "download", "j", "--to", "/proc/nope", *more, url=server.url)
            assert "/proc/nope" in said(done, 1)
            assert "No such file" in done.stderr


def test_a_port_that_is_none_is_wrong_usage() -> None:
    for command in ("demo", "up"):
        done = bridge(command, "--port", "99999")
        assert done.returncode == 2
        assert "65535" in done.stderr


def test_what_no_header_can_hold_is_named_and_nothing_is_sent(tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(SPEC))
    submit = ("jobs", "submit", str(file))
    with flaky(say(201, JOB)) as server:
        for done in (
            bridge("jobs", "list", url=server.url, BRIDGE_PROJECT="ünï"),
            bridge(*submit, "--project", "ünï", url=server.url),
        ):
            assert "project 'ünï'" in said(done, 2)
        for key in ("ünï", "a\nb", " a"):
            done = bridge(*submit, "--idempotency-key", key, url=server.url)
            assert f"idempotency key {key!r}" in said(done, 2)
    assert server.requests == []


def test_bytes_that_are_no_text_are_refused_where_they_stand() -> None:
    for locale in ("C.UTF-8", "en_US.UTF-8"):
        with flaky(say(200, "data: [DONE]\n\n", "text/event-stream")) as server:
            done = bridge("generate", b"\xff", "-a", "job_1", url=server.url, LC_ALL=locale)
            assert "UTF-8" in said(done, 2)
            done = bridge("jobs", "list", "--status", b"\xff", url=server.url, LC_ALL=locale)
            assert "UTF-8" in said(done, 2)
            assert server.requests == []
            done = bridge("chat", "job_1", url=server.url, text=b"1+\xff\n1+1?\n", LC_ALL=locale)
            assert "UTF-8" in said(done, 1)
        (request,) = server.requests  # the next question is asked
        assert json.loads(request[3])["prompt"] == "1+1?"


def test_what_a_terminal_cannot_show_is_shown_escaped() -> None:
    body = {"choices": [{"text": "ü→\udcff"}]}
    with flaky(say(200, json.dumps(body))) as server:
        asked = ("generate", "1", "-a", "job_1")
        done = bridge(*asked, url=server.url, PYTHONIOENCODING="ascii")
        assert (done.returncode, done.stdout) == (0, "\\xfc\\u2192\\udcff\n")
        for encoding in ("ascii", "utf-8"):
            done = bridge(*asked, "-o", "json", url=server.url, PYTHONIOENCODING=encoding)
            assert json.loads(done.stdout)["choices"][0]["text"] == "ü→\udcff"


@pytest.mark.parametrize(
    "url", ["http://[::1", "127.0.0.1:8000", "ftp://127.0.0.1", "http://", "x"]
)
def test_an_address_that_is_none_is_named(url: str) -> None:
    assert repr(url) in said(bridge("jobs", "list", url=url), 2)
    for client in (Client, AsyncClient):
        with pytest.raises(UsageError, match="BRIDGE_URL"):
            client(url)


def test_a_pipe_that_is_closed_early_is_no_error() -> None:
    rows = [{"id": f"job_{i}", "status": "queued"} for i in range(100)] * 20
    with flaky(say(200, json.dumps({"data": rows, "has_more": False}))) as server:
        script = f"{sys.executable} -m bridge_client.cli jobs list -n 1000 -o json | head -c 10"
        done = subprocess.run(
            ["sh", "-c", script],
            env=os.environ | {"BRIDGE_URL": server.url},
            capture_output=True,
            text=True,
            timeout=180,
        )
    assert done.stderr == ""


@pytest.mark.parametrize("name", ["", None, 5])
def test_an_id_that_is_none_is_refused_by_both_clients_and_not_sent(name: Any) -> None:
    async def ask(url: str) -> None:
        async with AsyncClient(url) as client:
            with pytest.raises(UsageError, match=repr(name)):
                await client.job(name)
            with pytest.raises(UsageError, match=repr(name)):
                async for _ in client.events(name):
                    pass

    with flaky(say(200, JOB)) as server, Client(server.url) as client:
        for call in (client.job, client.cancel, client.adapter, client.delete, client.metrics):
            with pytest.raises(UsageError, match=repr(name)):
                call(name)
        asyncio.run(ask(server.url))
    assert server.requests == []


@pytest.mark.parametrize("spec", [None, 5, ["sft"]])
def test_what_is_no_spec_is_refused_with_what_one_is(spec: Any) -> None:
    with Client("http://127.0.0.1:9") as client:
        for call in (client.submit, client.dry_run):
            with pytest.raises(SpecError, match="mapping"):
                call(spec)


def test_a_body_that_is_no_json_is_refused(tmp_path: Path) -> None:
    with Client("http://127.0.0.1:9") as client:
        with pytest.raises(UsageError, match="JSON"):
            client.generate("1", model="m", temperature=float("nan"))
        with pytest.raises(BridgeError, match="UTF-8"):
            client.generate("\udcff", model="m")


def test_a_metric_is_asked_for_by_its_name_or_with_others() -> None:
    metrics = json.dumps({"job_id": "job_1", "metrics": {"accuracy": [[1, 0.5]]}})
    with flaky(say(200, metrics)) as server, Client(server.url) as client:
        client.metrics("job_1", keys="accuracy")
        client.metrics("job_1", keys=["accuracy", "reward"])
    asked = [path.partition("?")[2] for _, path, _, _ in server.requests]
    assert asked == ["keys=accuracy", "keys=accuracy%2Creward"]
