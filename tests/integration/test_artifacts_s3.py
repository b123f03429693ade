"""Checkpoints and adapters over a real S3 server: published whole, fetched whole, never lost."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import psutil
import pytest

from bridge_engine.spec.train import TrainSpec
from bridge_engine.state.checkpoint import MANIFEST, is_whole, publish
from service.artifacts import ArtifactStore, ArtifactsUnavailable, Damaged, Stored, artifact_store
from service.settings import Settings
from service.store import Store
from service.store.artifacts import attempt_of
from tests.support.jobs import LONG, checkpoint, held, let_go, numbered, submit, wait_until
from tests.support.s3 import KEYS, Gate
from tests.support.scripted_engine import reward
from worker.execute import execute_job
from worker.lease import Lease
from worker.publish import publishing
from worker.sweep import sweep

BUCKET = "bridge"


@pytest.fixture
def gate(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """The way to the server; its bucket is empty."""
    gate = Gate(int(s3_url.rpartition(":")[2]))
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{gate.port}")
    artifact_store.cache_clear()
    server = boto3.resource("s3", endpoint_url=s3_url)
    bucket = server.create_bucket(Bucket=BUCKET)
    bucket.objects.all().delete()
    yield gate
    gate.shut()
    artifact_store.cache_clear()


@pytest.fixture
def bucket(gate: Gate, s3_url: str) -> Bucket:
    return Bucket(s3_url)


class Bucket:
    """What lies in the bucket, seen past the gate."""

    def __init__(self, url: str) -> None:
        self._bucket = boto3.resource("s3", endpoint_url=url).Bucket(BUCKET)

    def all(self) -> list[str]:
        return sorted(item.key for item in self._bucket.objects.all())

    def write(self, key: str, content: bytes) -> None:
        self._bucket.put_object(Key=key, Body=content)


@pytest.fixture
def at(tmp_path: Path, migrated_sqlite: Path, gate: Gate) -> Callable[..., Settings]:
    """The settings of a machine with a disk of its own; all share the database and the bucket."""
    shutil.copyfile(migrated_sqlite, tmp_path / "bridge.db")

    def at(machine: str, **changes: object) -> Settings:
        given = {
            "home": tmp_path / machine,
            "database_url": f"sqlite:///{tmp_path / 'bridge.db'}",
            "artifacts_url": f"s3://{BUCKET}/runs",
            "engine_command": [sys.executable, "-m", "tests.support.scripted_engine"],
            "lease_seconds": LONG,
            "heartbeat_seconds": 0.2,
            "grace_seconds": LONG,
            "retry_seconds": 0.001,
            "poll_seconds": 0.05,
        }
        return Settings(**{**given, **changes})

    return at


@pytest.fixture
def store(at: Callable[..., Settings]) -> Iterator[Store]:
    store = Store.from_settings(at("a"))
    yield store
    store.close()


def execute(
    job_id: str, store: Store, settings: Settings, stop: threading.Event | None = None
) -> str | None:
    return execute_job(
        job_id, store=store, settings=settings, worker_id="w", stop=stop or threading.Event()
    )


def run_until(step: int, job_id: str, store: Store, settings: Settings) -> str:
    """Runs the job until it has got so far, then stops the worker as SIGTERM does."""
    stop, answer = threading.Event(), []
    thread = threading.Thread(target=lambda: answer.append(execute(job_id, store, settings, stop)))
    thread.start()
    wait_until(store, job_id, lambda job: job.progress_step >= step)
    stop.set()
    thread.join()
    return str(answer[0])


def folder(path: Path, **files: str) -> Path:
    """A folder that was published in a run directory."""

    def write(temporary: Path) -> None:
        for name, content in files.items():
            (temporary / name).write_text(content)

    publish(path, write)
    return path


def artifacts() -> ArtifactStore:
    found = artifact_store(f"s3://{BUCKET}/runs")
    assert found is not None
    return found


# ---------------------------------------------------------------------- the store alone


def test_a_folder_comes_back_as_it_was(bucket: Bucket, tmp_path: Path) -> None:
    source = folder(tmp_path / "source", weights="abc", card="{}")
    stored = artifacts().put(source, "job_1/adapters/step-000001/1-a")
    artifacts().get(stored, tmp_path / "target")
    for path in source.iterdir():
        assert (tmp_path / "target" / path.name).read_bytes() == path.read_bytes()
    assert stored.bytes == len("abc{}")
    assert artifacts().publications("job_1") == {"job_1/adapters/step-000001/1-a"}
    assert artifacts().publications("job_") == set()


def test_the_manifest_is_written_last_and_deleted_first(
    bucket: Bucket, gate: Gate, tmp_path: Path
) -> None:
    source = folder(tmp_path / "source", weights="x" * 3_000_000, card="{}", extra="y" * 3_000_000)
    gate.shut_after = gate.passed + 4_000_000
    with pytest.raises(ArtifactsUnavailable, match=f"s3://{BUCKET}/runs"):
        artifacts().put(source, "job_1/adapters/step-000001/1-a")
    assert bucket.all(), "something was uploaded before the cut"
    assert not any(key.endswith(MANIFEST) for key in bucket.all())
    gate.open()
    half = Stored("job_1/adapters/step-000001/1-a", "0" * 64, 1)
    with pytest.raises(Damaged, match=r"manifest\.json is missing"):
        artifacts().get(half, tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("file", ["weights", MANIFEST])
def test_other_bytes_than_were_published_are_refused_and_named(
    bucket: Bucket, tmp_path: Path, file: str
) -> None:
    stored = artifacts().put(folder(tmp_path / "source", weights="abc"), "job_1/x/1-a")
    bucket.write(f"runs/job_1/x/1-a/{file}", b"{}")
    with pytest.raises(Damaged, match=f"job_1/x/1-a/{file} is damaged: its SHA-256 is 44136fa3"):
        artifacts().get(stored, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir() if "target" in path.name] == []


def test_a_folder_that_rotted_on_the_disk_is_not_published(bucket: Bucket, tmp_path: Path) -> None:
    source = folder(tmp_path / "source", weights="abc")
    (source / "weights").write_text("abd")
    with pytest.raises(Damaged, match="weights is damaged"):
        artifacts().put(source, "job_1/x/1-a")
    assert bucket.all() == []


# ---------------------------------------------------------------------- a job


def test_every_row_names_something_whole(
    store: Store, at: Callable[..., Settings], bucket: Bucket, tmp_path: Path
) -> None:
    job_id = submit(store, steps=10, every=4)
    assert execute(job_id, store, at("a")) == "succeeded"
    steps = (4, 8, 10)
    for step in steps:
        for kind in ("checkpoints", "adapters"):
            row = store.artifact(job_id, f"{kind}/step-{step:06d}")
            assert row is not None
            assert attempt_of(row.prefix) == 1
            target = tmp_path / f"{kind}-{step}"
            artifacts().get(Stored(row.prefix, row.sha256, row.bytes), target)
            assert is_whole(target)
    assert [c.step for c in store.checkpoints(job_id)] == list(steps)
    assert not (at("a").run_dir(job_id) / ".publishing").exists()


def test_a_step_that_is_saved_again_is_published_anew_if_its_bytes_are_others(
    store: Store, at: Callable[..., Settings], bucket: Bucket, tmp_path: Path
) -> None:
    job_id, settings, name = submit(store), at("a"), "step-000004"
    claim = store.claim(job_id, "w:0", 60)
    assert claim
    run, published = settings.run_dir(job_id), []
    with (
        Lease(store, claim, settings, since=time.monotonic()) as lease,
        publishing(store, claim, run, settings, lease) as publisher,
    ):
        assert publisher
        for seq, weights in enumerate(("one", "two", "two"), 1):
            for kind in ("checkpoints", "adapters"):
                shutil.rmtree(run / kind / name, ignore_errors=True)
                folder(run / kind / name, weights=weights)
            (event,) = numbered(checkpoint(4), start=seq)
            while (left := publisher.published(event)) is None:
                time.sleep(0.02)
            store.append_events(job_id, 1, [event], left)
            published.append({one.prefix for one in left})
    assert published[0].isdisjoint(published[1])
    assert published[1] == published[2], "said again, not sent again"
    row = store.artifact(job_id, f"adapters/{name}")
    assert row
    artifacts().get(Stored(row.prefix, row.sha256, row.bytes), tmp_path / "fetched")
    assert (tmp_path / "fetched" / "weights").read_text() == "two"


def test_a_server_that_is_down_for_some_seconds_loses_nothing(
    store: Store, at: Callable[..., Settings], gate: Gate, tmp_path: Path
) -> None:
    job_id = submit(store, steps=30, every=5, step_seconds=0.05, **held(20, tmp_path))
    answer: list[str | None] = []
    thread = threading.Thread(target=lambda: answer.append(execute(job_id, store, at("a"))))
    thread.start()
    wait_until(store, job_id, lambda job: job.checkpoint_step is not None)
    gate.shut()
    let_go(tmp_path)
    time.sleep(2)
    assert store.get_job(job_id).status == "running"
    gate.open()
    thread.join()
    assert answer == ["succeeded"]
    assert store.get_job(job_id).attempt == 1
    assert store.metrics(job_id)["reward"] == [(s, reward(s)) for s in range(1, 31)]
    seqs = [event.seq for event in store.events_after(job_id, limit=1000)]
    assert seqs == list(range(1, len(seqs) + 1))
    for step in (5, 10, 15, 20, 25, 30):
        assert store.artifact(job_id, f"adapters/step-{step:06d}") is not None


def test_a_store_that_stays_away_gives_the_job_back_and_says_so(
    store: Store, at: Callable[..., Settings], gate: Gate
) -> None:
    job_id = submit(store, steps=4, every=2)
    gate.shut()
    assert execute(job_id, store, at("a", artifacts_patience_seconds=0.5)) == "queued"
    (attempt,) = store.attempts(job_id)
    assert attempt.error is not None
    assert attempt.error["code"] == "artifacts_unavailable"
    assert f"s3://{BUCKET}/runs" in attempt.error["message"]
    gate.open()
    assert execute(job_id, store, at("a")) == "succeeded"


def test_an_upload_cut_off_by_a_crash_is_no_checkpoint_and_goes_at_the_next_sweep(
    store: Store, at: Callable[..., Settings], gate: Gate, bucket: Bucket
) -> None:
    job_id = submit(store, steps=8, every=4, weight_bytes=2_000_000)
    settings = at("a", artifacts_patience_seconds=0.5)
    gate.shut_after = gate.passed + 1_000_000
    assert execute(job_id, store, settings) == "queued"
    assert store.checkpoints(job_id) == [], "no row names what was not whole"
    half = bucket.all()
    assert any("/1-" in key for key in half)
    gate.open()
    assert execute(job_id, store, at("b")) == "succeeded"
    assert sweep(store, artifacts()) > 0
    named = {f"adapters/step-{s:06d}" for s in (4, 8)} | {
        f"checkpoints/step-{s:06d}" for s in (4, 8)
    }
    prefixes = {row.prefix for path in named if (row := store.artifact(job_id, path))}
    assert len(prefixes) == 4
    assert artifacts().publications(job_id) == prefixes
    assert sweep(store, artifacts()) == 0


def test_a_job_goes_on_where_another_machine_left_it(
    store: Store, at: Callable[..., Settings], tmp_path: Path
) -> None:
    job_id = submit(store, steps=50, every=5, step_seconds=0.1, **held(30, tmp_path))
    assert run_until(12, job_id, store, at("a")) == "queued"
    let_go(tmp_path)
    shutil.rmtree(at("a").home, ignore_errors=True)  # what it published is tidied up meanwhile
    assert execute(job_id, store, at("b")) == "succeeded"
    events = store.events_after(job_id, limit=1000)
    stopped, resumed = ([e.step for e in events if e.type == t] for t in ("stopped", "resume"))
    assert stopped == resumed != []
    assert any("was fetched from the artifact store" in str(e.data) for e in events)
    assert store.metrics(job_id)["reward"] == [(s, reward(s)) for s in range(1, 51)]


def test_a_machine_left_behind_starts_from_the_store_and_not_from_what_it_remembers(
    store: Store, at: Callable[..., Settings], tmp_path: Path
) -> None:
    """Its own newer checkpoint belongs to figures that the database has given up."""
    job_id = submit(store, steps=60, every=5, step_seconds=0.1, **held(30, tmp_path))
    assert run_until(7, job_id, store, at("a")) == "queued"
    run = at("a").run_dir(job_id)
    # the machine had come further, and died before it could say so
    folder(run / "checkpoints" / "step-000050", state="of another line")
    with (run / "events.jsonl").open("ab") as file:
        last = json.loads((run / "events.jsonl").read_bytes().splitlines()[-1])
        lost = {"seq": last["seq"] + 1, "time": 1.0, "type": "log", "message": "lost"}
        file.write(json.dumps(lost).encode() + b"\n")
    assert run_until(15, job_id, store, at("b")) == "queued"
    let_go(tmp_path)
    assert execute(job_id, store, at("a")) == "succeeded"
    assert store.metrics(job_id)["reward"] == [(s, reward(s)) for s in range(1, 61)]
    said = [e.data.get("message") for e in store.events_after(job_id, limit=1000)]
    assert "lost" not in said


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_named(
    store: Store, at: Callable[..., Settings], bucket: Bucket, tmp_path: Path
) -> None:
    job_id = submit(store, steps=50, every=5, step_seconds=0.1, **held(30, tmp_path))
    assert run_until(11, job_id, store, at("a")) == "queued"
    let_go(tmp_path)
    newest, before = store.states(job_id)[:2]
    bucket.write(f"runs/{newest.prefix}/state.json", b"rot")
    assert execute(job_id, store, at("b")) == "succeeded"
    events = store.events_after(job_id, limit=1000)
    warned = [e.data["message"] for e in events if e.data.get("level") == "warning"]
    assert len(warned) == 1
    assert f"checkpoint of step {newest.step}" in warned[0]
    assert f"{newest.prefix}/state.json is damaged" in warned[0]
    assert before.step in [e.step for e in events if e.type == "resume"]
    assert store.metrics(job_id)["reward"] == [(s, reward(s)) for s in range(1, 51)]


def test_a_job_that_lost_its_lease_publishes_no_row(
    store: Store, at: Callable[..., Settings], gate: Gate
) -> None:
    job_id = submit(store, steps=100_000, every=5, step_seconds=0.02)
    answer: list[str | None] = []
    thread = threading.Thread(target=lambda: answer.append(execute(job_id, store, at("a"))))
    thread.start()
    wait_until(store, job_id, lambda job: job.checkpoint_step is not None)
    gate.shut()  # the next checkpoint waits for its upload
    time.sleep(0.3)
    store.release(job_id, 1)
    thread.join(120)
    assert answer == ["stale"]
    before = {row.prefix for row in store.states(job_id)}
    gate.open()
    time.sleep(1)
    assert {row.prefix for row in store.states(job_id)} == before
    store.request_cancel(job_id)


def test_a_killed_run_goes_on_elsewhere_to_the_same_bytes(
    store: Store, at: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real engine, on machines that share no disk."""
    spec = TrainSpec.model_validate(
        {
            "method": "bridge",
            "model": "bridge-tiny",
            "data": {"prompts": "arithmetic", "demos": {"name": "arithmetic", "limit": 32}},
            "steps": 8,
            "rollout": {"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 24},
            "sft": {"batch_size": 4},
            "checkpoint": {"every": 2},
        }
    )
    real = {"engine_command": [sys.executable, "-m", "bridge_engine"]}
    waits = {"engine_command": [sys.executable, "-m", "tests.support.held_engine"]}
    monkeypatch.setenv("HOLD", f"5:{tmp_path / 'never'}")  # or it had ended before it is killed
    jobs = [store.create_job(spec, total_steps=8)[0].id for _ in range(2)]
    assert execute(jobs[0], store, at("c", **real)) == "succeeded"

    answer: list[str | None] = []
    thread = threading.Thread(
        target=lambda: answer.append(execute(jobs[1], store, at("a", **waits)))
    )
    thread.start()
    wait_until(store, jobs[1], lambda job: (job.checkpoint_step or 0) >= 2, seconds=120)
    for engine in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # another child that has just ended
            if str(at("a").run_dir(jobs[1])) in engine.cmdline():
                engine.kill()
    thread.join()
    assert answer == ["queued"]
    assert execute(jobs[1], store, at("b", **real)) == "succeeded"

    weights = "adapters/step-000008/adapter_model.safetensors"
    undisturbed, moved = at("c").run_dir(jobs[0]), at("b").run_dir(jobs[1])
    assert (moved / weights).read_bytes() == (undisturbed / weights).read_bytes()
    rewards = [store.metrics(job_id)["reward"] for job_id in jobs]
    assert rewards[0] == rewards[1]
    assert [step for step, _ in rewards[0]] == list(range(1, 9))
