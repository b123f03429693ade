"""The job spec: the one description that API, SDK, command line, worker and engine share.

Imports no torch, so that validating a job costs milliseconds anywhere. Everything that can be
known to be wrong without reading data or weights is refused here; `bridge_engine.spec.checks` adds
what needs the names of models and datasets.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from bridge_engine.methods import MethodOptions
from bridge_engine.rewards.spec import Rewards, RewardSpec
from bridge_engine.spec.base import Name, SpecModel, impossible
from bridge_engine.spec.runtime import ResourcesSpec as ResourcesSpec
from bridge_engine.spec.runtime import RuntimeSpec as RuntimeSpec

# --------------------------------------------------------------------------- data


class DatasetRef(SpecModel):
    """Which problems: a dataset by name, and the part of it that is meant."""

    name: str
    """`arithmetic` (built in), a named benchmark (`gsm8k`, `math`, …), the id of an uploaded
    dataset (`ds_…`), or `hub:owner/name` on the Hugging Face hub."""
    split: str | None = None
    """Default: the split that suits the role (`train`, `demos`, `dev` or `test`)."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """At most this many examples, the first ones of the split's fixed order."""
    kinds: list[str] | None = None
    """Only problems of these kinds (subjects, for benchmarks that have them)."""
    seed: int = 0
    """Seed of a generated dataset; ignored by datasets that are files."""


def dataset_from_name(value: Any) -> Any:
    """`gsm8k` is short for {name: gsm8k}; `gsm8k/test` for {name: gsm8k, split: test}."""
    if not isinstance(value, str):
        return value
    if value.startswith("hub:") or "/" not in value:
        return {"name": value}
    name, _, split = value.partition("/")
    return {"name": name, "split": split}


Dataset = Annotated[DatasetRef, BeforeValidator(dataset_from_name)]


class DataSpec(SpecModel):
    """The three sets of problems a run knows."""

    prompts: Dataset | None = None
    """D_RL: problems to explore, rewarded by their answers."""
    demos: Dataset | None = None
    """D_SFT: problems with an expert's worked solution to imitate."""
    eval: Dataset | None = None
    """Held-out problems; accuracy on them is measured before, during and after training."""


# --------------------------------------------------------------------------- how to train


class TemplateSpec(SpecModel):
    """How a problem becomes a prompt."""

    kind: Literal["auto", "plain", "chat"] = "auto"
    """`chat` uses the tokenizer's chat template, `plain` the text itself; `auto` is chat where the
    tokenizer has a template."""
    system: str | None = None
    """System message (chat), or text put before the problem (plain)."""
    suffix: str = ""
    """Text put after the problem, such as an instruction on the answer's form."""


class LoraSpec(SpecModel):
    """The shape of the adapters. Student, teacher and shadow are alike."""

    rank: Annotated[int, Field(ge=1, le=256)] = 8
    """Rank of each adapter. The exported adapter of a method with a teacher has twice this rank."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The adapter's update is scaled by alpha / rank (PEFT's `lora_alpha`)."""
    target_modules: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get adapters; `all-linear` is every one but the head."""


class StudentSpec(SpecModel):
    """What θ is. `student: full` is short for `student: {form: full}`."""

    form: Literal["lora", "full"] = "lora"
    """`lora`: θ is an adapter over the frozen base, the shadow costs megabytes and the result is
    one exact adapter. `full`: θ is the base's own weights, as in the paper; the shadow is a second
    copy of them, and the result is a whole model."""
    shadow_dtype: Literal["float32", "bfloat16"] = "float32"
    """In what the shadow of a full student is kept; bfloat16 halves it and rounds its steps."""
    shadow_offload: bool = False
    """Keep the shadow of a full student in host memory between its passes."""


def _student_from_form(value: Any) -> Any:
    return {"form": value} if isinstance(value, str) else value


Student = Annotated[StudentSpec, BeforeValidator(_student_from_form)]


class OptimizerSpec(SpecModel):
    """One optimiser for each parameter set, each with its own clipping."""

    name: Literal["adamw", "sgd"] = "adamw"
    """`sgd` is plain gradient ascent, for study; `adamw` is what trains well."""
    student_lr: Annotated[float, Field(gt=0)] = 3e-4
    """α of the paper: learning rate of student and shadow."""
    teacher_lr: Annotated[float, Field(gt=0)] = 1e-3
    """β of the paper: learning rate of the teacher."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.98,
    )
    """Adam's two decay rates."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay on the adapters."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Each parameter set's gradient is clipped to this norm; null for no clipping."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Learning rates rise linearly over this many steps."""
    max_skipped: Annotated[int, Field(ge=0)] = 5
    """A step whose loss or gradient is NaN or infinite changes nothing and is counted
    (`skipped_steps`); more than this many of them in a row fail the job."""


