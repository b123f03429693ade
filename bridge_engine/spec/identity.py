"""What makes two specs the same."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from bridge_engine.spec.job import JobSpec


def spec_sha256(spec: JobSpec) -> str:
    """SHA-256 of a resolved spec's canonical JSON: what is computed, whatever it is called."""
    canonical = json.dumps(spec_document(spec), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def spec_document(spec: JobSpec) -> dict[str, Any]:
    """A spec as JSON, without what changes nothing of the result: its name and its resources."""
    return spec.model_dump(mode="json", by_alias=True, exclude={"name", "resources"})
