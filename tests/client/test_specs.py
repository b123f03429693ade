"""Specs on the client's side: files, `--set`, and what is found wrong before anything is sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge_client import SpecError, specs
from bridge_client.demo import QUESTIONS, SPEC
from bridge_engine.data import arithmetic
from bridge_engine.methods import METHODS
from bridge_engine.spec.train import TrainSpec

EXAMPLES = Path(__file__).parents[2] / "examples"
BASE = {"method": "bridge", "data": {"prompts": "arithmetic", "demos": "arithmetic/demos"}}


def test_every_example_is_a_valid_spec() -> None:
    for file in EXAMPLES.glob("*.yaml"):
        assert specs.problems(specs.read(file)) == [], file


def test_every_method_has_an_example_named_after_it_that_can_be_compared() -> None:
    """Same model, same steps, same data: only the method and its learning rates differ."""
    found = {}
    for file in EXAMPLES.glob("arithmetic-*.yaml"):
        spec = TrainSpec.model_validate(specs.read(file))
        found[spec.method.name] = spec
        assert file.stem == f"arithmetic-{spec.method.name.replace('_', '-')}"
        assert f"bridge jobs submit examples/{file.name} --watch" in file.read_text()
    assert set(found) == set(METHODS)
    like = found["bridge"]
    for spec in found.values():
        assert (spec.model, spec.steps, spec.lora) == (like.model, like.steps, like.lora)
        assert spec.data.eval == like.data.eval
        if spec.data.demos:
            assert (spec.data.demos, spec.sft) == (like.data.demos, like.sft)
        if spec.data.prompts:
            assert spec.rollout == like.rollout
            # a paired method can explore no other problems than those that were demonstrated
            same = like.data.demos if spec.method.paired else like.data.prompts
            assert spec.data.prompts == same


def test_the_demo_is_the_bridge_example() -> None:
    example = TrainSpec.model_validate(specs.read(EXAMPLES / "arithmetic-bridge.yaml"))
    assert TrainSpec.model_validate(SPEC) == example


def test_the_demo_asks_what_no_run_trains_on_and_knows_the_answer() -> None:
    for question, answer in QUESTIONS.items():
        assert arithmetic.split_of(question) == "test"
        assert eval(question.rstrip("?")) == int(answer)


def test_set_changes_one_field_and_leaves_the_original_alone() -> None:
    changed = specs.override(BASE, ["steps=7", "rollout.group_size=4", "name=two words"])
    assert changed["steps"] == 7
    assert changed["rollout"] == {"group_size": 4}
    assert "steps" not in BASE
    assert TrainSpec.model_validate(changed).name == "two words"


def test_set_reads_values_as_yaml_as_people_mean_it() -> None:
    changed = specs.override(BASE, ["optimizer.student_lr=3e-4", "data.eval=null", "seed=08"])
    assert changed["optimizer"]["student_lr"] == 3e-4
    assert changed["data"]["eval"] is None
    assert specs.override(BASE, ["name=2026-99-99"])["name"] == "2026-99-99"


def test_set_writes_short_forms_out() -> None:
    changed = specs.override(BASE, ["method.lambda=0.3", "data.demos.limit=16"])
    spec = TrainSpec.model_validate(changed)
    assert spec.method.lambda_ == 0.3  # type: ignore[union-attr]
    assert spec.data.demos is not None
    assert (spec.data.demos.name, spec.data.demos.split, spec.data.demos.limit) == (
        "arithmetic",
        "demos",
        16,
    )


def test_set_takes_a_text_from_a_file_as_it_stands_there(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    for written, read in [
        ("\ufeffThink.\r\nTwice.\r\n", "Think.\nTwice."),  # as Windows' editors write it
        ("Think: twice.\n\n# Then answer.\n", "Think: twice.\n\n# Then answer."),
        ("ends in two\n\n", "ends in two\n"),
        ("3", "3"),
        ("", ""),
    ]:
        file.write_bytes(written.encode())
        changed = specs.override(BASE, [f"template.system=@{file}"])
        assert changed["template"] == {"system": read}
        assert TrainSpec.model_validate(changed).template.system == read
    assert specs.override(BASE, ['name="@home"'])["name"] == "@home"


@pytest.mark.parametrize(
    "setting",
    [
        *("name=@/nowhere/prompt.txt", "name=@", "name=@" + "x" * 5000, "name=@a\0b"),
        *("steps", "=3", "a..b=1", "steps.more=1", "seed={"),
        *("name=!!timestamp 2026-99-99", "name=!!binary aGk=", "seed=!!int x", "name=&a [*a]"),
        *("seed=" + "9" * 5000, "name=" + "[" * 5000),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(setting: str) -> None:
    with pytest.raises(SpecError, match="--set") as caught:
        specs.override({**BASE, "steps": 5}, [setting])
    assert len(str(caught.value)) < 400


def test_a_file_that_is_no_spec_says_which_and_why(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"nowhere\.yaml.*No such file"):
        specs.read(tmp_path / "nowhere.yaml")
    for text in ("[1, 2]", "just words", "a: b: c", ""):
        file = tmp_path / "odd.yaml"
        file.write_text(text)
        with pytest.raises(SpecError, match=r"odd\.yaml"):
            specs.read(file)


def test_everything_wrong_is_found_at_once() -> None:
    found = specs.problems({**BASE, "step": 5, "rollout": {"group_size": 1}})
    assert {problem.param for problem in found} == {"step", "rollout.group_size"}
    (typo,) = [problem for problem in found if problem.param == "step"]
    assert typo.nearest == "steps"
