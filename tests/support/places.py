"""A place where few names can be had: a model called `small`, some benchmarks, two uploads; and
specs of them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from bridge_engine.spec import checks
from bridge_engine.spec.errors import FieldError
from bridge_engine.spec.train import TrainSpec

CONTEXT = 256
"""Tokens that `small` reads."""


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder called `small`, GSM8K and SVAMP on disk, uploads, no network."""
    small = tmp_path / "models" / "small"
    small.mkdir(parents=True)
    config = {"model_type": "qwen2", "max_position_embeddings": CONTEXT}
    (small / "config.json").write_text(json.dumps(config))
    header = json.dumps({"w": {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 60]}}).encode()
    (small / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(60))
    data = tmp_path / "data"
    data.mkdir()
    for name in ("gsm8k_train.jsonl.gz", "gsm8k_test.jsonl", "svamp.jsonl", "math_train.jsonl.gz"):
        (data / name).touch()
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    (uploads / "ds_plain.jsonl").write_text('{"problem": "p", "answer": "1"}\n')
    (uploads / "ds_solved.jsonl").write_text('{"problem": "p", "answer": "1", "solution": "#1"}\n')
    monkeypatch.setenv("BRIDGE_MODEL_DIR", str(tmp_path / "models"))
    monkeypatch.setenv("BRIDGE_DATA_DIR", str(data))
    monkeypatch.setenv("BRIDGE_UPLOADS_DIR", str(uploads))
    monkeypatch.setenv("BRIDGE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def spec(**changes: Any) -> TrainSpec:
    data = {"prompts": "arithmetic", "demos": "arithmetic", "eval": "arithmetic"}
    data.update(changes.pop("data", {}))
    given = {"method": "bridge", "model": "small", "data": data, **changes}
    return TrainSpec.model_validate(given)


def only_error(**changes: Any) -> FieldError:
    (error,) = checks.check_spec(spec(**changes))
    return error
