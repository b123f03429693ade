"""What rollouts earn: the spec's reward functions, with the spec's label noise on the verdicts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from bridge_engine.metrics import Metrics
from bridge_engine.rewards import Verdict
from bridge_engine.rewards.functions import Seen, flipped, parts, total
from bridge_engine.rollout import Completion
from bridge_engine.spec.train import TrainSpec


class Rewarder:
    """Rewards the completions of one run. By default a reward is the verdict, and nothing else."""

    def __init__(self, spec: TrainSpec, text: Callable[[Completion], str]) -> None:
        self._spec = spec
        self._text = text
        self._rewards = spec.rl.rewards
        self._plain = [(r.name, r.weight) for r in self._rewards] == [("accuracy", 1.0)]
        self._seen: dict[str, list[float]] = defaultdict(list)

    def reward(
        self,
        problem: str,
        step: int,
        again: int,
        completions: Sequence[Completion],
        verdicts: Sequence[Verdict],
    ) -> tuple[list[float | None], list[bool | None] | None]:
        """(rewards, verdicts) of the completions of one problem; the verdicts are None where they
        are the rewards. `problem` is its id, `again` the round of sampling within the step."""
        values = self._noisy(problem, step, again, [v.value for v in verdicts])
        if self._plain:
            return [None if v is None else float(v) for v in values], None
        rewards: list[float | None] = []
        limit = self._spec.rollout.max_new_tokens
        for completion, value in zip(completions, values, strict=True):
            length = len(completion.tokens)
            text = self._text(completion)
            found = parts(Seen(text, value, length, limit, not completion.finished), self._rewards)
            for spec, part in zip(self._rewards, found, strict=True):
                if part is not None:
                    self._seen[f"reward/{spec.name}"].append(part)
            rewards.append(total(found, self._rewards))
        return rewards, values

    def _noisy(
        self, problem: str, step: int, again: int, values: list[bool | None]
    ) -> list[bool | None]:
        probability = self._spec.rl.flip_probability
        if not probability:
            return values
        seed = self._spec.seed
        told = [
            flipped(v, probability, seed=seed, step=step, key=f"{again}/{place}/{problem}")
            for place, v in enumerate(values)
        ]
        changed = [a is not b for a, b in zip(values, told, strict=True) if a is not None]
        self._seen["reward/flipped"] += map(float, changed)
        return told

    def metrics(self) -> Metrics:
        """The means since the last call: of each reward function (`reward/NAME`) and of
        the verdicts turned round; nothing where the reward is the plain verdict."""
        found = {key: sum(values) / len(values) for key, values in self._seen.items() if values}
        self._seen.clear()
        return found