class RolloutSpec(SpecModel):
    """How the policy explores. Temperature is 1 and nothing is cut off, always: anything else would
    make the importance ratios wrong."""

    engine: Literal["native", "vllm"] = "native"
    """What samples: this process, or the vLLM server at BRIDGE_VLLM_URL."""
    prompts_per_step: Annotated[int, Field(ge=1)] = 8
    """Problems per step."""
    group_size: Annotated[int, Field(ge=2, le=1024)] = 8
    """Samples per problem (G of GRPO). One sample has nothing to be compared with."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    """Longest completion; longer ones are cut and count as truncated."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Sequences sampled at once; lower it when memory runs out."""
    merge_weights: bool = True
    """Sample from weights with the adapters merged in: faster, at the cost of one copy of the
    adapted layers and, in bfloat16, of rounding that `sampler_mismatch` shows."""
    dynamic_sampling: Annotated[int, Field(ge=0, le=32)] = 0
    """DAPO's dynamic sampling: groups whose rewards are all equal teach nothing, and are replaced
    by groups of further problems, in at most this many further rounds of sampling."""


class RlSpec(SpecModel):
    """The objective J_RL. Names and constants are TRL's where it has them."""

    loss: Literal["dapo", "grpo", "dr_grpo", "gspo", "cispo"] = "dapo"
    """How the clipped surrogate is put together from tokens: `dapo` is its mean over the tokens of
    the whole step, `grpo` the mean over sequences of each one's mean, `dr_grpo` the sum over
    sequences · max_new_tokens, `gspo` the same as grpo with one ratio a sequence, `cispo` clips a
    detached ratio that weighs log π."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """ε below: the ratio's objective is clipped at 1 − clip_low."""
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    """ε above: and at 1 + clip_high (0.28 is DAPO's clip-higher)."""
    advantage: Literal["group_std", "group", "batch_std"] = "group_std"
    """`group_std`: (r − mean) / (std + 1e-4) within the group; `group`: r − mean; `batch_std`:
    r − mean of the group, divided by the std of all the step's rewards."""
    mask_truncated: bool = False
    """Completions cut off at max_new_tokens count in their group and take no part in the loss
    (DAPO's overlong filtering)."""
    kl_coef: Annotated[float, Field(ge=0)] = 0.0
    """Coefficient of KL(π ‖ π_base), estimator k3; 0 skips the reference's forward pass."""
    inner_epochs: Annotated[int, Field(ge=1, le=64)] = 1
    """Times the rollouts of a step are gone through."""
    mini_batches: Annotated[int, Field(ge=1, le=1024)] = 1
    """Updates each time: the step's groups are split into so many parts, one update each."""
    importance_correction: Literal["none", "truncated"] = "none"
    """`none`: the ratio is taken to what sampled, by the sampler's own log-probabilities.
    `truncated`: to the trainer's (one more forward pass), and each token is weighed with
    min(π_trainer / π_sampler, importance_cap). For samplers that round: bfloat16, vLLM."""
    importance_cap: Annotated[float, Field(ge=1)] = 3.0
    """Largest weight of the correction."""
    rewards: Rewards = Field(default_factory=lambda: [RewardSpec(name="accuracy")])
    """What a completion is rewarded for: reward functions by name, added up with their weights.
    Default: whether its answer is right, alone."""
    flip_probability: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Label noise, for studies of robustness: each verdict on a rollout is turned round with this
    probability, a function of seed, step and problem. Evaluation is never noisy."""
    verifier_timeout: Annotated[float, Field(gt=0, le=600)] = 5.0
    """Seconds of computing that judging one answer may take before it is set aside as unjudged.
    What the machine keeps from its judge does not count, up to ten times as many by the clock."""


class SftSpec(SpecModel):
    """The imitation objective J_SFT."""

    batch_size: Annotated[int, Field(ge=1)] = 16
    """Demonstrations per step."""
    max_tokens: Annotated[int, Field(ge=2)] | None = None
    """Demonstrations longer than this (prompt and solution) are left out and counted; default: the
    model's context."""


class EvalSpec(SpecModel):
    """Measuring on held-out problems while training. An evaluation job has a spec of its own:
    `bridge_engine.evaluation.spec`."""

    every: Annotated[int, Field(ge=0)] = 20
    """Steps between evaluations; 0 evaluates only before and after."""
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    """Default: that of the rollouts."""
    student_alone: bool = True
    """Methods with a teacher: measure the student without it as well (`accuracy/student_alone`)."""


class CheckpointSpec(SpecModel):
    """When to save, and how much to keep."""

    every: Annotated[int, Field(ge=1)] = 20
    """Steps between checkpoints. The last step is always saved, and so is every step whose
    held-out accuracy is the best so far."""
    keep: Annotated[int, Field(ge=1)] = 3
    """Resumable states kept: the newest ones, and that of the best step beside them."""
    keep_adapters: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    """Steps whose exports are kept: all, or the newest so many; the best one's always."""


class ExportSpec(SpecModel):
    """What is written beside the resumable state, for others to load."""

    student_alone: bool = True
    """Methods with a teacher: the student without it, beside the policy."""
    merged: bool = False
    """The whole model with the policy merged into its weights, at the last and at the best step.
    Always written for a full student, which has no other exact form."""
    svd_rank: Annotated[int, Field(ge=1, le=512)] | None = None
    """Full student: an adapter of this rank too, the best one there is (truncated SVD of what
    training changed); its relative error is in its card."""


