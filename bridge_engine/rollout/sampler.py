"""What the engine samples with: this process, or a server; the trainer sees no difference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

from bridge_engine.distributed.ranks import World
from bridge_engine.distributed.sharding import whole
from bridge_engine.metrics import Metrics
from bridge_engine.policy import Policy
from bridge_engine.rollout.native import Completion, Draws, SamplingParams, sample
from bridge_engine.spec.train import RuntimeSpec


class Settings(Protocol):
    """What samplers ask of `rollout` in a training spec and of `sampling` in an evaluation's."""

    @property
    def engine(self) -> Literal["native", "vllm"]: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def merge_weights(self) -> bool: ...


class SamplingJob(Protocol):
    """What samplers ask of a job's spec."""

    @property
    def base(self) -> str: ...
    @property
    def method_name(self) -> str: ...
    @property
    def rollout(self) -> Settings: ...
    @property
    def rollout_field(self) -> str: ...
    @property
    def runtime(self) -> RuntimeSpec: ...


class Sampler(Protocol):
    """Draws completions from the policy as it was at the latest `sync`.

    With several ranks every rank makes the same calls; each draws its share of the rows, and all
    of them get all completions.
    """

    def sync(self, step: int, names: Sequence[str] | None = None) -> Metrics:
        """Takes up these parameter sets (None: the method's policy) as they stand now, at 0-based
        `step`; returns what the run may report of it. Called before sampling from weights that
        have changed since, or from other sets."""
        ...

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        rng: Draws = None,
        repeats: int = 1,
    ) -> list[Completion]:
        """`repeats` completions of each prompt (token ids); those of one prompt stand together, in
        order. Everything random comes from `rng`, one for all rows or one a row, which may be None
        only at temperature 0."""
        ...

    def software(self) -> dict[str, str]:
        """Name and version of what samples, where that is not this process."""
        ...

    def close(self) -> None:
        """Gives back what is held outside this process."""
        ...


class NativeSampler:
    """The `Sampler` of this process: `rollout.native` on the trainer's own weights, which need no
    copying: whatever the parameter sets hold when `sample` is called is what samples."""

    def __init__(
        self, policy: Policy, names: Sequence[str], spec: SamplingJob, world: World | None = None
    ) -> None:
        self.policy = policy
        self.spec = spec
        self.world = world or World()
        self.policy_names = tuple(names)
        self.names = self.policy_names

    def sync(self, step: int, names: Sequence[str] | None = None) -> Metrics:
        """Remembers which sets are meant."""
        self.names = self.policy_names if names is None else tuple(names)
        return {}

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        rng: Draws = None,
        repeats: int = 1,
    ) -> list[Completion]:
        """See `Sampler`."""
        rollout, names = self.spec.rollout, self.names
        merged = rollout.merge_weights
        with whole(self.policy, *names), self.policy.using(*names, merged=merged):
            return self.world.spread(
                range(len(prompts) * repeats),
                lambda rows: sample(
                    self.policy.module,
                    prompts,
                    params,
                    eos_ids=self.policy.eos_ids,
                    pad_id=self.policy.pad_id,
                    generator=rng,
                    repeats=repeats,
                    batch_size=rollout.batch_size,
                    rows=rows,
                ),
            )

    def software(self) -> dict[str, str]:
        """Nothing else."""
        return {}

    def close(self) -> None:
        """Nothing is held."""


def make_sampler(
    policy: Policy,
    names: Sequence[str],
    run_directory: Path,
    spec: SamplingJob,
    world: World | None = None,
) -> Sampler:
    """The sampler that `rollout.engine` asks for; `names` are the method's policy.

    To be called before a checkpoint is taken up: the weights of a full student are then the
    base's, which a server is compared with. EngineError where a server is asked for and there is
    none that can be used.
    """
    if spec.rollout.engine == "native":
        return NativeSampler(policy, names, spec, world)
    from bridge_engine.rollout.vllm import VllmSampler

    return VllmSampler.from_environment(policy, names, run_directory, spec, world)
