"""Peak memory of a training job, from its spec and the model's shape.

    total = process + base + trained + max(sampling, training)     (these two take turns)

    process    the interpreter, torch and transformers; on a GPU about as much is CUDA's own
    base       frozen weights, in the dtype of the runtime. None of them for a full student, unless
               the KL term needs its first weights as its reference: then in float32
    trained    adapters and full weights: value and Adam's two moments in float32, 12 bytes a
               parameter (4 with plain SGD), 16 with the gradient, which counts in `training`.
               BRIDGE has three sets (student, teacher, shadow), and with `student: full` the first
               and last are whole models; a bfloat16 shadow keeps all of it in bfloat16; an
               offloaded one rests on the host, gradient and all
    sampling   merged copy of the adapted layers, key-value cache, and float32 logits of one token a
               row, in the three forms that drawing from them takes
    training   gradients of all that is trained (and an offloaded shadow's value, for its pass);
               activations of one micro-batch and one piece of its logits. A block keeps
               4 ffn + 6 hidden + 3 queries + 2 keys scalars a token (counted by torch's saved
               tensors; attention by SDPA, so no square matrix); with gradient checkpointing it
               keeps its input alone, and one block at a time is computed again. A full student in
               bfloat16 has a bfloat16 copy of its weights meanwhile

Rollouts and demonstrations are taken to be long ones (page `lengths`): a long prompt with all of
`max_new_tokens`, a long solution. Where texts are shorter less is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

from bridge_engine.models.shapes import Shape
from bridge_engine.spec.train import RuntimeSpec, TrainSpec
from service.jobs.lengths import Lengths, lengths

PROCESS = 500_000_000
LOGITS_AT_ONCE = 2**24
"""Numbers of the piece of logits that exists at once in training, as in
`bridge_engine.forward.logprobs` (which loads torch)."""
KEPT_LOGITS = 2**26
"""So many a trained head keeps for its backward pass, as there; of more it keeps none."""
LOGIT = 24
"""Bytes for each: itself, its logarithm, both gradients, and the entropy's two terms."""


@dataclass(frozen=True)
class Memory:
    """Bytes, by what needs them."""

    process: int
    base: int
    trained: int
    sampling: int
    training: int
    host: int
    """Of an offloaded shadow, in host memory and in no total."""

    @property
    def total(self) -> int:
        """Peak on the device that trains."""
        return self.process + self.base + self.trained + max(self.sampling, self.training)


def memory(spec: TrainSpec, shape: Shape, context: int) -> Memory:
    """The job's peak memory; `context` is the model's, in tokens."""
    width = compute_width(spec)
    full = spec.student.form == "full"
    trained, texts = _trained(spec, shape), lengths(spec, context)
    return Memory(
        process=PROCESS,
        base=shape.parameters * (4 * bool(spec.rl.kl_coef) if full else width),
        trained=trained.resting,
        sampling=_sampling(spec, shape, width, texts) if explores(spec) else 0,
        training=trained.passing + _training(spec, shape, width, texts),
        host=trained.host,
    )


def compute_width(spec: TrainSpec) -> int:
    """Bytes of a scalar in the forward pass."""
    return scalar_bytes(spec.runtime)


def scalar_bytes(runtime: RuntimeSpec) -> int:
    """The same by the runtime. `auto` is bfloat16 on a GPU and float32 on a CPU; only the worker
    knows which it is, so where the spec leaves it open the larger one counts."""
    sixteen = runtime.dtype == "bfloat16"
    on_gpu = runtime.dtype == "auto" and runtime.device == "cuda"
    return 2 if sixteen or on_gpu else 4


def explores(spec: TrainSpec) -> bool:
    """Does any step of the job sample rollouts?"""
    return spec.method.totals(spec.steps)[1] > 0


def rollouts_per_step(spec: TrainSpec) -> int:
    """Completions sampled in a step that explores, further rounds not counted."""
    return spec.rollout.prompts_per_step * (spec.rollout.group_size - spec.method.experts)


def adapters_trained(spec: TrainSpec) -> int:
    """How many of the method's parameter sets are adapters: all of them, or the teacher alone."""
    sets = spec.method.adapters
    return sum(s == "teacher" for s in sets) if spec.student.form == "full" else len(sets)


@dataclass(frozen=True)
class _Trained:
    """Bytes of everything that is trained."""

    resting: int
    """Values and moments on the device."""
    passing: int
    """What passes need besides: gradients."""
    host: int


def _trained(spec: TrainSpec, shape: Shape) -> _Trained:
    moments = 2 if spec.optimizer.name == "adamw" else 0
    adapter = shape.adapter_parameters(spec.lora.rank, spec.lora.target_modules)
    adapters = adapters_trained(spec) * adapter * 4
    full = spec.student.form == "full"
    weights = shape.parameters * 4 if full else 0
    resting = (adapters + weights) * (1 + moments)
    passing = adapters + weights
    # optimisers of their own have moments of their own
    resting += len(spec.method.optimizers) * 4 * moments * (shape.parameters if full else adapter)
    if not full or "shadow" not in spec.method.adapters:
        return _Trained(resting, passing, 0)
    width = 2 if spec.student.shadow_dtype == "bfloat16" else 4
    shadow = shape.parameters * width
    if spec.student.shadow_offload and spec.runtime.device != "cpu":
        return _Trained(resting, passing + 2 * shadow, shadow * (2 + moments))
    return _Trained(resting + shadow * (1 + moments), passing + shadow, 0)


def _sampling(spec: TrainSpec, shape: Shape, width: int, texts: Lengths) -> int:
    if spec.rollout.engine == "vllm":
        return 0  # in another process, that takes what it is given
    rows = min(spec.rollout.batch_size, rollouts_per_step(spec))
    cache = rows * texts.long_rollout * 2 * shape.layers * shape.keys * width
    logits = rows * shape.vocabulary * (4 + 4 + 8)
    if spec.student.form == "full" and width == 2:
        return cache + logits + _low_copy(spec, shape, width)
    merged = 0
    if spec.runtime.device == "cpu":  # laid out for the products of decoding
        merged = (shape.linear_parameters() + shape.head_parameters) * width
    elif spec.rollout.merge_weights and adapters_trained(spec):
        merged = shape.linear_parameters(spec.lora.target_modules) * width
    return cache + logits + merged


def _training(spec: TrainSpec, shape: Shape, width: int, texts: Lengths) -> int:
    at_once = spec.runtime.micro_batch
    tokens = 0
    if explores(spec):
        tokens = min(at_once, rollouts_per_step(spec)) * texts.long_rollout
    if "demos" in spec.method.learns_from:
        tokens = max(tokens, min(at_once, spec.sft.batch_size) * texts.long_demo)
    block = 4 * shape.ffn + 6 * shape.hidden + 3 * shape.queries + 2 * shape.keys
    kept = shape.layers * block
    if spec.runtime.gradient_checkpointing:
        kept = shape.layers * shape.hidden + block
    numbers = tokens * shape.vocabulary
    logits = min(numbers, LOGITS_AT_ONCE) * LOGIT
    if spec.student.form == "full" and numbers <= KEPT_LOGITS:
        logits += numbers * 4
    return tokens * kept * width + logits + _low_copy(spec, shape, width)


def _low_copy(spec: TrainSpec, shape: Shape, width: int) -> int:
    """The bfloat16 copy of a full student's float32 weights that is computed with: autocast's, or
    the merged one in its place."""
    if spec.student.form == "lora" or width == 4:
        return 0
    return (shape.linear_parameters() + shape.head_parameters) * width
