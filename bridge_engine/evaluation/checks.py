"""Can an evaluation be run? Whether its names can be had, and the defaults that they imply.

Imports no torch: the service asks on every POST /jobs, as it does of training jobs.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from bridge_engine.data import arithmetic, registry
from bridge_engine.errors import EngineError
from bridge_engine.evaluation.presets import AdapterCard, filled
from bridge_engine.evaluation.spec import EvalSet, EvaluationSpec
from bridge_engine.models.catalog import BRIDGE_TINY, resolve_model
from bridge_engine.spec.checks import (
    check_attention,
    check_dataset,
    check_model,
    check_room,
    check_template,
    fill_dataset,
    has_chat_template,
    shared,
)
from bridge_engine.spec.errors import FieldError
from bridge_engine.spec.train import DatasetRef, TemplateSpec


def read_card(folder: Path) -> AdapterCard:
    """What the adapter in this folder says of itself; EngineError where it says nothing."""
    try:
        card = json.loads((folder / "bridge.json").read_text(encoding="utf-8"))
        template = TemplateSpec.model_validate(card["template"])
        limit = card.get("eval_max_new_tokens") or card["max_new_tokens"]
        trained_on = {
            role: DatasetRef.model_validate(ref) for role, ref in (card.get("data") or {}).items()
        }
        return AdapterCard(card["base_model"], template, int(limit), trained_on)
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise EngineError(
            f"the adapter in {folder} has no bridge.json that says what it is ({error}); the "
            "service puts it there for its jobs, a run started by hand needs a copy of one of the "
            "folders in another run's adapters/",
            code="adapter_missing",
            param="adapter",
        ) from None


def check_evaluation(spec: EvaluationSpec, card: AdapterCard | None = None) -> list[FieldError]:
    """Everything wrong about the names in the spec, and about what they imply. Empty: it can run.

    `card` is the adapter's, where there is one.
    """
    errors: list[FieldError] = []
    for number, one in enumerate(spec.benchmarks):
        found, _ = check_dataset("eval", one, f"benchmarks.{number}")
        errors += found
    if card is not None and spec.model not in (None, card.base_model):
        errors.append(
            FieldError(
                "model",
                "wrong_base",
                f"adapter {spec.adapter} was trained on {card.base_model}, and on {spec.model} it "
                "means nothing; leave model out",
                given=spec.model,
                allowed=[card.base_model],
            )
        )
        return errors
    found, model = check_model(_base(spec, card))
    errors += found
    if model is None:
        return errors
    errors += check_room("sampling.max_new_tokens", spec.sampling.max_new_tokens, model)
    if spec.template is not None:
        errors += check_template(spec.template, model, "template.kind")
    for number, one in enumerate(spec.benchmarks):
        if one.template is not None and one.template != spec.template:
            where = f"benchmarks.{number}.template.kind"
            errors += check_template(one.template, model, where)
    errors += check_attention(spec.runtime)
    return errors or _check_filled(fill_evaluation(spec, card))


def _check_filled(spec: EvaluationSpec) -> list[FieldError]:
    """What can be known once presets and datasets have filled in what was not given."""
    labels = spec.labels()
    if len(set(labels)) < len(labels):
        twice = f"a set is named twice, one of them by its default split: {', '.join(labels)}"
        return [FieldError("benchmarks", "impossible_combination", twice)]
    most = max(spec.samples_of(one) for one in spec.benchmarks)
    if most > 1 and spec.sampling.temperature == 0:
        return [
            FieldError(
                "sampling.temperature",
                "impossible_combination",
                f"{most} samples a problem are asked for, and preset {spec.preset} decodes "
                "greedily, which gives the same one each time: set sampling.temperature",
            )
        ]
    too_many = [k for k in spec.pass_at or [] if k > most]
    if too_many:
        return [
            FieldError(
                "pass_at",
                "too_few_samples",
                f"pass@{too_many[0]} cannot be told from {most} samples a problem: raise "
                "sampling.samples",
                given=too_many[0],
            )
        ]
    return []


def fill_evaluation(spec: EvaluationSpec, card: AdapterCard | None = None) -> EvaluationSpec:
    """The spec with every default filled in; `check_evaluation` has found nothing wrong.

    Filling twice changes nothing.
    """
    base = _base(spec, card)
    model = resolve_model(base)
    made = filled(spec, model.context, card, chat=has_chat_template(model))
    made.model = base
    for one in made.benchmarks:
        fill_dataset(one, "eval")
    return made


def seen_in_training(spec: EvaluationSpec, card: AdapterCard | None) -> dict[int, str]:
    """What to know of the sets, by their number in a resolved spec, that share problems with what
    the adapter was trained on. Copies of problems in other datasets are not looked for."""
    found: dict[int, str] = {}
    for number, one in enumerate(spec.benchmarks):
        for role, ref in card.trained_on.items() if card else ():
            if one.name == ref.name and shared(one, ref, registry.info(one.name)):
                found[number] = (
                    f"{one.name}/{one.split} shares problems with data.{role} "
                    f"({ref.name}/{ref.split}), which {spec.adapter} was trained on: accuracy on "
                    "problems that were trained on measures memory; evaluate on another split, "
                    "other kinds or another dataset"
                )
    return found


def problems_known(one: EvalSet) -> int | None:
    """How many problems a resolved set has, as far as that is known before it is read; at most so
    many where only some `kinds` are asked."""
    if one.name == registry.ARITHMETIC:
        return min(one.limit or arithmetic.MOST, arithmetic.MOST)
    rows = registry.rows(one.name, one.split or "")
    known = [number for number in (one.limit, rows) if number is not None]
    return min(known) if known else None


def _base(spec: EvaluationSpec, card: AdapterCard | None) -> str:
    return spec.model or (card.base_model if card else BRIDGE_TINY)
