"""Inference processes and jobs whose adapters are really there, for the tests of generation."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from bridge_engine.models.catalog import resolve_model
from bridge_engine.spec.train import TrainSpec
from bridge_engine.state.checkpoint import MANIFEST
from service.app import create_app
from service.settings import Settings
from service.store import Store
from tests.api.conftest import BRIDGE, Worker
from tests.support.ports import free_port
from tests.support.served import Served

KEPT = 3
"""Adapters that the inference process of most tests keeps loaded."""
RANK = 4


def start_inference(port: int, **env: str) -> subprocess.Popen[bytes]:
    """`python -m inference`, once it answers."""
    command = [sys.executable, "-m", "inference", "--port", str(port)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | env)
    deadline = time.monotonic() + 500  # on a busy machine importing torch takes minutes
    try:
        while True:
            try:
                assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=120).is_success
                return process
            except httpx.TransportError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)
    except BaseException:
        process.kill()
        raise


@contextmanager
def inference_process(**env: str) -> Iterator[str]:
    """The same while it lasts; its address."""
    port = free_port()
    process = start_inference(port, **env)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(120)


def random_adapter(folder: Path, seed: int) -> Path:
    """An adapter of all of bridge-tiny's linear layers with weights that change every answer, in
    PEFT's format (`tests/unit/test_continuous_batching.py` has those that PEFT itself saved)."""
    import numpy as np
    from safetensors import safe_open
    from safetensors.numpy import save_file

    base = resolve_model("bridge-tiny").path
    assert base is not None
    rng = np.random.default_rng(seed)
    tensors, targets = {}, set()
    with safe_open(base / "model.safetensors", framework="np") as weights:
        for key in weights.keys():  # noqa: SIM118 - not a mapping
            path, _, leaf = key.rpartition(".")
            name = path.rpartition(".")[2]
            if leaf != "weight" or not name.endswith("_proj"):
                continue
            out, into = weights.get_slice(key).get_shape()
            targets.add(name)
            for matrix, shape in (("A", (RANK, into)), ("B", (out, RANK))):
                drawn = rng.normal(scale=0.3, size=shape).astype(np.float32)
                tensors[f"base_model.model.{path}.lora_{matrix}.weight"] = drawn
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted(targets),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    card = {"base_model": "bridge-tiny", "template": {"kind": "plain", "suffix": "?"}}
    (folder / "bridge.json").write_text(json.dumps(card))
    return folder


class House:
    """A job whose checkpoints' adapters are really there."""

    def __init__(self, settings: Settings, store: Store, weights: dict[str, Path]) -> None:
        self.settings, self.store, self.weights = settings, store, weights
        self.worker = Worker(store)
        spec = TrainSpec.model_validate(BRIDGE)
        self.job = store.create_job(spec, total_steps=10)[0].id
        self.attempt = self.worker.claim(self.job)

    def save(self, step: int, name: str, accuracy: float | None = None, rank: int = RANK) -> Path:
        """Registers a copy of these weights as the step's adapter; its folder."""
        event = self.worker.checkpoint(step, accuracy)
        folder = self.settings.run_dir(self.job) / event.adapter
        shutil.copytree(self.weights[name], folder)
        content = (folder / "adapter_model.safetensors").read_bytes()
        event.sha256 = hashlib.sha256(content).hexdigest()
        event.rank = rank
        self.worker.emit(self.job, self.attempt, event)
        return folder

    def save_model(self, step: int, name: str) -> Path:
        """Registers a copy of this whole model as the step's; its folder."""
        event = self.worker.checkpoint(step)
        event.merged = event.adapter.replace("adapters", "models")
        folder = self.settings.run_dir(self.job) / event.merged
        shutil.copytree(self.weights[name], folder)
        event.merged_sha256 = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
        event.adapter = event.sha256 = event.rank = None
        self.worker.emit(self.job, self.attempt, event)
        return folder

    def status(self, step: int) -> str:
        """The registry's word for the step's adapter."""
        return self.store.adapter(f"{self.job}@{step}").status


class Service(Served):
    """Ours."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(create_app(settings))

    @property
    def store(self) -> Store:
        return self.app.state.store  # type: ignore[no-any-return]
