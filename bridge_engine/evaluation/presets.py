r"""Whose conventions an evaluation follows where its spec says nothing.

Scores by different conventions cannot be compared, so each is written down here once, and every
field of it into the resolved spec. `bridge` is ours. The others are what the works that the method
is compared with publish; docs/evaluation.md has them side by side, with what they do not tell.

- **qwen2.5-math**, QwenLM/Qwen2.5-Math: `evaluation/sh/eval.sh` (temperature 0, one sample, top_p
  1, zero-shot), `evaluation/math_eval.py` (2048 tokens), `README.md` (prompt type
  `qwen25-math-cot`: the boxed sentence is the *system* message, the problem alone the user's).
- **simplerl**, hkust-nlp/simpleRL-reason, `README.md`: temperature 1, top_p 0.95, 16,000 tokens,
  AIME24 over 32 samples; prompt type `qwen-boxed` of `examples/simplelr_math_eval/utils.py`, and
  where a model has no chat template the "simpler prompt" that the README calls `abel`.
- **luffy**, ElliottYan/LUFFY: arXiv 2504.14945 §4 (temperature 0.6, AIME and AMC over 32 samples),
  `eval_scripts/generate_vllm.py` (top_p 1, 8192 tokens; `--remove_system True --template own`, as
  the README has it: no system message, through the model's *own* chat template). The long system
  prompt of the policies it trained has then to be a part of their tokenizers' templates; the paper
  prints it in appendix C.2, and `template.system` asks any other model with it. An adapter's own
  template is that of its training. Without a chat template: the prompt of its Llama policies.

All are asked through the tokenizer's own chat template, which for Qwen's models writes what those
scripts write by hand. A token limit never takes more than three quarters of the model's context:
problems need room too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bridge_engine.data.registry import ARITHMETIC
from bridge_engine.evaluation.spec import EvaluationSpec, PresetName
from bridge_engine.spec.train import DatasetRef, TemplateSpec

SENTENCE = "Please reason step by step, and put your final answer within \\boxed{}."
"""What MATH-like problems are asked with: the verifier has to know which number is meant."""
BOXED = f"\n{SENTENCE}"


@dataclass(frozen=True)
class Preset:
    """A convention."""

    temperature: float
    top_p: float
    samples: int
    max_new_tokens: int
    template: TemplateSpec
    plain: TemplateSpec
    """Its prompt for a tokenizer without a chat template."""
    samples_of: Mapping[str, int] = field(default_factory=dict)
    """Sets that are asked more often, by name."""
    own: frozenset[Literal["template", "max_new_tokens"]] = frozenset()
    """What an adapter says of itself, from its training, that goes before this."""


PRESETS: Mapping[PresetName, Preset] = {
    "bridge": Preset(
        temperature=0.0,
        top_p=1.0,
        samples=1,
        max_new_tokens=2048,
        template=TemplateSpec(suffix=BOXED),
        plain=TemplateSpec(suffix=BOXED),
        own=frozenset({"template", "max_new_tokens"}),
    ),
    "qwen2.5-math": Preset(
        temperature=0.0,
        top_p=1.0,
        samples=1,
        max_new_tokens=2048,
        template=TemplateSpec(kind="chat", system=SENTENCE),
        plain=TemplateSpec(kind="plain", suffix=BOXED),
    ),
    "simplerl": Preset(
        temperature=1.0,
        top_p=0.95,
        samples=1,
        max_new_tokens=16_000,
        template=TemplateSpec(kind="chat", system="You are a helpful assistant.", suffix=BOXED),
        plain=TemplateSpec(
            kind="plain", system="Question:\n", suffix="\nAnswer:\nLet's think step by step.\n"
        ),
        samples_of={"aime24": 32},
    ),
    "luffy": Preset(
        temperature=0.6,
        top_p=1.0,
        samples=1,
        max_new_tokens=8192,
        template=TemplateSpec(kind="chat"),
        plain=TemplateSpec(
            kind="plain", system="User: ", suffix="\nAnswer: Let's think step by step."
        ),
        samples_of={"aime24": 32, "amc23": 32},
        own=frozenset({"template"}),
    ),
}


@dataclass(frozen=True)
class AdapterCard:
    """What an adapter says of itself (`bridge.json`)."""

    base_model: str
    template: TemplateSpec
    max_new_tokens: int
    """Longest answer in the evaluations of its training."""
    trained_on: Mapping[str, DatasetRef] = field(default_factory=dict)
    """Sets by their roles in training; empty where it does not say, as older ones do not."""


def filled(
    spec: EvaluationSpec, context: int, card: AdapterCard | None, *, chat: bool
) -> EvaluationSpec:
    """The spec with every null that a preset or the adapter fills in. `context` is the model's;
    `chat`: its tokenizer has a chat template.

    The adapter's template and token limit go before those of `bridge`, so that its scores are
    those of its training's own evaluations, and before another convention only where that says so.
    """
    made = spec.model_copy(deep=True)
    preset = PRESETS[made.preset]
    trained = card.template if card and "template" in preset.own else None
    sampling = made.sampling
    if sampling.temperature is None:
        sampling.temperature = preset.temperature
    if sampling.top_p is None:
        sampling.top_p = preset.top_p
    if sampling.max_new_tokens is None:
        limited = card if "max_new_tokens" in preset.own else None
        wanted = limited.max_new_tokens if limited else preset.max_new_tokens
        sampling.max_new_tokens = min(wanted, max(1, context * 3 // 4))
    if sampling.samples is None:
        sampling.samples = preset.samples
        for one in made.benchmarks:
            if sampling.temperature > 0:  # else all of them would be the same
                one.samples = one.samples or preset.samples_of.get(one.name)
    if made.template is None:
        for one in made.benchmarks:
            # the arithmetic family has a form of its own, `12+3-5?`, that no sentence belongs to
            if one.name == ARITHMETIC and trained is None:
                one.template = one.template or TemplateSpec()
        made.template = trained or (preset.template if chat else preset.plain)
    return made


def remark(spec: EvaluationSpec) -> str | None:
    """What whoever asks by the preset of this resolved spec should know; None: nothing."""
    template = spec.template
    if spec.preset != "luffy" or spec.adapter or spec.completions_of:
        return None
    if template is None or template.kind == "plain" or template.system is not None:
        return None
    return (
        f"preset luffy sends no system message, as LUFFY's own script: {spec.model} is asked "
        "through its tokenizer's chat template alone, where LUFFY's own policies have their system "
        "prompt. To ask another model with that prompt, copy it from appendix C.2 of arXiv "
        "2504.14945 into a file and set template.system to it "
        "(bridge eval … --set template.system=@FILE)"
    )


def doubt(spec: EvaluationSpec, tokenizer: Any) -> str | None:
    """What makes the scores of this resolved spec others than those of its preset's convention, now
    that the tokenizer is at hand: its chat template was not known of. None: nothing."""
    template = spec.template
    if template is None or template.kind != "plain" or template != PRESETS[spec.preset].plain:
        return None
    if not getattr(tokenizer, "chat_template", None):
        return None
    return (
        f"problems are asked with the plain prompt of preset {spec.preset}, which is for "
        f"tokenizers without a chat template, and that of {spec.model} has one: these are not the "
        "scores of the convention. Send the evaluation again, with template left out, and it will "
        "be asked through the chat template"
    )
