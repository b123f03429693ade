"""Memory has run out: how that is recognised, and what to change in the spec."""

from __future__ import annotations

from bridge_engine.errors import EngineError
from bridge_engine.spec import TrainSpec


def is_out_of_memory(error: BaseException) -> bool:
    """Python's, CUDA's and the CPU's way of saying so; the last is a plain RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def out_of_memory(spec: TrainSpec) -> EngineError:
    """The error that says what to lower, the cheapest first."""
    found = levers(spec)
    return EngineError(
        f"memory ran out; {memory_advice(spec)}",
        code="out_of_memory",
        category="oom",
        param=found[0][0] if found else "model",
    )


def levers(spec: TrainSpec) -> list[tuple[str, str]]:
    """(field, what to do with it), in the order to try: first what leaves the update as it is."""
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


def memory_advice(spec: TrainSpec) -> str:
    """One sentence: the fields to change, in the order to try them."""
    found = [f"{field}: {what}" for field, what in levers(spec)]
    if not found:
        return "take a smaller model or a machine with more memory: nothing is left to lower"
    return "try in this order: " + "; ".join(found)
