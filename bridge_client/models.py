"""What the service answers, typed. Every object is frozen, and keeps fields it does not know.

Times are ISO 8601 texts in UTC as the service writes them; accuracies and rewards lie in 0…1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

TERMINAL = frozenset({"succeeded", "failed", "cancelled"})
"""The statuses of a job that is over; a retry alone takes it back."""


class Record(BaseModel):
    """An object of the API. A newer service may add fields; none is lost."""

    model_config = ConfigDict(frozen=True, extra="allow")


class Job(Record):
    """A job and where it stands."""

    id: str
    status: str
    """queued, running, pausing, paused, cancelling, succeeded, failed or cancelled."""
    kind: str = "train"
    """`train` or `eval`."""
    name: str | None = None
    method: str | None = None
    model: str | None = None
    wanted: str | None = None
    project: str | None = None
    queue: str | None = None
    """What a worker must have to run it: any, cpu, gpu or gpu:N."""
    priority: int = 0
    waiting_for: str | None = None
    """Of a queued job: what it waits for, in words."""
    retry_at: str | None = None
    """Of a queued job that broke down: when it is tried again at the earliest."""
    forked_from: dict[str, Any] | None = None
    """{job, step} that it was made from."""
    retries: int = 0
    """How often it was tried again after its end."""
    attempt: int = 0
    """How often a worker has started it."""
    step: int = 0
    """Finished optimisation steps; of an evaluation, problems."""
    steps: int = 0
    """Steps of the whole job."""
    created_at: str | None = None
    queued_at: str | None = None
    started_at: str | None = None
    finished_at: str | None = None
    spec: dict[str, Any] = Field(default_factory=dict)
    """The spec with every default filled in."""
    error: dict[str, Any] | None = None
    """{category, code, message, param, retryable} of a failed job."""
    result: dict[str, Any] | None = None
    """accuracy_before, accuracy_after, their 95 % intervals, best_step, … of a finished job."""
    adapter: str | None = None
    """The name `generate` takes: the best checkpoint's adapter, else the latest."""
    latest: dict[str, float | None] = Field(default_factory=dict)
    """The last value of each metric."""

    @property
    def terminal(self) -> bool:
        """Is it over? Nothing but a retry changes it any more."""
        return self.status in TERMINAL


class Project(Record):
    """Whose jobs, and how much they may use."""

    id: str
    name: str | None = None
    max_running: int | None = None
    """Jobs that may run at the same time; None: any number."""
    gpu_hours: float | None = None
    """No job that takes a GPU is started once these are used up; None: no limit."""
    gpu_seconds_used: float = 0.0


class DryRun(Record):
    """What a spec would become if it were submitted."""

    spec: dict[str, Any] = Field(default_factory=dict)
    estimates: dict[str, Any] = Field(default_factory=dict)
    """Orders of magnitude: steps, rollouts, tokens, memory in bytes, …"""
    warnings: list[str] = Field(default_factory=list)
    """What speaks against its result: an evaluation of what the adapter was trained on, say."""


class Event(Record):
    """One thing that happened in a run; `type` says which fields it has beside these."""

    seq: int
    """Position in the job's stream, rising."""
    type: str
    """phase, resume, metric, sample, checkpoint, log, done, stopped or error."""
    time: float | None = None
    step: int | None = None
    attempt: int | None = None

    def get(self, name: str, default: Any = None) -> Any:
        """A field of this event's type, e.g. `event.get("metrics")`."""
        return (self.model_extra or {}).get(name, default)


@dataclass(frozen=True, slots=True)
class Series:
    """One metric over the steps of a job."""

    key: str
    points: tuple[tuple[int, float | None], ...]
    """(step, value), steps rising; None stands for a figure that was not a number."""

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.points]

    @property
    def values(self) -> list[float | None]:
        return [value for _, value in self.points]

    @property
    def last(self) -> float | None:
        """The newest value, None if there is none."""
        return self.points[-1][1] if self.points else None

    def __len__(self) -> int:
        return len(self.points)


class Metrics(Mapping[str, Series]):
    """The metrics of a job by name: `metrics["reward"].last`."""

    def __init__(self, job_id: str, series: Mapping[str, Series]) -> None:
        self.job_id = job_id
        self._series = dict(series)

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> Metrics:
        series = {
            key: Series(key, tuple((int(step), value) for step, value in points))
            for key, points in body["metrics"].items()
        }
        return cls(str(body.get("job_id", "")), series)

    def as_dict(self) -> dict[str, Any]:
        """As the service wrote it."""
        points = {key: [list(p) for p in series.points] for key, series in self.items()}
        return {"job_id": self.job_id, "metrics": points}

    def __getitem__(self, key: str) -> Series:
        return self._series[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._series)

    def __len__(self) -> int:
        return len(self._series)

    def __repr__(self) -> str:
        return f"Metrics({self.job_id}: {', '.join(self._series)})"


