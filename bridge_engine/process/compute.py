"""The process's compute settings, set on purpose and written down."""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Any

import torch
import transformers

import bridge_engine
from bridge_engine.distributed.ranks import World
from bridge_engine.models.catalog import resolve_model
from bridge_engine.models.loading import resolve_device, resolve_dtype
from bridge_engine.policy import SMALL_MODEL
from bridge_engine.spec.job import JobSpec

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""From glibc's malloc.h."""


def configure(spec: JobSpec, world: World | None = None) -> dict[str, Any]:
    """Sets threads and determinism; returns what a reader needs to repeat the run."""
    world = world or World()
    threads = spec.runtime.threads or _default_threads(spec.base, world)
    torch.set_num_threads(threads)
    _keep_freed_memory()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # nothing here reads memory that it has not written, so that filling it beforehand buys nothing
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    transformers.logging.disable_progress_bar()  # the log file is no terminal
    torch.manual_seed(spec.seed)  # nothing should draw from it; if something does, repeatably
    device = resolve_device(spec.runtime)
    if device.type == "cuda":  # what `cuda` without a number means from here on
        torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
    return {
        "bridge": bridge_engine.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": str(resolve_dtype(spec.runtime, device)).removeprefix("torch."),
        "threads": threads,
        "processes": world.size,
    }


def _keep_freed_memory() -> None:
    """Of glibc: what is freed is kept for the next tensor. Otherwise the large ones of every pass
    are given back and asked for again, and the kernel clears each of their pages."""
    if platform.libc_ver()[0] != "glibc":
        return
    most = 2**31 - 1
    libc = ctypes.CDLL(None)
    for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
        libc.mallopt(option, most)


def _default_threads(model: str, world: World) -> int:
    """More threads than a small model can feed are slower than one; ranks share the machine."""
    parameters = resolve_model(model).parameters
    if parameters is not None and parameters < SMALL_MODEL:
        return 1
    return max(1, len(os.sched_getaffinity(0)) // world.local_size)
