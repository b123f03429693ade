"""The spec of an evaluation: `kind: eval`. Imports no torch.

What is left out is filled in from a preset (`bridge_engine.evaluation.presets`), so that a resolved
spec says all that a score has to be read with.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from bridge_engine.rewards.graders import GraderSpec
from bridge_engine.spec.base import Name, SpecModel, impossible
from bridge_engine.spec.runtime import ResourcesSpec, RuntimeSpec
from bridge_engine.spec.train import DatasetRef, TemplateSpec, checked_name, dataset_from_name

PresetName = Literal["bridge", "qwen2.5-math", "simplerl", "luffy"]
ADAPTER = r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,127}$"
Samples = Annotated[int, Field(ge=1, le=1024)]


class EvalSet(DatasetRef):
    """Problems to ask: a benchmark, an uploaded dataset (`ds_…`), or `hub:owner/name`."""

    samples: Samples | None = None
    """Answers to each problem of this set; default: sampling.samples, else the preset's for it."""
    template: TemplateSpec | None = None
    """How a problem of this set becomes a prompt; default: `template`."""


class SamplingSpec(SpecModel):
    """How answers are drawn. Fields that are null are the preset's."""

    engine: Literal["native", "vllm"] = "native"
    """What samples: this process, or the vLLM server at BRIDGE_VLLM_URL."""
    samples: Samples | None = None
    """Answers to each problem."""
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    """0 always takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Nucleus sampling; 1 cuts nothing off."""
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    """Longest answer; longer ones are cut and count as truncated."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Sequences sampled at once; lower it when memory runs out."""
    merge_weights: bool = True
    """Sample from weights with the adapter merged in: faster, at the cost of one copy of the
    adapted layers and, in bfloat16, of rounding."""


def _list(value: Any) -> Any:
    """One benchmark, or several names with commas, is short for a list of them."""
    if isinstance(value, str):
        return [name.strip() for name in value.split(",")]
    return [value] if isinstance(value, dict) else value


def _grader(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Benchmarks = Annotated[
    list[Annotated[EvalSet, BeforeValidator(dataset_from_name)]],
    BeforeValidator(_list),
    Field(min_length=1, max_length=32),
]


class EvaluationSpec(SpecModel):
    """An evaluation job: a base model or a trained adapter answers problems and is judged."""

    kind: Literal["eval"]
    name: Name | None = None
    """A name for people; jobs are told apart by their id."""
    model: str | None = None
    """The base model; default: the adapter's, else bridge-tiny."""
    adapter: Annotated[str, Field(pattern=ADAPTER)] | None = None
    """The adapter on it: JOB@STEP, JOB@best, JOB@latest, JOB or an alias. The service writes the
    name for ever. null: the base model alone."""
    benchmarks: Benchmarks
    """What is asked: names, or objects with `limit`, `kinds`, `samples`, …"""
    preset: PresetName = "bridge"
    """Whose conventions fill in what is not given: `bridge` (greedy, one answer, the adapter's own
    template), `qwen2.5-math`, `simplerl`, `luffy` (the adapter's own template too)."""
    sampling: SamplingSpec = SamplingSpec()
    template: TemplateSpec | None = None
    """How problems become prompts, for the sets that do not say; default: the preset's."""
    grader: Annotated[GraderSpec, BeforeValidator(_grader)] = GraderSpec()
    """How answers are judged; a bare name is short for `{name: …}`."""
    verifier_timeout: Annotated[float, Field(gt=0, le=600)] = 5.0
    """Seconds of computing that judging one answer may take before it is set aside as unjudged.
    What the machine keeps from its judge does not count, up to ten times as many by the clock."""
    pass_at: Annotated[list[Samples], Field(max_length=32)] | None = None
    """The k of pass@k, at most 32 of them; default: 1, 2, 4, … up to the number of samples."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Every draw is a function of this seed, the problem and the sample's number."""
    completions_of: Annotated[str, Field(pattern=r"^job_[0-9a-z]{1,64}$")] | None = None
    """The finished evaluation whose answers are judged anew; nothing is sampled. POST
    /jobs/{id}/regrade writes such a spec."""
    runtime: RuntimeSpec = RuntimeSpec()
    resources: ResourcesSpec = ResourcesSpec()

    @property
    def needs_gpus(self) -> int | None:
        """GPUs the job cannot do without; None: it takes what there is."""
        return self.resources.needed_for(self.runtime)

    @property
    def method_name(self) -> str:
        """What stands in the `method` column of lists."""
        return "eval"

    @property
    def rollout(self) -> SamplingSpec:
        """What samplers ask a job for."""
        return self.sampling

    @property
    def rollout_field(self) -> str:
        """The field by whose settings samplers sample."""
        return "sampling"

    @property
    def base(self) -> str:
        """The base model of a resolved spec."""
        assert self.model is not None
        return self.model

    def labels(self) -> list[str]:
        """What each set's figures go by: its name, with the split where several have that name."""
        names = [one.name for one in self.benchmarks]
        return [
            one.name if names.count(one.name) == 1 else f"{one.name}:{one.split}"
            for one in self.benchmarks
        ]

    def samples_of(self, one: EvalSet) -> int:
        """Answers to each problem of a set, in a resolved spec."""
        return one.samples or self.sampling.samples or 1

    def template_of(self, one: EvalSet) -> TemplateSpec:
        """How a problem of a set becomes a prompt, in a resolved spec."""
        return one.template or self.template or TemplateSpec()

    @field_validator("model")
    @classmethod
    def _model_is_a_name(cls, value: str | None) -> str | None:
        return None if value is None else checked_name(value)

    @model_validator(mode="after")
    def _possible(self) -> EvaluationSpec:
        labels = self.labels()
        if len(set(labels)) < len(labels):
            raise impossible("benchmarks", f"a set is named twice: {', '.join(labels)}")
        samples, temperature = self.sampling.samples, self.sampling.temperature
        several = max([samples or 1, *(one.samples or 1 for one in self.benchmarks)])
        if several > 1 and temperature == 0:
            raise impossible(
                "sampling.temperature",
                f"at temperature 0 all {several} samples are the same answer: raise it, or take "
                "one sample",
            )
        self.resources.check(self.runtime)
        return self
