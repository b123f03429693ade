"""The arithmetic family: every property its docstring promises."""

import re
from collections import Counter

import pytest

from bridge_engine.data.arithmetic import (
    DEFAULT_LIMIT,
    KINDS,
    LARGEST,
    SPLITS,
    default_kinds,
    generate,
    split_of,
)
from bridge_engine.data.example import Example
from bridge_engine.errors import DataError

EQUATION = re.compile(r"(\d+)([-+*])(\d+)=(\d+)")


def evaluated(expression: str) -> int:
    """Python's own opinion; only characters of arithmetic ever reach it."""
    assert re.fullmatch(r"[\d+*()-]+", expression)
    return int(eval(expression, {"__builtins__": {}}))


@pytest.fixture(scope="module")
def many() -> list[Example]:
    """Every split and every kind, several seeds."""
    return [
        example
        for split in sorted(SPLITS)
        for seed in range(3)
        for example in generate(split, seed=seed, kinds=KINDS, limit=300)
    ]


@pytest.mark.parametrize("split", sorted(SPLITS))
def test_the_same_arguments_give_the_same_examples(split: str) -> None:
    first = generate(split, seed=3, limit=100)
    assert generate(split, seed=3, limit=100) == first
    assert [e.problem for e in generate(split, seed=4, limit=100)] != [e.problem for e in first]


def test_problems_are_the_ones_models_were_trained_on() -> None:
    """A change here silently mixes what bridge-tiny has seen with what it is tested on."""
    assert [e.problem for e in generate("test", limit=5)] == [
        "2+31+42?",
        "39+18-23+48-2?",
        "7*3-20+49?",
        "4+(36+40)+17?",
        "4*4+(26-11)-27?",
    ]
    assert generate("demos", limit=1)[0].solution == "7+27=34,34-13=21#21"


@pytest.mark.parametrize("split", sorted(SPLITS))
def test_a_longer_limit_extends_a_shorter_one(split: str) -> None:
    longer = generate(split, limit=97)
    for limit in (0, 1, 13, 96):
        assert generate(split, limit=limit) == longer[:limit]


def test_a_kind_does_not_depend_on_the_kinds_beside_it() -> None:
    alone = generate("train", kinds=["times"], limit=20)
    assert [e for e in generate("train", limit=80) if e.kind == "times"] == alone


def test_splits_are_disjoint_over_seeds() -> None:
    problems = {
        split: {
            example.problem
            for seed in range(4)
            for example in generate(split, seed=seed, kinds=KINDS, limit=400)
        }
        for split in SPLITS
    }
    assert len(set().union(*problems.values())) == sum(map(len, problems.values()))
    assert all(split_of(problem) == split for split in SPLITS for problem in problems[split])


def test_no_problem_repeats_within_a_split() -> None:
    for split in ("train", "test"):
        examples = generate(split, limit=4_000)
        assert len({e.problem for e in examples}) == len({e.id for e in examples}) == 4_000


def test_kinds_take_turns() -> None:
    assert [e.kind for e in generate("test", limit=12)] == [*KINDS, *KINDS, *KINDS[:2]]
    counts = Counter(e.kind for e in generate("demos"))
    assert set(counts.values()) == {DEFAULT_LIMIT["demos"] // 4}


def test_id_kind_and_level_agree() -> None:
    for index, example in enumerate(generate("dev", kinds=["add5"], limit=5)):
        assert example.id == f"arithmetic/dev/add5/{index}"
        assert (example.kind, example.level) == ("add5", 2)


@pytest.mark.parametrize("split", sorted(SPLITS))
def test_the_last_kind_is_trained_on_only_when_asked_for(split: str) -> None:
    kinds = {e.kind for e in generate(split, limit=200)}
    assert kinds == set(default_kinds(split))
    assert (KINDS[-1] in kinds) == (split in {"dev", "test"})
    assert {e.kind for e in generate(split, kinds=[KINDS[-1]], limit=5)} == {KINDS[-1]}


def test_every_answer_is_what_the_expression_evaluates_to(many: list[Example]) -> None:
    for example in many:
        assert example.problem.endswith("?")
        assert str(evaluated(example.problem[:-1])) == example.answer


def test_every_step_is_true_and_leads_to_the_answer(many: list[Example]) -> None:
    for example in many:
        assert example.solution is not None
        reasoning, _, stated = example.solution.partition("#")
        equations = [EQUATION.fullmatch(step) for step in reasoning.split(",")]
        for equation in equations:
            assert equation is not None, example.solution
            left, operator, right, result = equation.groups()
            assert evaluated(left + operator + right) == int(result)
            assert 0 <= int(result) <= LARGEST
        assert stated == example.answer == equations[-1].group(4)  # type: ignore[union-attr]


def test_a_solution_uses_every_operator_of_its_problem(many: list[Example]) -> None:
    for example in many:
        reasoning = str(example.solution).partition("#")[0]
        assert len(EQUATION.findall(reasoning)) == len(re.findall(r"[-+*]", example.problem))


def test_problems_and_solutions_are_short_and_of_a_small_alphabet(many: list[Example]) -> None:
    for example in many:
        assert set(example.problem) <= set("0123456789+-*()?")
        assert set(str(example.solution)) <= set("0123456789+-*=,#")
        assert len(example.problem) <= 20
        assert len(str(example.solution)) < 48


@pytest.mark.parametrize("kind", KINDS)
def test_no_guess_is_worth_making(kind: str) -> None:
    answers = Counter(e.answer for e in generate("test", kinds=[kind], limit=2_000))
    assert len(answers) == LARGEST + 1
    assert answers.most_common(1)[0][1] / 2_000 < 0.025


@pytest.mark.parametrize(("given", "nearest"), [("tset", "test"), ("Demo", "demos")])
def test_an_unknown_split_is_named_with_its_nearest(given: str, nearest: str) -> None:
    with pytest.raises(DataError) as error:
        generate(given)
    assert (error.value.code, error.value.param) == ("unknown_split", "split")
    assert repr(given) in error.value.message
    assert error.value.message.endswith(f"nearest: {nearest}")
    assert all(split in error.value.message for split in SPLITS)


@pytest.mark.parametrize(("given", "nearest"), [("add4", "add"), ("parens", "paren")])
def test_an_unknown_kind_is_named_with_its_nearest(given: str, nearest: str) -> None:
    with pytest.raises(DataError) as error:
        generate("test", kinds=["times", given])
    assert (error.value.code, error.value.param) == ("unknown_kind", "kinds")
    assert repr(given) in error.value.message
    assert f"nearest: {nearest}" in error.value.message
    assert all(kind in error.value.message for kind in KINDS)


@pytest.mark.parametrize("kinds", [[], ["add3", "add3"]])
def test_no_kinds_or_one_twice_is_refused(kinds: list[str]) -> None:
    with pytest.raises(DataError, match="at least one kind and none twice"):
        generate("train", kinds=kinds)


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(DataError, match="0 or more, not -1"):
        generate("train", limit=-1)


def test_asking_for_more_than_there_is_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge_engine.data.arithmetic._PATIENCE", 50)
    with pytest.raises(DataError, match="no more than about") as error:
        generate("dev", kinds=["add3"], limit=100_000)
    assert error.value.code == "dataset_exhausted"
