"""Does the policy end what it writes? When a run should say that it does not, and in which words.

A base model may never emit the token that ends an answer. Every completion is then cut off at
max_new_tokens, answers are judged on half a text, and RL trains on truncation; nothing fails, so
it has to be said. The share is measured at every step (`completions/clipped_ratio`); here is
decided when a person is told. Imports no torch, and remembers nothing: a resumed run says the same
as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Sequence

from bridge_engine.spec.train import TrainSpec

SHARE = 0.5
"""Completions cut off, of all of a step, from which on it is worth a warning: half of the text that
is trained on has then no end."""


def ending_warning(
    spec: TrainSpec, step: int, *, finished: int, truncated: int, ends: Sequence[str]
) -> str | None:
    """The warning that `step` (finished steps, from 1) calls for, or None.

    `finished` and `truncated` count the step's completions; `ends` are the tokens that would have
    ended one, as text. Warns at steps 1, 4, 16, 64, … alone: seven times in a run of 5,000 steps.
    """
    total = finished + truncated
    if total == 0 or truncated < SHARE * total or not _looks_at(step):
        return None
    tokens = " or ".join(repr(end) for end in ends)
    if finished == 0:
        seen = f"none of the {total} completions of step {step} came to an end: no {tokens} within"
    else:
        seen = (
            f"{truncated} of the {total} completions of step {step} did not come to an end: "
            f"no {tokens} within"
        )
    return (
        f"{seen} rollout.max_new_tokens = {spec.rollout.max_new_tokens}. They are judged and "
        f"{_taken(spec)} as they were cut. {_advice(spec, never=finished == 0)}"
    )


def _looks_at(step: int) -> bool:
    """1, 4, 16, 64, …"""
    return step >= 1 and step.bit_count() == 1 and step.bit_length() % 2 == 1


def _taken(spec: TrainSpec) -> str:
    return "left out of the loss" if spec.rl.mask_truncated else "trained on"


def _advice(spec: TrainSpec, *, never: bool) -> str:
    """What to change, the likeliest first."""
    ways = ["raise rollout.max_new_tokens if the answers are merely long (read a few samples)"]
    if "demos" not in spec.method.learns_from:
        ways.append(
            "if the model does not know how to end an answer, show it: "
            f"method {spec.method.name} has no demonstrations, which all end properly, and "
            "cold_start, bridge or mix have"
        )
    elif never:
        ways.append(
            "if this goes on, the demonstrations do not teach the ending: more of them in a step "
            "(sft.batch_size), a larger weight or learning rate, or solutions short enough for "
            "max_new_tokens"
        )
    ways.append(_TEMPLATE[spec.template.kind])
    return "What helps: " + "; ".join(ways) + "."


_TEMPLATE = {
    "plain": "template.kind chat, if the model was trained on conversations",
    "chat": "template.kind plain, if the model has never seen its chat template's tokens",
    "auto": "another template.kind than the one that auto chose: chat for a model trained on "
    "conversations, plain for one that has never seen its chat template's tokens",
}