def _checkpoint_step(value: Any) -> Any:
    number = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
    if number or value in ("best", "latest"):
        return value
    raise PydanticCustomError(
        "invalid_step", "a checkpoint is named by its step, or by `best` or `latest`"
    )


CheckpointStep = Annotated[int | Literal["best", "latest"], BeforeValidator(_checkpoint_step)]


class InitSpec(SpecModel):
    """The checkpoint of another job whose parameters training starts from: those of its student,
    teacher and shadow. Optimisers, progress and the order of data begin anew."""

    job: Annotated[str, Field(pattern=r"^job_[0-9a-z]{1,64}$")]
    """The job's id."""
    step: CheckpointStep = "latest"
    """Step of the checkpoint; the service writes the number for `best` and `latest`."""


# --------------------------------------------------------------------------- the job


class TrainSpec(SpecModel):
    """A training job."""

    kind: Literal["train"] = "train"
    name: Name | None = None
    """A name for people; jobs are told apart by their id."""
    method: MethodOptions
    """A name, such as `bridge`, or an object with the method's options; `bridge methods` lists
    them."""
    model: str = "bridge-tiny"
    """The base model: a built-in name, a folder's name under BRIDGE_MODEL_DIR, or a Hugging Face
    hub id."""
    data: DataSpec
    steps: Annotated[int, Field(ge=1, le=10_000_000)] = 100
    """Optimisation steps."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Every random draw of the run is a function of this seed."""
    template: TemplateSpec = TemplateSpec()
    student: Student = StudentSpec()
    lora: LoraSpec = LoraSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    rollout: RolloutSpec = RolloutSpec()
    rl: RlSpec = RlSpec()
    sft: SftSpec = SftSpec()
    eval: EvalSpec = EvalSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    export: ExportSpec = ExportSpec()
    runtime: RuntimeSpec = RuntimeSpec()
    resources: ResourcesSpec = ResourcesSpec()
    init: InitSpec | None = None
    """Start from another job's parameters instead of the base model's."""

    @property
    def needs_gpus(self) -> int | None:
        """GPUs the job cannot do without; None: it takes what there is."""
        return self.resources.needed_for(self.runtime)

    @property
    def method_name(self) -> str:
        """What stands in the `method` column of lists."""
        return self.method.name

    @property
    def base(self) -> str:
        """The base model."""
        return self.model

    def trained_on(self) -> dict[str, DatasetRef]:
        """The sets that the method learns from, by their roles in `data`."""
        given = {"prompts": self.data.prompts, "demos": self.data.demos}
        source = {"prompts": "rewards", "demos": "demos"}
        return {
            role: ref
            for role, ref in given.items()
            if ref is not None and source[role] in self.method.learns_from
        }

    @property
    def rollout_field(self) -> str:
        """The field by whose settings samplers sample."""
        return "rollout"

    @field_validator("model")
    @classmethod
    def _model_is_a_name(cls, value: str) -> str:
        return checked_name(value)

    @model_validator(mode="after")
    def _possible(self) -> TrainSpec:
        name, learns_from = self.method.name, self.method.learns_from
        if "demos" in learns_from and self.data.demos is None:
            raise impossible("data.demos", f"method {name} learns from demonstrations: name them")
        if "rewards" in learns_from and self.data.prompts is None:
            raise impossible(
                "data.prompts", f"method {name} learns from rewarded exploration: name the problems"
            )
        if name == "cold_start" and self.steps < 2:
            raise impossible("steps", "method cold_start needs a step of SFT and one of RL: 2")
        if self.rl.clip_high < self.rl.clip_low:
            raise impossible("rl.clip_high", "clip_high must not be smaller than clip_low")
        names = [reward.name for reward in self.rl.rewards]
        if len(set(names)) < len(names):
            raise impossible("rl.rewards", f"a reward is named twice: {', '.join(names)}")
        if self.rl.mini_batches > self.rollout.prompts_per_step:
            raise impossible(
                "rl.mini_batches", "there are fewer problems in a step than mini-batches"
            )
        self.resources.check(self.runtime)
        if self.export.svd_rank is not None and self.student.form == "lora":
            raise impossible(
                "export.svd_rank",
                "a LoRA student is an exact adapter already; svd_rank is for student: full",
            )
        return self


def checked_name(value: str) -> str:
    """A model or dataset is named, never located: no URL, no path."""
    if "://" in value:
        raise PydanticCustomError("url_refused", "a URL is not accepted here; give a name")
    parts = value.split("/")
    if value.startswith(("/", "~", ".")) or ".." in parts or len(parts) > 2 or not all(parts):
        raise PydanticCustomError(
            "path_refused",
            "a path is not accepted here; give a built-in name, a folder's name under "
            "BRIDGE_MODEL_DIR, or owner/name on the Hugging Face hub",
        )
    return value
