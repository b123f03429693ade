"""A job that cannot use anything of its uploads is known before it is queued, and in the engine's
own words; one that can use something is never refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bridge_engine.data import fitting
from bridge_engine.data.fitting import check_asked, check_uploads
from bridge_engine.errors import EngineError
from bridge_engine.spec.checks import resolve_spec
from bridge_engine.spec.train import TrainSpec
from tests.support.evaluations import evaluation
from tests.support.training import make_trainer

CONTEXT = 256
"""Of bridge-tiny, whose tokens are characters."""


@pytest.fixture(autouse=True)
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "uploads"
    folder.mkdir()
    monkeypatch.setenv("BRIDGE_UPLOADS_DIR", str(folder))
    return folder


def upload(folder: Path, name: str, *rows: tuple[str, str]) -> None:
    lines = [
        json.dumps({"problem": problem, "answer": "1", "solution": solution, "kind": "k"})
        for problem, solution in rows
    ]
    (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))


def asked(method: str, **data: Any) -> dict[str, Any]:
    return {"method": method, "data": data, "sft": {"batch_size": 2}}


def refused(document: dict[str, Any]) -> list[tuple[str, str, str]]:
    found = check_uploads(resolve_spec(TrainSpec.model_validate(document)))
    return [(error.param, error.code, error.message) for error in found]


def of_the_engine(folder: Path, document: dict[str, Any]) -> list[tuple[str | None, str, str]]:
    """What the engine says of the same spec once it has the model."""
    try:
        make_trainer(folder, **document)
    except EngineError as error:
        return [(error.param, error.code, error.message)]
    return []


FULL = ("x" * 100, "#" + "1" * 154)
"""With its end the context to the last token."""
OVER = ("x" * 100, "#" + "1" * 155)


@pytest.mark.parametrize(
    ("rows", "document", "code"),
    [
        ([OVER], asked("sft", demos="ds_x"), "no_data"),
        ([OVER] * 3, asked("sft", demos="ds_x"), "no_data"),
        ([OVER, FULL], asked("sft", demos="ds_x"), None),
        ([OVER, FULL], asked("sft", demos={"name": "ds_x", "limit": 1}), "no_data"),
        ([("x" * 193, "")], asked("rl", prompts="ds_x"), "no_data"),
        ([("x" * 192, "")], asked("rl", prompts="ds_x"), None),
        ([("x" * 500_000, "")], asked("rl", prompts="ds_x"), "no_data"),
        ([("x" * 193, "")], asked("sft", demos="arithmetic", eval="ds_x"), "no_data"),
        ([("y", "#1")], asked("luffy", prompts="ds_x", demos="ds_z"), "no_pairs"),
        ([("z ", "#1")], asked("luffy", prompts="ds_x", demos="ds_z"), None),
        ([("z", "#1")], asked("luffy", prompts="ds_x", demos="ds_over"), "no_data"),
        ([("w", "#1")], asked("luffy", prompts="ds_x", demos="ds_over+"), "no_pairs"),
    ],
)  # fmt: skip
def test_an_upload_is_refused_where_and_as_the_engine_refuses_it(
    uploads: Path, tmp_path: Path, rows: Any, document: dict[str, Any], code: str | None
) -> None:
    upload(uploads, "ds_x", *[(problem, solution or "#1") for problem, solution in rows])
    upload(uploads, "ds_z", ("z", "#1"))
    upload(uploads, "ds_over", ("z", OVER[1] * 2))
    upload(uploads, "ds_overmore", ("z", "#1"), ("w", OVER[1] * 2))
    document = json.loads(json.dumps(document).replace("ds_over+", "ds_overmore"))
    document["rollout"] = {"max_new_tokens": 64}
    found = refused(document)
    assert [one[1] for one in found] == ([code] if code else [])
    assert found == of_the_engine(tmp_path / "run", document)


def test_a_part_of_an_upload_is_refused_where_and_as_the_engine_refuses_it(
    uploads: Path, tmp_path: Path
) -> None:
    upload(uploads, "ds_x", OVER, FULL)
    found = []
    for split in ("train", "train90", "test10"):
        document = asked("sft", demos=f"ds_x/{split}")
        found.append([code for _, code, _ in refused(document)])
        assert refused(document) == of_the_engine(tmp_path / split, document)
    assert found == [[], ["no_data"], []] or found == [[], [], ["no_data"]]


def test_an_upload_that_cannot_be_asked_is_refused_where_and_as_the_engine_refuses_it(
    uploads: Path, tmp_path: Path
) -> None:
    upload(uploads, "ds_x", ("x" * 193, "#1"))
    upload(uploads, "ds_y", ("x" * 193, "#1"), ("x" * 192, "#1"))
    for name, code in (("ds_x", "no_data"), ("ds_y", None)):
        changes: dict[str, Any] = {
            "benchmarks": [{"name": "arithmetic", "limit": 2}, name],
            "sampling": {"max_new_tokens": 64},
            "template": {"kind": "plain"},
        }
        with evaluation(tmp_path / name, **changes) as made:
            found = check_asked(made.spec)
            assert [error.code for error in found] == ([code] if code else [])
            if code:
                with pytest.raises(EngineError) as caught:
                    made.run()
                said = (caught.value.param, caught.value.code, caught.value.message)
                assert said == (found[0].param, found[0].code, found[0].message)


def test_kinds_of_which_there_is_no_problem_are_left_to_the_engine_that_names_those_there_are(
    uploads: Path,
) -> None:
    upload(uploads, "ds_x", OVER)
    assert refused(asked("sft", demos={"name": "ds_x", "kinds": ["other"]})) == []
    assert refused(asked("sft", demos={"name": "ds_x", "kinds": ["k"]}))


def test_what_is_counted_is_never_more_than_what_the_engine_counts(uploads: Path) -> None:
    """By a tokenizer whose tokens are words, with a chat template around the texts and without."""
    from transformers import AutoTokenizer

    from bridge_engine.data.template import prompt_tokens, resolve_template
    from bridge_engine.models.catalog import SMOLLM, resolve_model
    from bridge_engine.spec.train import TemplateSpec

    model = resolve_model(SMOLLM)
    if model.path is None:
        pytest.skip("SmolLM2 has not been converted here")
    tokenizer: Any = AutoTokenizer.from_pretrained(model.path)
    texts = ["  What is 2+3?\n", "żółć 🙂🙂", "a" * 5000, " \n" * 3000, "the cat sat " * 900]
    for template in (TemplateSpec(), TemplateSpec(kind="plain", system="Q: ", suffix="\nA:")):
        count = fitting._counter(model, template)
        assert count is not None
        resolved = resolve_template(template, tokenizer)
        for problem in texts:
            prompt = len(prompt_tokens(problem, resolved, tokenizer))
            for enough in (5, 100, 100_000):
                assert count([problem], enough) <= prompt
            if template.kind == "plain":
                assert count([problem], 100_000) == prompt


def test_without_a_tokenizer_at_hand_nothing_is_refused(
    uploads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(uploads, "ds_x", OVER)
    monkeypatch.setattr(fitting, "_tokenizer", lambda *_: None)
    assert refused(asked("sft", demos="ds_x")) == []


def test_no_more_is_read_than_it_takes(uploads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(uploads, "ds_x", FULL)
    with (uploads / "ds_x.jsonl").open("a") as file:
        file.write("what is no JSON would be found\n")
    assert refused(asked("sft", demos="ds_x")) == []
    upload(uploads, "ds_y", *[OVER] * 4)
    monkeypatch.setattr(fitting, "MOST_ROWS", 3)
    assert refused(asked("sft", demos="ds_y")) == []
    upload(uploads, "ds_z", *[("z", "#1")] * 4)
    upload(uploads, "ds_w", *[("w", "#1")] * 4)
    assert refused(asked("luffy", prompts="ds_z", demos="ds_w")) == []
    monkeypatch.setattr(fitting, "MOST_ROWS", 5)
    assert refused(asked("luffy", prompts="ds_z", demos="ds_w"))
