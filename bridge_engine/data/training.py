"""What a run learns from and is measured on: loaded, checked against the model, paired, hashed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bridge_engine.data.datasets import digest, load
from bridge_engine.data.example import Example
from bridge_engine.data.fitting import left_out, no_pairs, no_room, too_long
from bridge_engine.data.template import demonstration, prompt_tokens
from bridge_engine.errors import EngineError
from bridge_engine.forward.sequences import TokenSequence
from bridge_engine.policy import Policy
from bridge_engine.spec.train import TemplateSpec, TrainSpec

Warn = Callable[[str], None]


class TrainingData:
    """The three sets of a run. `warn` is told what had to be left out, and why."""

    def __init__(self, spec: TrainSpec, policy: Policy, template: TemplateSpec, warn: Warn) -> None:
        self.spec = spec
        self.policy = policy
        self.template = template
        self._warn = warn
        self.prompts: list[Example] = []
        """Problems to explore."""
        self.demos: list[TokenSequence] = []
        """Demonstrations to imitate."""
        self.held_out: list[Example] = []
        """Problems to measure on."""
        self.hashes: dict[str, str] = {}
        """SHA-256 of each set as it was loaded, before anything was left out."""
        self._demo_of: dict[str, int] = {}
        self._load()

    def _load(self) -> None:
        data = self.spec.data
        learns_from = self.spec.method.learns_from
        if "demos" in learns_from and data.demos is not None:
            self.demos = self._demonstrations(self._read("demos"))
        if "rewards" in learns_from and data.prompts is not None:
            problems = self._read("prompts")
            if self.spec.method.paired:
                problems = self._with_a_demo(problems)
            self.prompts = self._fitting(problems, "data.prompts", self.spec.rollout.max_new_tokens)
        if data.eval is not None:
            self.held_out = self._fitting(self._read("eval"), "data.eval", self.eval_tokens)

    def _read(self, role: str) -> list[Example]:
        examples = load(getattr(self.spec.data, role), role)  # type: ignore[arg-type]
        self.hashes[role] = digest(examples)
        return examples

    @property
    def eval_tokens(self) -> int:
        """Longest completion of an evaluation."""
        return self.spec.eval.max_new_tokens or self.spec.rollout.max_new_tokens

    def prompt(self, example: Example) -> list[int]:
        """The tokens of a problem's prompt."""
        tokens = prompt_tokens(example.problem, self.template, self.policy.tokenizer)
        if not tokens:
            raise EngineError(
                f"the problem {example.id!r} is no token at all to this model's tokenizer",
                code="empty_prompt",
                param="data",
            )
        return tokens

    def demo_of(self, example: Example) -> int | None:
        """The place of the problem's demonstration in `demos`, where there is one."""
        return self._demo_of.get(example.problem.strip())

    # ------------------------------------------------------------------ what fits

    def _fitting(self, examples: list[Example], param: str, answer: int) -> list[Example]:
        """The problems whose prompt leaves room for an answer of so many tokens."""
        room = self.policy.context - answer
        fitting = [e for e in examples if len(self.prompt(e)) <= room]
        self._report_left_out(examples, fitting, param, no_room(room, answer, self.policy.context))
        return fitting

    def _demonstrations(self, examples: list[Example]) -> list[TokenSequence]:
        longest = min(self.spec.sft.max_tokens or self.policy.context, self.policy.context)
        eos = self.policy.eos_ids[0]
        solved = [e for e in examples if e.solution is not None]
        self._report_left_out(examples, solved, "data.demos", "without a solution")
        sequences = [demonstration(e, self.template, self.policy.tokenizer, eos) for e in solved]
        fits = [len(s) <= longest for s in sequences]
        fitting = [s for s, fit in zip(sequences, fits, strict=True) if fit]
        self._report_left_out(sequences, fitting, "data.demos", too_long(longest))
        problems = [e.problem.strip() for e, fit in zip(solved, fits, strict=True) if fit]
        for place, problem in enumerate(problems):
            self._demo_of.setdefault(problem, place)
        return fitting

    def _with_a_demo(self, problems: list[Example]) -> list[Example]:
        """The problems that a paired method can use."""
        paired = [e for e in problems if self.demo_of(e) is not None]
        if not paired:
            raise EngineError(
                no_pairs(self.spec.method.name), code="no_pairs", param="data.prompts"
            )
        self._report_left_out(problems, paired, "data.prompts", "without a demonstration")
        return paired

    def _report_left_out(
        self, before: Sequence[object], after: Sequence[object], param: str, why: str
    ) -> None:
        if not after:
            raise EngineError(
                left_out(param, len(before), why) if before else f"{param} is empty",
                code="no_data",
                param=param,
            )
        if len(after) < len(before):
            self._warn(f"{param}: {len(before) - len(after)} of {len(before)} rows left out: {why}")
