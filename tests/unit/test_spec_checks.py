"""A spec whose names cannot be had is refused with the name that was meant; one that can run comes
back with nothing left to guess."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bridge_engine.data import registry
from bridge_engine.errors import DataError, EngineError
from bridge_engine.methods import METHODS
from bridge_engine.spec import checks as spec_checks
from bridge_engine.spec.train import DatasetRef
from tests.support.places import CONTEXT, only_error, spec

pytestmark = pytest.mark.usefixtures("places")


def test_a_spec_that_can_run_has_no_errors() -> None:
    assert spec_checks.check_spec(spec()) == []
    assert spec_checks.check_spec(spec(data={"prompts": "gsm8k", "demos": "math"})) == []
    assert spec_checks.check_spec(spec(data={"demos": "ds_solved", "prompts": "ds_plain"})) == []


def test_an_upload_can_be_trained_and_measured_on_in_parts_that_are_apart() -> None:
    parts = {"prompts": "ds_solved/train90", "demos": "ds_solved/train90"}
    assert spec_checks.check_spec(spec(data={**parts, "eval": "ds_solved/test10"})) == []
    for held_out in ("ds_solved", "ds_solved/train90"):
        error = only_error(data={**parts, "eval": held_out})
        assert (error.param, error.code) == ("data.eval", "eval_is_training_data")
        assert "ds_solved/test10 to measure on" in error.message
    whole = {"prompts": "ds_solved", "demos": "ds_solved", "eval": "ds_solved/test10"}
    assert only_error(data=whole).code == "eval_is_training_data"


@pytest.mark.parametrize(
    ("data", "param", "code", "nearest"),
    [
        ({"prompts": "gsm8"}, "data.prompts.name", "unknown_dataset", "gsm8k"),
        ({"eval": "aritmetic"}, "data.eval.name", "unknown_dataset", "arithmetic"),
        ({"prompts": "gsm8k/trian"}, "data.prompts.split", "unknown_split", "train"),
        ({"eval": "arithmetic/tests"}, "data.eval.split", "unknown_split", "test"),
        (
            {"prompts": {"name": "arithmetic", "kinds": ["add5", "add33"]}},
            "data.prompts.kinds",
            "unknown_kind",
            "add3",
        ),
        ({"eval": {"name": "arithmetic", "kinds": []}}, "data.eval.kinds", "invalid_kinds", None),
        ({"eval": {"name": "gsm8k", "kinds": ["x"]}}, "data.eval.kinds", "invalid_kinds", None),
        ({"demos": "svamp/test"}, "data.demos.name", "no_solutions", None),
        ({"demos": "ds_plain"}, "data.demos.name", "no_solutions", None),
        ({"demos": "ds_gone"}, "data.demos.name", "unknown_dataset", None),
        ({"prompts": "svamp"}, "data.prompts.split", "split_required", None),
        ({"eval": "aime24"}, "data.eval.name", "dataset_unavailable", None),
        ({"eval": "minerva_math"}, "data.eval.name", "dataset_unavailable", None),
        ({"eval": "../secrets"}, "data.eval.name", "unknown_dataset", None),
    ],
)  # fmt: skip
def test_a_wrong_name_is_refused_with_the_nearest(
    data: dict[str, Any],
    param: str,
    code: str,
    nearest: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if data.get("eval") == "../secrets":
        data = {"eval": {"name": "../secrets"}}
    error = only_error(data=data)
    assert (error.param, error.code, error.nearest) == (param, code, nearest)


def test_an_unavailable_benchmark_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BRIDGE_DATA_DIR")
    error = only_error(data={"eval": "svamp"})
    assert "BRIDGE_DATA_DIR is not set" in error.message
    assert "svamp.jsonl" in error.message


@pytest.mark.parametrize(
    "data",
    [
        {"prompts": "gsm8k/test", "eval": "gsm8k"},
        {"demos": "gsm8k/test", "eval": "gsm8k/test"},
        {"eval": "arithmetic/demos"},
        {"eval": {"name": "arithmetic", "split": "train", "seed": 1}},
        {"demos": "ds_solved", "eval": "ds_solved"},
        {"prompts": "math/train", "eval": "math/train_hard"},
        {"prompts": {"name": "math", "kinds": ["Algebra", "Geometry"]},
         "eval": {"name": "math", "split": "train", "kinds": ["Geometry"]}},
    ],
)  # fmt: skip
def test_measuring_on_training_problems_is_refused(data: dict[str, Any]) -> None:
    error = only_error(data=data)
    assert (error.param, error.code) == ("data.eval", "eval_is_training_data")


@pytest.mark.parametrize("method", [name for name, page in METHODS.items() if page.paired])
def test_a_paired_method_is_refused_where_no_problem_can_have_a_demonstration(method: str) -> None:
    apart = {"prompts": "arithmetic/train", "demos": "arithmetic/demos"}
    error = only_error(method=method, data=apart)
    assert (error.param, error.code) == ("data.prompts", "no_pairs")
    assert error.allowed == ["demos"]
    same = {"prompts": "arithmetic/demos", "demos": "arithmetic/demos"}
    assert spec_checks.check_spec(spec(method=method, data=same)) == []
    assert spec_checks.check_spec(spec(method="mix", data=apart)) == []


@pytest.mark.parametrize(
    "data",
    [
        {"prompts": "gsm8k", "eval": "gsm8k"},
        {"prompts": "math", "demos": "math/train_hard", "eval": "math"},
        {"prompts": {"name": "math", "kinds": ["Algebra"]},
         "eval": {"name": "math", "split": "train", "kinds": ["Geometry"]}},
        {"prompts": "ds_plain", "demos": "ds_solved"},
    ],
)  # fmt: skip
def test_disjoint_problems_are_accepted(data: dict[str, Any]) -> None:
    assert spec_checks.check_spec(spec(data=data)) == []


@pytest.mark.parametrize("param", ["rollout.max_new_tokens", "eval.max_new_tokens"])
def test_a_completion_must_leave_room_for_the_prompt(param: str) -> None:
    section, field = param.split(".")
    error = only_error(**{section: {field: CONTEXT}})
    assert (error.param, error.code, error.given) == (param, "longer_than_context", CONTEXT)
    assert "256" in error.message
    assert spec_checks.check_spec(spec(**{section: {field: CONTEXT - 1}})) == []


def test_a_demonstration_must_fit_the_context() -> None:
    assert only_error(sft={"max_tokens": CONTEXT + 1}).param == "sft.max_tokens"


def test_all_errors_come_at_once() -> None:
    errors = spec_checks.check_spec(spec(model="smal", data={"prompts": "gsm", "eval": "x"}))
    assert [e.param for e in errors] == ["data.prompts.name", "data.eval.name", "model"]


@pytest.mark.parametrize(
    ("runtime", "code"),
    [
        ({"device": "cpu"}, "needs_gpu"),
        ({"device": "cuda", "dtype": "float32"}, "needs_bfloat16"),
        ({"device": "cuda"}, None),
        ({}, None),  # the worker may have a GPU
    ],
)
def test_flash_attention_needs_a_gpu_and_sixteen_bits(
    runtime: dict[str, Any], code: str | None
) -> None:
    flash = {**runtime, "attention": "flash_attention_2"}
    found = spec_checks.check_spec(spec(runtime=flash))
    assert [(e.param, e.code) for e in found] == ([("runtime.attention", code)] if code else [])
    assert spec_checks.check_spec(spec(runtime=runtime)) == []


def test_an_extracted_adapter_has_no_rank_above_the_models_width(places: Path) -> None:
    config = places / "models" / "small" / "config.json"
    known = json.loads(config.read_text())
    config.write_text(json.dumps({**known, "hidden_size": 48}))
    error = only_error(student="full", export={"svd_rank": 49})
    assert (error.param, error.code, error.given) == ("export.svd_rank", "rank_too_large", 49)
    assert "48 wide" in error.message
    assert spec_checks.check_spec(spec(student="full", export={"svd_rank": 48})) == []
    config.write_text(json.dumps(known))  # a width nobody tells refuses nothing
    assert spec_checks.check_spec(spec(student="full", export={"svd_rank": 512})) == []


# ------------------------------------------------------------------- models


def test_every_default_that_depends_on_names_is_filled() -> None:
    full = spec_checks.resolve_spec(spec(rollout={"max_new_tokens": 32}))
    refs = (full.data.prompts, full.data.demos, full.data.eval)
    assert [(r.split, r.limit) for r in refs if r] == [
        ("train", 4000),
        ("demos", 128),
        ("dev", 250),
    ]
    assert all(ref is not None and ref.kinds for ref in refs)
    assert full.sft.max_tokens == CONTEXT
    assert full.eval.max_new_tokens == 32


def test_what_was_given_is_kept() -> None:
    prompts = {"name": "arithmetic", "split": "test", "limit": 3, "kinds": ["mixed"]}
    full = spec_checks.resolve_spec(
        spec(data={"prompts": prompts}, sft={"max_tokens": 50}, eval={"max_new_tokens": 7})
    )
    assert full.data.prompts == DatasetRef.model_validate(prompts)
    assert (full.sft.max_tokens, full.eval.max_new_tokens) == (50, 7)


def test_resolving_twice_changes_nothing_and_never_the_argument() -> None:
    given = spec()
    before = given.model_dump()
    once = spec_checks.resolve_spec(given)
    assert spec_checks.resolve_spec(once) == once
    assert given.model_dump() == before


def test_a_spec_that_cannot_run_is_not_resolved() -> None:
    with pytest.raises(EngineError) as caught:
        spec_checks.resolve_spec(spec(data={"prompts": "gsm8"}))
    assert (caught.value.code, caught.value.param) == ("unknown_dataset", "data.prompts.name")


def test_dataset_info_knows_splits_and_solutions() -> None:
    assert registry.info("arithmetic").splits == (
        "demos", "dev", "pretrain", "test", "train",
    )  # fmt: skip
    assert registry.info("amc23").has_solutions is False
    with pytest.raises(DataError):
        registry.info("nothing")
