"""What the methods say of themselves."""

import pytest

from bridge_engine.methods import METHODS, make_method
from bridge_engine.methods.alternating import AlternatingOptions
from bridge_engine.methods.cold_start import ColdStartOptions

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
