"""What a job of any kind runs on: the part of its spec that says where and how to compute."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bridge_engine.spec.base import SpecModel, impossible


class RuntimeSpec(SpecModel):
    """Where and how to compute."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen base; adapters are always float32, and so are the weights of a full student,
    which then computes in this. `auto`: bfloat16 on GPU, float32 on CPU."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads; default: 1 for models under 20 M parameters, else all cores."""
    micro_batch: Annotated[int, Field(ge=1)] = 64
    """Sequences in one forward/backward pass. Changes memory, never the update."""
    padding_free: bool = False
    """Lay the sequences of a micro-batch end to end instead of padding them. Pays off with
    flash attention; changes speed, never the update."""
    share_prompts: bool = True
    """Pass a prompt once for all completions of its group, where that saves computing and the
    attention is torch's own. Changes speed, never the update."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """`auto` is torch's scaled dot-product attention."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them. Changes memory, never the update."""
    stall_seconds: Annotated[float, Field(gt=0)] | None = None
    """A run that reports nothing for this long counts as stuck, is ended and goes on from its
    checkpoint: set it where a step takes longer than the worker's own BRIDGE_STALL_SECONDS (30
    minutes). Heeded by workers, not by a run by hand."""


class ResourcesSpec(SpecModel):
    """What the worker must have. It changes where a job runs, and not what it trains."""

    gpus: Annotated[int, Field(ge=0, le=8)] | None = None
    """GPUs the job gets, and more than one of them a process each (docs/scale.md). null: any worker
    takes it, and gives it one GPU if it has GPUs; for runtime.device cpu it is 0, for cuda 1."""

    def needed_for(self, runtime: RuntimeSpec) -> int | None:
        """GPUs that a job with this runtime cannot do without; None: it takes what there is."""
        device = {"cpu": 0, "cuda": 1}.get(runtime.device)
        return device if self.gpus is None else self.gpus

    def check(self, runtime: RuntimeSpec) -> None:
        """Refuses GPUs that the runtime contradicts."""
        device, gpus = runtime.device, self.gpus
        if (device == "cpu" and gpus) or (device == "cuda" and gpus == 0):
            raise impossible("resources.gpus", f"runtime.device is {device}, gpus is {gpus}")
