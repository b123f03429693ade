"""The GPUs of a worker, and which job holds which.

Slots of one worker share them: a claim and the counting of what is free happen under one lock, so
two slots never give away the same GPU.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from service.settings import Settings
from service.store import Claim, Offer
from service.store.queues import served_by
from worker import log


def visible(settings: Settings) -> tuple[str, ...]:
    """Ids of the GPUs that this worker may use: those it is told (BRIDGE_GPUS, else
    CUDA_VISIBLE_DEVICES), else those that nvidia-smi shows."""
    if settings.gpus is not None:
        return _told(settings.gpus)
    if (told := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return tuple(word for part in told.split(",") if (word := part.strip()) not in ("", "-1"))
    return _found()


def _told(ids: Sequence[str]) -> tuple[str, ...]:
    """BRIDGE_GPUS as it is: whoever says so may know better than nvidia-smi, and is told."""
    numbers = [id for id in ids if id.isdecimal()]  # a UUID, or a part of one, is not looked up
    if numbers and (missing := sorted(set(numbers) - set(found := _found()), key=int)):
        log.warning(
            "BRIDGE_GPUS names GPUs that are not here",
            missing=",".join(missing),
            found=",".join(found) or "none",
        )
    return tuple(ids)


def _found() -> tuple[str, ...]:
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()  # no NVIDIA driver here
    return tuple(shown.stdout.split())


class Gpus:
    """The queues a worker serves, and its GPUs."""

    def __init__(self, ids: Sequence[str], queues: Sequence[str] = ()) -> None:
        """`queues`: none for all those that so many GPUs can serve."""
        self.ids = tuple(ids)
        self.queues = tuple(queues) or served_by(len(self.ids))
        self._free = list(self.ids)
        self._lock = threading.Lock()

    @classmethod
    def of(cls, settings: Settings) -> Gpus:
        """Those that the settings name, or that are found here."""
        gpus = cls(visible(settings), settings.queues)
        if idle := [queue for queue in gpus.queues if queue not in served_by(len(gpus.ids))]:
            log.warning("served in name only", queues=",".join(idle), gpus=len(gpus.ids))
        return gpus

    def claim(self, take: Callable[[Offer], Claim | None]) -> Claim | None:
        """The job that `take` claims with what is free now, and the GPUs it gets, which it holds
        until `give_back`."""
        with self._lock:
            claim = take(Offer(self.queues, len(self.ids), len(self._free)))
            if claim is None or not self.ids:
                return claim
            devices, self._free = self._free[: claim.gpus], self._free[claim.gpus :]
            return replace(claim, devices=tuple(devices))

    def offer(self) -> Offer:
        """What a job could be given now."""
        with self._lock:
            return Offer(self.queues, len(self.ids), len(self._free))

    def give_back(self, claim: Claim) -> None:
        """The job has left its GPUs."""
        with self._lock:
            self._free = sorted([*self._free, *(claim.devices or ())], key=self.ids.index)


def environment(claim: Claim) -> dict[str, str]:
    """Shows the engine the GPUs it was given, and no others."""
    return {} if claim.devices is None else {"CUDA_VISIBLE_DEVICES": ",".join(claim.devices)}


def command(claim: Claim, engine: Sequence[str]) -> list[str]:
    """How to start the engine: with several GPUs under torchrun, a process each. A command other
    than `PYTHON -m MODULE` is taken to know by itself."""
    if claim.gpus < 2 or engine[1:2] != ["-m"] or "torch.distributed.run" in engine:
        return list(engine)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={claim.gpus}"]
    return [engine[0], *torchrun, *engine[1:]]
