"""What a job will cost, from its spec and the model's config alone: an order of magnitude.

    rollouts     = steps × prompts_per_step × group_size       (in steps that explore)
    max tokens   = rollouts × max_new_tokens + steps × sft.batch_size × sft.max_tokens
    adapter      = Σ over adapted layers of rank × (inputs + outputs); bridge trains three of them
                   (student, teacher, shadow) and exports two of them as one
    memory       = base weights                        parameters × bytes of the dtype
                 + merged copy for sampling            the same again (rollout.merge_weights)
                 + adapters                            16 bytes a parameter: weight, gradient and
                                                       Adam's two moments, all float32
                 + activations of one micro-batch      tokens × (17 × bytes × hidden × layers
                                                       + 8 × vocabulary): Korthikanti et al.
                                                       (arXiv 2205.05198), without the attention
                                                       matrix; logits and their gradient, float32

The tokens of a micro-batch are min(runtime.micro_batch, sequences of a step) × the length of a
sequence, taken to be min(context, max(512, 2 × max_new_tokens)): nobody has read the data yet.
Demonstrations count at their upper bound in `max tokens`, so short ones cost less than said here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from bridge_engine.catalog import ModelInfo
from bridge_engine.spec import TrainSpec


class Estimates(BaseModel):
    """What the job will cost. Figures the model's config does not tell are null."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    steps: int
    """Optimisation steps."""
    rollouts: int
    """Completions sampled in training, evaluations not counted."""
    max_tokens: int
    """At most so many tokens are sampled or imitated in training."""
    model_parameters: int | None
    """Weights of the base model."""
    adapter_parameters: int | None
    """Trained weights, all adapters together."""
    exported_rank: int
    """Rank of the adapter that is served."""
    memory_bytes: int | None
    """Rough peak memory of training."""


def estimate(spec: TrainSpec, model: ModelInfo) -> Estimates:
    """The estimates of a resolved spec; the formulas are on top of this page."""
    method = spec.method
    per_step = spec.rollout.prompts_per_step * spec.rollout.group_size
    demo_steps, reward_steps = method.totals(spec.steps)
    rollouts = reward_steps * per_step
    demos = demo_steps * spec.sft.batch_size
    longest_demo = spec.sft.max_tokens or model.context
    one = _adapter_parameters(model.config, spec.lora.rank, spec.lora.target_modules)
    adapters = one * len(method.adapters) if one is not None else None
    sequences = max(per_step if rollouts else 0, spec.sft.batch_size if demos else 0)
    return Estimates(
        steps=spec.steps,
        rollouts=rollouts,
        max_tokens=rollouts * spec.rollout.max_new_tokens + demos * longest_demo,
        model_parameters=model.parameters,
        adapter_parameters=adapters,
        exported_rank=spec.lora.rank * len(method.policy),
        memory_bytes=_memory(spec, model, adapters, sequences),
    )


def _memory(spec: TrainSpec, model: ModelInfo, adapters: int | None, sequences: int) -> int | None:
    hidden, layers = _number(model.config, "hidden_size"), _number(model.config, _LAYERS)
    vocabulary = _number(model.config, "vocab_size")
    if not (model.parameters and adapters and hidden and layers and vocabulary):
        return None
    # `auto` is bfloat16 on a GPU, float32 on a CPU; only the worker will know: count the larger.
    width = 2 if spec.runtime.dtype == "bfloat16" else 4
    copies = 2 if spec.rollout.merge_weights and "rewards" in spec.method.learns_from else 1
    length = min(model.context, max(512, 2 * spec.rollout.max_new_tokens))
    tokens = min(spec.runtime.micro_batch, sequences) * length
    activations = tokens * (17 * width * hidden * layers + 8 * vocabulary)
    return model.parameters * width * copies + adapters * 16 + activations


_LAYERS = "num_hidden_layers"


def _adapter_parameters(
    config: Mapping[str, Any], rank: int, targets: list[str] | str
) -> int | None:
    """Weights of one adapter on a Llama-like model (Qwen, Llama, Mistral, SmolLM)."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", _LAYERS)
    hidden, ffn, heads, layers = (_number(config, name) for name in names)
    if not (hidden and ffn and heads and layers):
        return None
    head = _number(config, "head_dim") or hidden // heads
    queries = heads * head
    keys = (_number(config, "num_key_value_heads") or heads) * head
    shapes = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, ffn),
        "up_proj": (hidden, ffn),
        "down_proj": (ffn, hidden),
    }
    chosen = shapes if targets == "all-linear" else {k: shapes[k] for k in targets if k in shapes}
    return layers * sum(rank * (inputs + outputs) for inputs, outputs in chosen.values())


def _number(config: Mapping[str, Any], name: str) -> int | None:
    value = config.get(name)
    return value if isinstance(value, int) and value > 0 else None
