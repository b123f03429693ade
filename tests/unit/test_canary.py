"""What a loaded adapter is known by: figures of the export, told from another's, the base's and
from rounding."""

import random

import pytest

from service.errors import ApiError
from service.generate.canary import Canary

TOKENS = list(range(40))
POLICY = [-0.1 * (1 + i % 7) for i in range(39)]


def answer(logprobs):
    """As a backend echoes a prompt: nothing for its first token, and one token that it wrote."""
    return {"choices": [{"logprobs": {"token_logprobs": [None, *logprobs, -1.0]}}]}


def rounded(logprobs, by, seed=0):
    rng = random.Random(seed)
    return [value + rng.gauss(0, by) for value in logprobs]


def noted(dtype, base=None, served=""):
    figures = {"tokens": TOKENS, "logprobs": POLICY, "dtype": dtype}
    card = {"canary": figures if base is None else figures | {"base": base}}
    canary = Canary.of(card, served)
    assert canary is not None
    return canary


@pytest.mark.parametrize(("dtype", "by"), [("float32", 1e-5), ("bfloat16", 0.04)])
@pytest.mark.parametrize("change", [0.0, 0.001, 0.01, 0.1, 1.0])
def test_the_policy_rounded_is_the_policy_however_near_the_base_is(dtype, by, change):
    base = rounded(POLICY, change, seed=99)
    for seed in range(200):
        noted(dtype, base).compare(answer(rounded(POLICY, by, seed)))


@pytest.mark.parametrize(
    ("dtype", "by", "change"), [("float32", 1e-5, 0.001), ("bfloat16", 0.04, 0.09)]
)
def test_a_backend_that_leaves_the_adapter_out_is_found_though_it_is_within_rounding(
    dtype, by, change
):
    base = rounded(POLICY, change, seed=99)
    for seed in range(200):
        given = answer(rounded(base, by, seed))
        noted(dtype).compare(given)  # nothing else would tell
        with pytest.raises(ValueError, match="as its base does without it"):
            noted(dtype, base).compare(given)


def test_another_policy_is_found_by_how_far_it_is_off():
    for base in (None, rounded(POLICY, 3.0)):
        with pytest.raises(ValueError, match="another policy"):
            noted("bfloat16", base).compare(answer([value + 0.3 for value in POLICY]))


def test_what_is_served_in_a_coarser_dtype_may_round_as_that_does():
    base = rounded(POLICY, 0.005, seed=99)
    for seed in range(50):
        given = answer(rounded(POLICY, 0.04, seed))
        noted("float32", base, served="bfloat16").compare(given)
        with pytest.raises(ValueError, match="another policy"):
            noted("float32", base).compare(given)


@pytest.mark.parametrize("base", ["far", [0.1], [None] * 39, {"a": 1}])
def test_a_card_whose_base_makes_no_sense_is_asked_for_the_policy_alone(base):
    figures = {"tokens": TOKENS, "logprobs": POLICY, "dtype": "float32", "base": base}
    canary = Canary.of({"canary": figures})
    assert canary is None or canary.base is None


@pytest.mark.parametrize("broken", [{}, {"choices": []}, answer([None] * 39), answer(POLICY[:5])])
def test_an_answer_without_the_figures_is_the_servers_fault(broken):
    with pytest.raises(ApiError, match="gives no log-probabilities"):
        noted("float32").compare(broken)
