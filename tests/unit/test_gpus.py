"""GPUs of a worker: which there are, who holds which, and how the engine is started on several."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from service.settings import Settings
from service.store import Claim, Offer
from worker.gpus import Gpus, command, environment, visible


def claim_of(gpus: int) -> Any:
    return Claim(SimpleNamespace(id="job_1"), 1, gpus)  # type: ignore[arg-type]


def test_gpus_are_those_told_else_those_shown_and_what_is_missing_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 0; echo 1; echo 2\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name in ("CUDA_VISIBLE_DEVICES", "BRIDGE_GPUS", "BRIDGE_QUEUES"):
        monkeypatch.delenv(name, raising=False)
    assert visible(Settings()) == ("0", "1", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, 2")
    assert visible(Settings()) == ("1", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert visible(Settings()) == ()
    assert not caplog.records
    monkeypatch.setenv("BRIDGE_GPUS", "0,2,GPU-ab")
    assert visible(Settings()) == ("0", "2", "GPU-ab")
    assert not caplog.records
    monkeypatch.setenv("BRIDGE_GPUS", "4,GPU-ab")
    assert visible(Settings()) == ("4", "GPU-ab")
    assert caplog.messages[0].endswith("GPUs that are not here missing=4 found=0,1,2")
    assert Gpus.of(Settings()).queues == ("any", "cpu", "gpu", "gpu:2")
    monkeypatch.setenv("BRIDGE_GPUS", "none")
    assert Gpus.of(Settings()).queues == ("any", "cpu")
    monkeypatch.setenv("BRIDGE_QUEUES", "cpu, cpu")
    assert Gpus.of(Settings()).queues == ("cpu",)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("QUEUES", "gpu:9", "'gpu:9' is not a queue"), ("GPUS", "0,0", "names a GPU twice")],
)
def test_settings_that_make_no_sense_are_refused(
    name: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"BRIDGE_{name}", value)
    with pytest.raises(ValidationError, match=says):
        Settings()


def test_each_gpu_is_given_to_one_job_until_it_comes_back() -> None:
    gpus = Gpus(["5", "7", "9"])
    offers: list[Offer] = []

    def take(number: int) -> Any:
        def claim(offer: Offer) -> Claim:
            offers.append(offer)
            return claim_of(number)

        return gpus.claim(claim)

    two, none, one = take(2), take(0), take(1)
    assert [c.devices for c in (two, none, one)] == [("5", "7"), (), ("9",)]
    assert [offer.free for offer in offers] == [3, 1, 1]
    gpus.give_back(two)
    gpus.give_back(one)
    assert take(3).devices == ("5", "7", "9")
    assert gpus.claim(lambda offer: None) is None


def test_the_engine_sees_its_gpus_alone() -> None:
    gpus = Gpus(["5"])
    claim = gpus.claim(lambda _: claim_of(1))
    assert claim
    assert environment(claim) == {"CUDA_VISIBLE_DEVICES": "5"}
    on_cpu = gpus.claim(lambda _: claim_of(0))
    assert on_cpu
    assert environment(on_cpu) == {"CUDA_VISIBLE_DEVICES": ""}
    unknown = Gpus(()).claim(lambda _: claim_of(0))
    assert unknown
    assert environment(unknown) == {}, "a worker that knows of no GPUs hides none"


def test_several_gpus_are_a_process_each() -> None:
    engine = [sys.executable, "-m", "bridge_engine"]
    assert command(claim_of(1), engine) == engine
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    assert command(claim_of(2), engine) == [*torchrun, "--nproc-per-node=2", *engine[1:]]
    for own in (["torchrun", "--nproc-per-node", "4", "-m", "bridge_engine"], ["my-engine"]):
        assert command(claim_of(4), own) == own, "who says it otherwise knows it better"
