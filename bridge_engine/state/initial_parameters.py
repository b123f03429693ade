"""Starting from another run's parameters: does its checkpoint fit, and what of it is taken.

Imports no torch: the service asks before it accepts the job, the engine before it loads anything.
"""

from __future__ import annotations

from bridge_engine.spec.errors import FieldError
from bridge_engine.spec.train import TrainSpec

FOLDER = "init"
"""Where the checkpoint lies in the run directory of the job that starts from it."""


def unfit(source: TrainSpec, spec: TrainSpec) -> list[FieldError]:
    """Why the parameters of a run of `source` cannot be where `spec` starts. Empty: they can.

    What the checkpoint has and the method lacks would be lost, and with it a part of the policy:
    that is refused. What the method has and the checkpoint lacks begins fresh; a shadow begins as a
    copy of the student.
    """
    errors = [
        FieldError(
            param,
            "init_does_not_fit",
            f"{param} is {_shown(now)}, and that of the checkpoint it would start from is "
            f"{_shown(before)}: its parameters do not fit; leave {param} as it was, or start from "
            "the base model (init: null)",
            given=now if isinstance(now, str | int | float) else None,
            allowed=[str(before)],
        )
        for param, before, now in _shapes(source, spec)
        if before != now
    ]
    lost = [
        name for name in source.method.policy if name not in spec.method.adapters
    ]  # a shadow takes no part in the policy
    if lost:
        errors.append(
            FieldError(
                "method",
                "init_does_not_fit",
                f"the checkpoint's policy is {' + '.join(source.method.policy)}, and method "
                f"{spec.method.name} trains no {lost[0]}: that part of it would be lost; choose a "
                f"method with a {lost[0]}, or start from the base model (init: null)",
                given=spec.method.name,
            )
        )
    return errors


def _shapes(source: TrainSpec, spec: TrainSpec) -> list[tuple[str, object, object]]:
    """(field, the checkpoint's, the new run's) of all that gives the parameters their meaning."""
    fields: list[tuple[str, object, object]] = [
        ("model", source.model, spec.model),
        ("student.form", source.student.form, spec.student.form),
    ]
    adapters = {name for name in spec.method.adapters if name in source.method.adapters}
    if spec.student.form == "lora" or "teacher" in adapters:
        fields += [
            (f"lora.{name}", getattr(source.lora, name), getattr(spec.lora, name))
            for name in ("rank", "alpha", "target_modules")
        ]
    return fields


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
