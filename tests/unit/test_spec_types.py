"""A spec's value has the type of its field or is refused: nothing is made of another one."""

from __future__ import annotations

from typing import Any

import pytest

from bridge_client.specs import override
from bridge_engine.spec.errors import FieldError
from bridge_engine.spec.job import InvalidSpec, JobSpec, parse_spec
from bridge_engine.spec.yaml import load_yaml

TRAIN: dict[str, Any] = {"method": "bridge", "data": {"prompts": "arithmetic", "demos": "gsm8k"}}
EVAL: dict[str, Any] = {"kind": "eval", "benchmarks": ["gsm8k"]}


def errors(document: dict[str, Any]) -> list[FieldError]:
    with pytest.raises(InvalidSpec) as caught:
        parse_spec(document)
    return caught.value.errors


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"steps": True}, "steps", "a number is wanted, not true or false (given: True)"),
        ({"steps": "3"}, "steps", "a number is wanted, and it has no quotes (given: '3')"),
        ({"seed": False}, "seed", "a number is wanted"),
        ({"optimizer": {"student_lr": "3e-4"}}, "optimizer.student_lr", "it has no quotes"),
        ({"optimizer": {"betas": [0.9, "0.98"]}}, "optimizer.betas", "it has no quotes"),
        ({"rl": {"kl_coef": True}}, "rl.kl_coef", "a number is wanted, not true or false"),
        ({"rl": {"mask_truncated": "yes"}}, "rl.mask_truncated", "true or false is wanted"),
        ({"rl": {"mask_truncated": 1}}, "rl.mask_truncated", "true or false is wanted"),
        ({"eval": {"max_new_tokens": "9"}}, "eval.max_new_tokens", "it has no quotes"),
        ({"checkpoint": {"keep_adapters": "3"}}, "checkpoint.keep_adapters", "has no quotes"),
        ({"checkpoint": {"keep_adapters": True}}, "checkpoint.keep_adapters", "a number is"),
        ({"data": {"prompts": {"name": "gsm8k", "limit": "5"}}}, "data.prompts.limit", "quotes"),
        ({"method": {"name": "bridge", "lambda": "0.3"}}, "method.lambda", "has no quotes"),
        ({"method": {"name": "bridge", "meta": "no"}}, "method.meta", "true or false"),
        ({"rl": {"rewards": [{"name": "format", "weight": "1"}]}}, "rl.rewards.0.weight", "quotes"),
    ],
)  # fmt: skip
def test_nothing_is_made_of_a_value_of_another_type(
    change: dict[str, Any], param: str, says: str
) -> None:
    data = {**TRAIN["data"], **change.pop("data", {})}
    (error,) = errors({**TRAIN, **change, "data": data})
    assert (error.param, error.code) == (param, "wrong_type")
    assert says in error.message


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (
            {**TRAIN, "data": {"prompts": "gsm8k", "demos": []}},
            "data.demos: a dataset's name or a mapping of fields is wanted",
        ),
        ({**TRAIN, "data": "gsm8k"}, "data: a mapping of fields is wanted"),
        ({**TRAIN, "rl": {"rewards": []}}, "rl.rewards: needs at least 1, and has 0"),
        ({**TRAIN, "steps": 1.5}, "steps: a whole number is wanted (given: 1.5)"),
        ({**TRAIN, "steps": 0}, "steps: should be greater than or equal to 1 (given: 0)"),
        ({**TRAIN, "optimizer": {"betas": 0.9}}, "optimizer.betas: a list is wanted (given: 0.9)"),
        ({**TRAIN, "init": {"job": "x"}}, "init.job: a job's id is wanted, job_… (given: 'x')"),
        ({**EVAL, "benchmarks": []}, "benchmarks: needs at least 1, and has 0"),
        ({**EVAL, "adapter": "a b"}, "adapter: an adapter is JOB, JOB@STEP, JOB@best, JOB@latest"),
    ],
)  # fmt: skip
def test_a_refusal_speaks_of_the_spec_and_not_of_the_classes_behind_it(
    document: dict[str, Any], says: str
) -> None:
    (error,) = errors(document)
    assert error.message.startswith(says)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"sampling": {"samples": "2"}}, "sampling.samples"),
        ({"pass_at": [1, True]}, "pass_at"),
        ({"benchmarks": [{"name": "gsm8k", "samples": True}]}, "benchmarks.0.samples"),
        ({"grader": {"name": "numeric", "tolerance": "0.1"}}, "grader.tolerance"),
    ],
)
def test_nor_in_an_evaluation(change: dict[str, Any], param: str) -> None:
    (error,) = errors(EVAL | change)
    assert (error.param, error.code) == (param, "wrong_type")


def test_what_people_write_in_yaml_and_on_the_command_line_stays_what_it_was() -> None:
    text = """
        method: {name: bridge, lambda: {start: 0, end: 1}}
        data: {prompts: arithmetic, demos: gsm8k/train}
        steps: 1e2
        optimizer: {student_lr: 1, betas: [0, 0.5], max_grad_norm: null}
        checkpoint: {keep_adapters: all}
        export: {merged: yes}
        lora: {target_modules: [q_proj]}
        name: "7"
    """
    found = parse_spec(load_yaml(text))
    shown = found.model_dump()
    assert shown["steps"] == 100
    assert shown["optimizer"]["student_lr"] == 1
    assert shown["optimizer"]["betas"] == (0, 0.5)
    assert (shown["export"]["merged"], shown["name"]) == (True, "7")
    settings = ["steps=5", "rl.kl_coef=1", "method.lambda=0.3", "checkpoint.keep_adapters=2"]
    settings += ["export.merged=true", "lora.target_modules=all-linear", "init.step=3"]
    settings += ["init.job=job_0", "seed=1_000"]
    made = override(TRAIN, settings)
    again: JobSpec = parse_spec(made)
    assert again.model_dump()["checkpoint"]["keep_adapters"] == 2
    assert parse_spec(again.model_dump(mode="json", by_alias=True)) == again


@pytest.mark.parametrize("document", [TRAIN, EVAL])
@pytest.mark.parametrize(
    ("name", "number", "place"),
    [
        ("a\nb", "000A", 2),
        ("\x00", "0000", 1),
        ("red\x1b[31m", "001B", 4),
        ("a\u2028b", "2028", 2),
        ("a\u202eb", "202E", 2),
        ("a\x9bb", "009B", 2),
    ],
)
def test_a_name_that_a_terminal_would_obey_is_refused(
    document: dict[str, Any], name: str, number: str, place: int
) -> None:
    (error,) = errors({**document, "name": name})
    assert (error.param, error.code) == ("name", "control_character")
    assert f"character {place} is U+{number}" in error.message
    assert name not in error.message


@pytest.mark.parametrize("name", ["zażółć gęślą", "👩‍🚀 первый", "日本語", "a\u00a0b", "x" * 200])
def test_a_name_may_be_of_any_letters(name: str) -> None:
    assert parse_spec({**TRAIN, "name": name}).name == name
