r"""Whose conventions an evaluation follows where its spec says nothing.

Scores by different conventions cannot be compared, so each is written down here once, and every
field of it into the resolved spec. `bridge` is ours. The others are the published settings of the
works that the method is compared with:

- Qwen2.5-Math: greedy, one sample, a boxed answer after step-by-step reasoning;
- SimpleRL: temperature 1, top_p 0.95, AIME as the average of 32 samples;
- LUFFY: temperature 0.6, up to 8192 tokens. Policies that LUFFY trained have a system prompt of
  their own, which `template.system` takes.

A token limit never takes more than three quarters of the model's context: problems need room too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bridge_engine.data.registry import ARITHMETIC
from bridge_engine.evaluation.spec import EvaluationSpec, PresetName
from bridge_engine.spec import TemplateSpec

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
"""What MATH-like problems are asked with: the verifier has to know which number is meant."""


@dataclass(frozen=True)
class Preset:
    """A convention."""

    temperature: float
    top_p: float
    samples: int
    max_new_tokens: int
    template: TemplateSpec
    samples_of: Mapping[str, int] = field(default_factory=dict)
    """Sets that are asked more often, by name."""


PRESETS: Mapping[PresetName, Preset] = {
    "bridge": Preset(0.0, 1.0, 1, 2048, TemplateSpec(suffix=BOXED)),
    "qwen2.5-math": Preset(0.0, 1.0, 1, 2048, TemplateSpec(suffix=BOXED)),
    "simplerl": Preset(
        1.0,
        0.95,
        1,
        16_000,
        TemplateSpec(system="You are a helpful assistant.", suffix=BOXED),
        {"aime24": 32},
    ),
    "luffy": Preset(0.6, 1.0, 1, 8192, TemplateSpec(suffix=BOXED), {"aime24": 32, "amc23": 32}),
}


@dataclass(frozen=True)
class AdapterCard:
    """What an adapter says of itself (`bridge.json`)."""

    base_model: str
    template: TemplateSpec
    max_new_tokens: int
    """Longest answer in the evaluations of its training."""


def filled(spec: EvaluationSpec, context: int, card: AdapterCard | None) -> EvaluationSpec:
    """The spec with every null that a preset or the adapter fills in; `context` is the model's.

    The adapter's template and token limit go before those of `bridge`, so that its scores are
    those of its training's own evaluations; they do not go before another's convention.
    """
    made = spec.model_copy(deep=True)
    preset, own = PRESETS[made.preset], card if made.preset == "bridge" else None
    sampling = made.sampling
    if sampling.temperature is None:
        sampling.temperature = preset.temperature
    if sampling.top_p is None:
        sampling.top_p = preset.top_p
    if sampling.max_new_tokens is None:
        wanted = own.max_new_tokens if own else preset.max_new_tokens
        sampling.max_new_tokens = min(wanted, max(1, context * 3 // 4))
    if sampling.samples is None:
        sampling.samples = preset.samples
        for one in made.benchmarks:
            one.samples = one.samples or preset.samples_of.get(one.name)
    if made.template is None:
        for one in made.benchmarks:
            # the arithmetic family has a form of its own, `12+3-5?`, that no sentence belongs to
            if one.name == ARITHMETIC and own is None:
                one.template = one.template or TemplateSpec()
        made.template = own.template if own else preset.template
    return made
