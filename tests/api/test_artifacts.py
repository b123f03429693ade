"""Adapters that are downloaded, fetched from an artifact store, and deleted with their job."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import shlex
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from bridge_engine.models.catalog import resolve_model
from bridge_engine.spec.train import TrainSpec
from bridge_engine.state.checkpoint import publish
from service.adapters.files import WEIGHTS, adapter_folder, stored_file
from service.artifacts import ArtifactStore, Damaged, Stored
from service.artifacts.cache import ArtifactCache
from service.settings import Settings
from service.store import Artifact, Store
from service.store.artifacts import publication
from tests.api.conftest import BRIDGE, Worker, connect, problem


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    return settings.model_copy(update={"artifacts_url": f"file://{tmp_path / 'shared'}"})


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with connect(settings) as client:
        yield client


class Trained:
    """A job with one checkpoint, published as a worker does on a machine of its own."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        folder: Path,
        weights: bytes,
        config: str = "{}",
        model: str = "bridge-tiny",
    ) -> None:
        self.store, self.artifacts = store, ArtifactStore(settings.artifacts_url)
        worker = Worker(store)
        spec = TrainSpec.model_validate({**BRIDGE, "model": model})
        self.job = store.create_job(spec, total_steps=10)[0].id
        self.attempt = worker.claim(self.job)
        event = worker.checkpoint(5, 0.25)

        def write(temporary: Path) -> None:
            (temporary / WEIGHTS).write_bytes(weights)
            (temporary / "adapter_config.json").write_text(config)
            (temporary / "bridge.json").write_text(json.dumps({"template": {"kind": "plain"}}))

        publish(folder, write)
        event.sha256 = hashlib.sha256(weights).hexdigest()
        event.seq, event.time = 1, 1.7e9
        sha256 = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
        prefix = publication(self.job, str(event.adapter), self.attempt, sha256)
        self.stored = self.artifacts.put(folder, prefix)
        row = Artifact(str(event.adapter), 5, prefix, sha256, self.stored.bytes)
        store.append_events(self.job, self.attempt, [event], [row])

    @property
    def name(self) -> str:
        return f"{self.job}@5"


@pytest.fixture
def trained(settings: Settings, store: Store, tmp_path: Path) -> Trained:
    return Trained(settings, store, tmp_path / "elsewhere" / "step-000005", b"weights")


def test_an_adapter_comes_from_the_store_once_and_is_verified(
    settings: Settings, store: Store, trained: Trained
) -> None:
    folder = adapter_folder(store.adapter(trained.name), store, settings)
    assert (folder / WEIGHTS).read_bytes() == b"weights"
    trained.artifacts.delete(trained.stored.prefix)
    assert adapter_folder(store.adapter(trained.name), store, settings) == folder


def test_one_file_is_fetched_alone_and_verified(
    settings: Settings, store: Store, trained: Trained, tmp_path: Path
) -> None:
    published = tmp_path / "shared" / trained.stored.prefix
    (published / WEIGHTS).unlink()
    card = stored_file(store.adapter(trained.name), "bridge.json", store, settings)
    assert json.loads(card) == {"template": {"kind": "plain"}}
    assert not settings.cache_dir.exists()
    with pytest.raises(Damaged, match="has no README"):
        trained.artifacts.read(trained.stored, "README.md")
    (published / "bridge.json").write_text("{}")
    with pytest.raises(Damaged, match=r"bridge\.json is damaged"):
        trained.artifacts.read(trained.stored, "bridge.json")


def test_other_bytes_in_the_store_are_refused_and_named(
    client: TestClient, settings: Settings, trained: Trained, tmp_path: Path
) -> None:
    (tmp_path / "shared" / trained.stored.prefix / WEIGHTS).write_bytes(b"others")
    body = problem(client.get(f"/adapters/{trained.name}/download"), 502, "adapter_damaged")
    assert f"{trained.stored.prefix}/{WEIGHTS} is damaged" in body["detail"]
    asked = {"adapter": trained.name, "prompt": "1+1?"}
    body = problem(client.post("/generate", json=asked), 502, "adapter_failed")
    assert f"{WEIGHTS} is damaged: its SHA-256 is" in body["detail"]
    assert client.get(f"/adapters/{trained.name}").json()["status"] == "failed"
    assert list(settings.cache_dir.glob("[0-9a-f]*")) == []


def test_a_download_is_announced_and_always_the_same(client: TestClient, trained: Trained) -> None:
    first = client.get(f"/adapters/{trained.job}@best/download")
    assert first.status_code == 200
    assert first.headers["content-type"] == "application/zip"
    digest = hashlib.sha256(first.content)
    assert first.headers["etag"] == f'"{digest.hexdigest()}"'
    assert first.headers["repr-digest"] == f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
    assert int(first.headers["content-length"]) == len(first.content)
    assert f'filename="{trained.job}-step-5.zip"' in first.headers["content-disposition"]
    again = {"If-None-Match": first.headers["etag"]}
    assert client.get(f"/adapters/{trained.name}/download", headers=again).status_code == 304
    head = client.head(f"/adapters/{trained.name}/download")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers.items() - {("x-request-id", head.headers["x-request-id"])} <= set(
        first.headers.items()
    )
    assert {"content-length", "content-type", "etag"} <= set(head.headers)
    assert client.head(f"/adapters/{trained.name}/download", headers=again).status_code == 304
    archive = zipfile.ZipFile(io.BytesIO(first.content))
    assert archive.testzip() is None
    assert archive.read(WEIGHTS) == b"weights"
    card = archive.read("README.md").decode()
    assert card.startswith('---\nbase_model: "bridge-tiny"\nlibrary_name: "peft"\n')
    for fact in (
        "| Method | bridge |",
        "25.0%",
        trained.job,
        "| Data, demos | arithmetic",
        digest_of(b"weights"),
    ):
        assert fact in card
    assert 'tags: ["lora", "bridge"]\n' in card  # the method's name is ours here
    problem(client.get("/adapters/job_none@1/download"), 404, "unknown_adapter")


