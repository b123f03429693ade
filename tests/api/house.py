"""Inference processes and jobs whose adapters are really there, for the tests of generation."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from bridge_engine.catalog import resolve_model
from bridge_engine.spec import TrainSpec
from service.settings import Settings
from service.store import Store
from tests.api.conftest import BRIDGE, Worker

KEPT = 3
"""Adapters that the inference process of most tests keeps loaded."""
RANK = 4


def free_port() -> int:
    """A port nothing listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start_inference(port: int, **env: str) -> subprocess.Popen[bytes]:
    """`python -m inference`, once it answers."""
    command = [sys.executable, "-m", "inference", "--port", str(port)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | env)
    deadline = time.monotonic() + 240  # on a busy machine importing torch takes minutes
    while True:
        try:
            assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=30).is_success
            return process
        except httpx.TransportError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)


@contextmanager
def inference_process(**env: str) -> Iterator[str]:
    """The same while it lasts; its address."""
    port = free_port()
    process = start_inference(port, **env)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def random_adapter(folder: Path, seed: int, targets: str = "all-linear") -> Path:
    """An adapter of bridge-tiny with weights that change every answer, as PEFT saves it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(resolve_model("bridge-tiny").path)
    config = LoraConfig(r=RANK, target_modules=targets, task_type="CAUSAL_LM")
    tuned: Any = get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, weight in tuned.named_parameters():
            if "lora_" in key:
                weight.normal_(std=0.3)
    tuned.save_pretrained(folder)
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

    def status(self, step: int) -> str:
        """The registry's word for the step's adapter."""
        return self.store.adapter(f"{self.job}@{step}").status
