"""Memory has run out: how that is recognised, and what to change in the spec."""

from __future__ import annotations

import errno

from bridge_engine.errors import EngineError
from bridge_engine.evaluation.spec import EvaluationSpec
from bridge_engine.spec.job import JobSpec
from bridge_engine.spec.train import TrainSpec

SAID_SO = (
    "DefaultCPUAllocator",
    "std::bad_alloc",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""What a plain RuntimeError of torch's says where memory has run out outside its CUDA allocator."""


def is_out_of_memory(error: BaseException) -> bool:
    """Python's, the system's, torch's and CUDA's ways of saying so."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SAID_SO)


def out_of_memory(spec: JobSpec, step: int | None = None) -> EngineError:
    """The error that says what to lower, the cheapest first. `step` (from 1): where it ran out."""
    found = levers(spec)
    error = EngineError(
        f"memory ran out; {memory_advice(spec)}",
        code="out_of_memory",
        category="oom",
        param=found[0][0] if found else "model",
    )
    error.step = step
    return error


def levers(spec: JobSpec) -> list[tuple[str, str]]:
    """(field, what to do with it), in the order to try: first what leaves the result as it is."""
    return _of_evaluation(spec) if isinstance(spec, EvaluationSpec) else _of_training(spec)


def _of_evaluation(spec: EvaluationSpec) -> list[tuple[str, str]]:
    sampling, found = spec.sampling, []
    if sampling.engine == "native" and sampling.batch_size > 1:
        found.append(("sampling.batch_size", f"lower it (now {sampling.batch_size})"))
    if spec.adapter is not None and sampling.merge_weights:
        found.append(("sampling.merge_weights", "set to false"))
    found.append(("sampling.max_new_tokens", f"lower it (now {sampling.max_new_tokens})"))
    if spec.runtime.dtype == "float32":
        found.append(("runtime.dtype", "set to bfloat16"))
    return found


def _of_training(spec: TrainSpec) -> list[tuple[str, str]]:
    runtime, rollout, student = spec.runtime, spec.rollout, spec.student
    found = []
    if runtime.padding_free and runtime.attention != "flash_attention_2":
        found.append(
            ("runtime.padding_free", "set to false (without flash attention it is quadratic)")
        )
    if runtime.micro_batch > 1:
        found.append(("runtime.micro_batch", f"lower it (now {runtime.micro_batch})"))
    if not runtime.gradient_checkpointing:
        found.append(("runtime.gradient_checkpointing", "set to true"))
    if "rewards" in spec.method.learns_from:
        if rollout.engine == "native" and rollout.batch_size > 1:
            found.append(("rollout.batch_size", f"lower it (now {rollout.batch_size})"))
        found.append(("rollout.max_new_tokens", f"lower it (now {rollout.max_new_tokens})"))
    if spec.sft.max_tokens is None and "demos" in spec.method.learns_from:
        found.append(("sft.max_tokens", "leave long demonstrations out"))
    if student.form == "full":
        offloads = "shadow" in spec.method.adapters and runtime.device != "cpu"
        if offloads and not student.shadow_offload:
            found.append(("student.shadow_offload", "set to true"))
        found.append(("student.form", "take lora: it needs no copy of the model"))
    if runtime.dtype == "float32":
        found.append(("runtime.dtype", "set to bfloat16"))
    return found


def memory_advice(spec: JobSpec) -> str:
    """One sentence: the fields to change, in the order to try them."""
    found = [f"{field}: {what}" for field, what in levers(spec)]
    if not found:
        return "take a smaller model or a machine with more memory: nothing is left to lower"
    return "try in this order: " + "; ".join(found)