class Sample(Record):
    """One completion the policy wrote."""

    id: int | None = None
    step: int | None = None
    source: str | None = None
    """`rollout` or `eval`."""
    problem: str = ""
    completion: str = ""
    gold: str = ""
    reward: float | None = None
    """1 right, 0 wrong, None unjudged."""


class Checkpoint(Record):
    """A saved state of a job and the adapter exported from it."""

    step: int
    path: str | None = None
    adapter: str | None = None
    sha256: str | None = None
    rank: int | None = None
    accuracy: float | None = None
    best: bool = False


class Adapter(Record):
    """A trained LoRA adapter under its immutable name, JOB@STEP."""

    name: str
    job_id: str | None = None
    step: int | None = None
    base_model: str | None = None
    rank: int | None = None
    template: dict[str, Any] | None = None
    """How a problem becomes a prompt."""
    accuracy: float | None = None
    status: str | None = None
    """registered, ready or failed."""
    sha256: str | None = None
    created_at: str | None = None


class Dataset(Record):
    """An uploaded dataset; its id is its name in a spec."""

    id: str
    name: str | None = None
    rows: int | None = None
    with_solution: int | bool | None = None
    """How many rows carry a worked solution."""
    bytes: int | None = None
    sha256: str | None = None
    created_at: str | None = None


class Choice(Record):
    """One of the answers asked for."""

    index: int = 0
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[dict[str, Any]] | None = None
    """Where asked for: {token, logprob, bytes, top_logprobs} of each token."""


class Generation(Record):
    """What a model wrote."""

    id: str | None = None
    model: str | None = None
    adapter: str | None = None
    choices: list[Choice] = Field(default_factory=list)
    usage: dict[str, Any] = Field(default_factory=dict)
    """prompt_tokens, completion_tokens, total_tokens."""

    @property
    def text(self) -> str:
        """The first answer."""
        return self.choices[0].text if self.choices else ""


class Grade(Record):
    """What a grader says of one answer."""

    verdict: str
    """right, wrong or unjudged."""
    reason: str = ""
    """A stable word for programs."""
    detail: str = ""
    """The reason as a sentence."""
    stated: str | None = None
    """The answer that was found in the text."""


class Grades(Record):
    """A verdict for each answer, in order."""

    grader: dict[str, Any] = Field(default_factory=dict)
    version: str = ""
    data: list[Grade] = Field(default_factory=list)
    right: int = 0
    wrong: int = 0
    unjudged: int = 0


class Scores(Record):
    """What an evaluation found."""

    job_id: str
    model: str | None = None
    adapter: str | None = None
    preset: str | None = None
    grader: dict[str, Any] = Field(default_factory=dict)
    """Name, options and the version of its rules."""
    seed: int = 0
    engine: str | None = None
    """What sampled: native or vllm."""
    completions_of: str | None = None
    """The evaluation whose answers were judged anew."""
    seconds: float | None = None
    environment: dict[str, Any] = Field(default_factory=dict)
    """Hardware and versions."""
    benchmarks: list[dict[str, Any]] = Field(default_factory=list)
    """Of each set its name, problems, samples, sampling and template, the first `prompt` as the
    model read it, `scores` ({pass@1: {value, low, high, problems, interval}, …}; `interval` says by
    what: wilson, bootstrap or normal), `outcomes`, `reasons`, `by_kind`, `by_level`."""
    against: dict[str, Any] | None = None
    """Another evaluation: its `job_id`, `model` and `adapter`, the paired differences in pass@1 by
    set (`benchmarks`) and in the other scores of both by set and score (`others`), and the
    `settings` that were set otherwise, ours and theirs."""


class GenerationChunk(Generation):
    """What was written since the chunk before. The last one has no choices but the `usage`."""


class Alias(Record):
    """A name of your own for an adapter."""

    name: str
    adapter: str
    """The immutable name it stands for."""
    created_at: str | None = None
    updated_at: str | None = None


T = TypeVar("T", bound=BaseModel)


class Page(BaseModel, Generic[T]):
    """One page of a list."""

    model_config = ConfigDict(frozen=True)

    data: list[T]
    has_more: bool = False
    next: str | None = None
    """What to pass as `after` for the next page; None on the last one."""
