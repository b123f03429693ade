"""What a job will cost, from its spec and the model's config alone: an order of magnitude.

    rollouts     = steps × prompts_per_step × group_size       (in steps that explore)
    max tokens   = rollouts × max_new_tokens × rounds of dynamic sampling + demos × sft.max_tokens
    adapter      = Σ over adapted layers of rank × (inputs + outputs); bridge trains three of them
                   (student, teacher, shadow) and exports two of them as one

Memory is on the page `memory`, time on the page `duration`, the lengths of the texts on `lengths`,
each with what it assumes.
Demonstrations count at their upper bound in `max tokens`, so short ones cost less than said here.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from bridge_engine.models.catalog import ModelInfo
from bridge_engine.models.shapes import Shape, shape_of
from bridge_engine.spec.train import TrainSpec
from service.jobs.duration import DEVICES, Work, work
from service.jobs.memory import adapters_trained, compute_width, memory, rollouts_per_step


class MemoryParts(BaseModel):
    """Bytes by what needs them. Sampling and training take turns: the larger one counts."""

    model_config = ConfigDict(use_attribute_docstrings=True, from_attributes=True)

    process: int
    """Interpreter and libraries."""
    base: int
    """Frozen weights."""
    trained: int
    """Adapters, and full weights: values and the optimiser's moments."""
    sampling: int
    """Merged copy of the adapted layers, key-value cache, logits."""
    training: int
    """Gradients, activations of one micro-batch and its logits."""
    host: int
    """Of a shadow that is kept in host memory; in no total."""


class Estimates(BaseModel):
    """What the job will cost. Figures the model's config does not tell are null."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    steps: int
    """Optimisation steps; of an evaluation, problems, as far as they are known beforehand."""
    rollouts: int
    """Completions sampled; a training job's evaluations and further rounds of dynamic sampling not
    counted."""
    max_tokens: int
    """At most so many tokens are sampled or imitated."""
    model_parameters: int | None
    """Weights of the base model."""
    adapter_parameters: int | None
    """Trained weights of all adapters together; a full student's are the model's, and on top."""
    exported_rank: int | None
    """Rank of the adapter that is served; null where whole weights are."""
    memory_bytes: int | None
    """Rough peak memory of training, on the device that trains, for the longest texts. Where the
    spec leaves open whether that is a GPU, float32 is counted."""
    memory: MemoryParts | None
    """What it is made of."""
    flops: float | None
    """Arithmetic of the whole run."""
    seconds: dict[str, float] | None
    """Rough duration of training by device: one `h200` or one `a100` at 40 % of its data sheet's
    bfloat16 rate and bandwidth, or one core of a recent server CPU (`cpu_core`) at 30 % of a matrix
    product's rate. Assumes completions of half of max_new_tokens; counts neither evaluations nor
    verification. Right to a factor of about two."""


def estimate(spec: TrainSpec, model: ModelInfo) -> Estimates:
    """The estimates of a resolved spec."""
    demo_steps, reward_steps = spec.method.totals(spec.steps)
    rollouts = reward_steps * rollouts_per_step(spec)
    longest_demo = spec.sft.max_tokens or model.context
    sampled = rollouts * spec.rollout.max_new_tokens * (1 + spec.rollout.dynamic_sampling)
    shape = shape_of(model)
    parts = memory(spec, shape, model.context) if shape else None
    done = work(spec, shape, model.context) if shape else None
    return Estimates(
        steps=spec.steps,
        rollouts=rollouts,
        max_tokens=sampled + demo_steps * spec.sft.batch_size * longest_demo,
        model_parameters=model.parameters,
        adapter_parameters=_adapters(spec, shape) if shape else None,
        exported_rank=_exported_rank(spec),
        memory_bytes=parts.total if parts else None,
        memory=MemoryParts.model_validate(parts) if parts else None,
        flops=rounded(done.flops) if done else None,
        seconds=_seconds(spec, done) if done else None,
    )


def _adapters(spec: TrainSpec, shape: Shape) -> int:
    one = shape.adapter_parameters(spec.lora.rank, spec.lora.target_modules)
    return one * adapters_trained(spec)


def _exported_rank(spec: TrainSpec) -> int | None:
    if spec.student.form == "full":
        return spec.export.svd_rank
    return spec.lora.rank * len(spec.method.policy)


def _seconds(spec: TrainSpec, done: Work) -> dict[str, float]:
    native = spec.rollout.engine == "native"
    width = {name: 2 if name != "cpu_core" else compute_width(spec) for name in DEVICES}
    if spec.runtime.dtype == "float32":
        width = dict.fromkeys(DEVICES, 4)
    return {
        name: rounded(done.seconds(device, width=width[name], launches=native))
        for name, device in DEVICES.items()
    }


def rounded(value: float) -> float:
    """To two digits: more would be a lie."""
    return float(f"{value:.2g}")
