"""What a save of a run writes to the disk, from its spec and the model's shape.

state     value and the optimiser's moments of every parameter set, float32 (AdamW: 12 bytes a
          weight, SGD: 4); a full student's shadow in its own dtype
exports   the policy's adapter (rank of its sets together) and the student's, float32; a merged
          model in the dtype it computes in
"""

from __future__ import annotations

from bridge_engine.models.shapes import Shape
from bridge_engine.spec.train import TrainSpec


def checkpoint_bytes(spec: TrainSpec, shape: Shape) -> int:
    """Bytes of one checkpoint with all its exports; of the largest one there will be."""
    return state_bytes(spec, shape) + export_bytes(spec, shape)


def state_bytes(spec: TrainSpec, shape: Shape) -> int:
    """Bytes of one resumable state."""
    moments = 2 if spec.optimizer.name == "adamw" else 0
    adapter = 4 * shape.adapter_parameters(spec.lora.rank, spec.lora.target_modules)
    full = spec.student.form == "full"
    total = 0
    for name in spec.method.adapters:
        weights = adapter if not full or name == "teacher" else 4 * shape.parameters
        if full and name == "shadow" and spec.student.shadow_dtype == "bfloat16":
            weights //= 2
        total += weights * (1 + moments)
    further = 4 * shape.parameters if full else adapter
    return total + len(spec.method.optimizers) * further * moments


def export_bytes(spec: TrainSpec, shape: Shape) -> int:
    """Bytes of what one step exports."""
    full = spec.student.form == "full"
    alone = spec.export.student_alone and spec.method.policy != ("student",)
    total = 0
    if not full:
        one = 4 * shape.adapter_parameters(spec.lora.rank, spec.lora.target_modules)
        total += one * (len(spec.method.policy) + alone)
    elif spec.export.svd_rank is not None:
        total += 4 * shape.adapter_parameters(spec.export.svd_rank, "all-linear") * (1 + alone)
    if full or spec.export.merged:
        # `auto` is float32 without a GPU: the larger one counts
        width = 2 if spec.runtime.dtype == "bfloat16" else 4
        total += shape.parameters * width * (1 + (full and alone))
    return total
