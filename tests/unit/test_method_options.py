"""What the methods say of themselves."""

import re
import sys
import types
from pathlib import Path

import pytest

from bridge_engine import methods
from bridge_engine.methods import METHODS, make_method
from bridge_engine.methods.alternating import AlternatingOptions
from bridge_engine.methods.cold_start import ColdStartOptions
from bridge_engine.parameters import ParameterSet
from bridge_engine.spec.train import OptimizerSpec
from bridge_engine.token_objectives import TokenObjectives
from tests.support.tiny import random_groups, random_policy, random_sequences, tiny_spec

ROOT = Path(__file__).parents[2]

OPTIONS = [
    *(page() for page in METHODS.values()),
    AlternatingOptions(sft_steps=3, rl_steps=2),
    ColdStartOptions(sft_fraction=0.01),
    ColdStartOptions(sft_fraction=0.99),
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: o.name)
@pytest.mark.parametrize("steps", [2, 7, 30])
def test_every_turn_comes_once_and_in_order(options, steps):
    turns = [options.turns(step, steps) for step in range(steps)]
    demos = [t.demos for t in turns if t.demos is not None]
    rewards = [t.rewards for t in turns if t.rewards is not None]
    assert demos == list(range(len(demos)))
    assert rewards == list(range(len(rewards)))
    assert (len(demos), len(rewards)) == options.totals(steps)
    assert all(t.demos is not None or t.rewards is not None for t in turns)
    if steps > 5:  # everything a method says it learns from is used
        assert (bool(demos), bool(rewards)) == (
            "demos" in options.learns_from and not options.paired,  # those come with problems
            "rewards" in options.learns_from,
        )


@pytest.mark.parametrize("options", OPTIONS[: len(METHODS)], ids=lambda o: o.name)
def test_every_method_has_its_page_and_trains_what_it_deploys(options):
    assert make_method(options).options is options
    assert set(options.policy) <= set(options.adapters)
    assert options.adapters[0] == "student"


def test_the_page_that_the_documents_show_is_a_whole_method(monkeypatch):
    text = (ROOT / "docs" / "methods.md").read_text()
    page = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    module = types.ModuleType("bridge_engine.methods.warm_mix")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(page, vars(module))
    options = methods._defined_in("warm_mix", methods.Options)(over=4)
    method = methods._defined_in("warm_mix", methods.Method)(options)

    policy = random_policy("student")
    student = ParameterSet("student", policy.parameters("student"), OptimizerSpec(), 0.1)
    objectives = TokenObjectives(
        policy, method, tiny_spec("mix"), demos=random_sequences(2), groups=random_groups()
    )
    figures = [method.step(objectives, {"student": student}, step, 8) for step in range(5)]
    assert [f["mu"] for f in figures] == [1, 0.75, 0.5, 0.25, 0]
    assert ["sft/nll" in f for f in figures] == [True] * 4 + [False]
