"""How long the texts of a job will be, in tokens, before anybody has read them.

Measured for the data sets that are used most (by SmolLM2's tokenizer; Qwen's and Llama's differ by
some percent) and taken to be middling for all others. `long` ones are of the 99th percentile: a
micro-batch is made of texts of like length, so one will hold nothing but them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bridge_engine.spec.train import DatasetRef, TrainSpec

CHAT = 32
"""Tokens that a chat template adds: roles, headers, a system message of its own."""


@dataclass(frozen=True)
class _Texts:
    problem: int
    """Mean."""
    long_problem: int
    solution: int
    """Mean."""
    long_solution: int


_MEASURED: Mapping[str, _Texts] = {
    "arithmetic": _Texts(11, 15, 27, 38),
    "gsm8k": _Texts(60, 129, 97, 228),
    "math": _Texts(97, 614, 270, 1190),
}
_OTHERS = _Texts(96, 256, 256, 768)


@dataclass(frozen=True)
class Lengths:
    """Tokens, within the model's context."""

    prompt: int
    """Mean of the prompts that are explored."""
    completion: float
    """Mean: half of `rollout.max_new_tokens`."""
    long_rollout: int
    """A long prompt and all of `rollout.max_new_tokens`."""
    demo: int
    """Mean of the demonstrations, prompt and solution."""
    demo_solution: int
    """The solution's part of it."""
    long_demo: int


def lengths(spec: TrainSpec, context: int) -> Lengths:
    """The lengths of a spec's texts; `context` is the model's, in tokens."""
    around = 0 if spec.template.kind == "plain" else CHAT
    if "arithmetic" in {ref.name for ref in (spec.data.prompts, spec.data.demos) if ref}:
        around = 0  # its own model has no chat template
    around += (len(spec.template.system or "") + len(spec.template.suffix)) // 4
    problems, worked = _texts(spec.data.prompts), _texts(spec.data.demos)
    written = spec.rollout.max_new_tokens
    room = context - written
    longest_demo = min(context, spec.sft.max_tokens or context)
    return Lengths(
        prompt=min(room, problems.problem + around),
        completion=written / 2,
        long_rollout=min(room, problems.long_problem + around) + written,
        demo=min(longest_demo, worked.problem + around + worked.solution),
        demo_solution=worked.solution,
        long_demo=min(longest_demo, worked.long_problem + around + worked.long_solution),
    )


def mean_problem(ref: DatasetRef) -> int:
    """Tokens of a usual problem of the set."""
    return _texts(ref).problem


def _texts(ref: DatasetRef | None) -> _Texts:
    return _MEASURED.get(ref.name, _OTHERS) if ref else _OTHERS
