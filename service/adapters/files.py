"""Where an adapter's files lie on this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bridge_engine.state.checkpoint import MANIFEST, is_whole
from service.artifacts import (
    ArtifactStore,
    ArtifactsUnavailable,
    Damaged,
    Stored,
    artifact_store,
)
from service.artifacts.cache import ArtifactCache
from service.errors import ApiError
from service.settings import Settings
from service.store import AdapterRow, Store

WEIGHTS = "adapter_model.safetensors"


def adapter_folder(adapter: AdapterRow, store: Store, settings: Settings) -> Path:
    """The adapter's folder: in the artifact cache, fetched and verified; in the job's run directory
    where no artifact store is set, or the adapter was made before one was.

    Raises Damaged that names the file at fault; `ApiError` 503 where the store does not answer.
    """
    published = _published(adapter, store, settings)
    if published is None:
        return settings.run_dir(adapter.job_id) / adapter.path
    artifacts, stored = published
    cache = ArtifactCache(settings.cache_dir, settings.artifacts_cache_bytes, artifacts)
    with _fetching(adapter):
        return cache.folder(stored)


def stored_file(adapter: AdapterRow, name: str, store: Store, settings: Settings) -> bytes:
    """One file of the adapter's, and none of the others; raises as `adapter_folder` does."""
    published = _published(adapter, store, settings)
    if published is None:
        try:
            return (settings.run_dir(adapter.job_id) / adapter.path / name).read_bytes()
        except OSError as error:
            raise Damaged(f"its {name} cannot be read: {error}") from error
    artifacts, stored = published
    with _fetching(adapter):
        return artifacts.read(stored, name)


def _published(
    adapter: AdapterRow, store: Store, settings: Settings
) -> tuple[ArtifactStore, Stored] | None:
    artifacts = artifact_store(settings.artifacts_url)
    row = store.artifact(adapter.job_id, adapter.path) if artifacts is not None else None
    if artifacts is None or row is None:
        return None
    return artifacts, Stored(row.prefix, row.sha256, row.bytes)


@contextmanager
def _fetching(adapter: AdapterRow) -> Iterator[None]:
    try:
        yield
    except ArtifactsUnavailable as error:
        raise ApiError(
            503,
            "artifacts_unavailable",
            f"adapter {adapter.name} cannot be fetched now: {error.message}",
            param="adapter",
            given=adapter.name,
            headers={"Retry-After": "5"},
            outside=f"adapter {adapter.name} cannot be fetched now; try again",
        ) from error


def check_weights(adapter: AdapterRow, folder: Path) -> None:
    """Raises Damaged unless the weights are those that were registered."""
    try:
        with (folder / (MANIFEST if adapter.is_model else WEIGHTS)).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Damaged(f"its weights cannot be read: {error}") from error
    if adapter.is_model and not is_whole(folder):
        raise Damaged(f"the model in {folder} is not what its manifest says")
    if found != adapter.sha256:
        raise Damaged(
            f"the weights in {folder} are not those that were registered (their SHA-256 is "
            f"{found[:12]}…, not {adapter.sha256[:12]}…)"
        )