def test_a_cards_lists_are_words(client: TestClient, trained: Trained) -> None:
    from service.adapters.card import model_card

    store: Store = client.app.state.store  # type: ignore[attr-defined]
    job = store.get_job(trained.job)
    job.spec = {**job.spec, "data": {"prompts": {"name": "arithmetic", "kinds": ["add3", "mul"]}}}
    card = model_card(store.adapter(trained.name), job)
    assert "| Data, prompts | arithmetic (kinds add3 and mul) |" in card


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("name", ["bridge-tiny", "mine", "some/tiny"])
def test_the_cards_snippet_loads_an_unpacked_download(
    name: str,
    client: TestClient,
    settings: Settings,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As it stands there, in the folder; a built-in base, a folder of one's own, the hub's."""
    import torch

    from bridge_engine.export import AdapterCard, export_adapter
    from bridge_engine.policy import Policy
    from bridge_engine.spec.train import LoraSpec, RuntimeSpec

    tiny = resolve_model("bridge-tiny").path
    assert tiny is not None
    monkeypatch.setenv("BRIDGE_MODEL_DIR", str(tmp_path / "models"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached = tmp_path / "hub" / "models--some--tiny"
    shutil.copytree(tiny, tmp_path / "models" / "mine")
    shutil.copytree(tiny, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")

    policy = Policy.load("bridge-tiny", LoraSpec(rank=2), RuntimeSpec(device="cpu"))
    policy.add("student", 0)
    with torch.no_grad():
        for parameter in policy.parameters("student"):
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    card = AdapterCard(name, "sft", 5, 2, {"kind": "plain"}, 16)
    export_adapter(policy.adapters, ("student",), tmp_path / "export", card)
    weights = (tmp_path / "export" / WEIGHTS).read_bytes()
    config = (tmp_path / "export" / "adapter_config.json").read_text()
    made = Trained(settings, store, tmp_path / "elsewhere", weights, config, name)
    answer = client.get(f"/adapters/{made.name}/download")
    zipfile.ZipFile(io.BytesIO(answer.content)).extractall(tmp_path / "unpacked")
    text = (tmp_path / "unpacked" / "README.md").read_text()
    snippet = text.partition("```python\n")[2].partition("```")[0]
    if name != "some/tiny":
        command = text.partition("```sh\n")[2].partition("```")[0].strip()
        program = shlex.split(command)[2]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(program, {})
        assert "PATH TO THE BASE" in snippet
        snippet = snippet.replace("PATH TO THE BASE", printed.getvalue().strip())
    monkeypatch.chdir(tmp_path / "unpacked")
    named: dict[str, Any] = {}
    exec(snippet, named)
    question = named["tokenizer"]("12+3-5?", return_tensors="pt")
    with torch.no_grad():
        bare = policy.model(**question).logits
        with policy.using("student"):
            expected = policy.model(**question).logits
        found = named["model"](**question).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (bare - expected).abs().max() > 0.05, "an adapter that does nothing proves nothing"


def test_the_cache_is_bounded_and_keeps_what_was_asked_for_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.artifacts.cache.IN_USE_SECONDS", 0.0)
    artifacts = ArtifactStore(f"file://{tmp_path / 'shared'}")
    cache = ArtifactCache(tmp_path / "cache", 2500, artifacts)
    stored: list[Stored] = []
    for number in range(3):
        folder = tmp_path / f"folder-{number}"
        publish(folder, lambda f, n=number: (f / "w").write_bytes(bytes([n]) * 1000))  # type: ignore[misc]
        stored.append(artifacts.put(folder, f"job/x/1-{number}"))
    first, second = (cache.folder(one) for one in stored[:2])
    assert cache.folder(stored[0]) == first
    third = cache.folder(stored[2])
    assert [path.exists() for path in (first, second, third)] == [True, False, True]
    assert cache.folder(stored[1]).exists(), "it comes back when it is asked for"


def test_a_deleted_job_leaves_nothing(
    client: TestClient, settings: Settings, trained: Trained, tmp_path: Path
) -> None:
    problem(client.delete(f"/jobs/{trained.job}"), 409, "job_not_ended")
    run = settings.run_dir(trained.job)
    run.mkdir(parents=True)
    (run / "engine.log").write_text("x")
    trained.store.finish(trained.job, trained.attempt, "succeeded")
    assert client.delete(f"/jobs/{trained.job}").status_code == 204
    assert not run.exists()
    assert trained.artifacts.publications(trained.job) == set()
    problem(client.get(f"/jobs/{trained.job}"), 404)
    problem(client.get(f"/adapters/{trained.name}"), 404, "unknown_adapter")
    problem(client.delete(f"/jobs/{trained.job}"), 404)


def test_a_deletion_cut_short_is_finished_by_the_next_one(
    client: TestClient, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("cut short")

    trained.store.finish(trained.job, trained.attempt, "succeeded")
    with monkeypatch.context() as broken:
        broken.setattr(ArtifactStore, "delete", fail)
        assert client.delete(f"/jobs/{trained.job}").status_code == 202
    problem(client.get(f"/jobs/{trained.job}"), 404)
    assert trained.store.deleted_jobs() == [trained.job]
    assert trained.artifacts.publications(trained.job) != set()
    assert client.delete(f"/jobs/{trained.job}").status_code == 204
    assert trained.store.deleted_jobs() == []
    assert trained.artifacts.publications(trained.job) == set()
