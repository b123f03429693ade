"""A policy that does not end its texts is told of: when it matters, seldom, with what helps."""

import subprocess
import sys

import pytest

from bridge_engine.endings import ending_warning
from bridge_engine.spec.train import TrainSpec

ENDS = ["<|endoftext|>", "<|im_end|>"]


def spec(**changes):
    data = {"prompts": "arithmetic", "demos": "arithmetic"}
    return TrainSpec.model_validate({"method": "bridge", "data": data, **changes})


def warning(given=None, step=1, *, finished, truncated):
    return ending_warning(given or spec(), step, finished=finished, truncated=truncated, ends=ENDS)


@pytest.mark.parametrize(
    ("finished", "truncated", "warned"),
    [(0, 64, True), (1, 63, True), (32, 32, True), (33, 31, False), (64, 0, False), (0, 0, False)],
)
def test_half_of_the_texts_without_an_end_are_worth_a_warning(finished, truncated, warned):
    assert (warning(finished=finished, truncated=truncated) is not None) == warned


def test_it_is_said_a_few_times_in_a_long_run_and_never_twice_for_a_step():
    steps = [s for s in range(5001) if warning(step=s, finished=0, truncated=8)]
    assert steps == [1, 4, 16, 64, 256, 1024, 4096]


def test_the_words_say_what_was_seen_and_which_tokens_were_missed():
    message = warning(finished=0, truncated=64)
    assert message.startswith("none of the 64 completions of step 1 came to an end")
    assert "no '<|endoftext|>' or '<|im_end|>'" in message
    assert "rollout.max_new_tokens = 64" in message
    message = warning(step=4, finished=12, truncated=52)
    assert message.startswith("52 of the 64 completions of step 4 did not come to an end")


def test_the_advice_fits_the_method():
    without_demos = spec(method="rl")
    message = warning(without_demos, finished=0, truncated=8)
    assert "method rl has no demonstrations" in message
    message = warning(finished=0, truncated=8)
    assert "method bridge has no" not in message
    assert "sft.batch_size" in message
    assert "sft.batch_size" not in warning(finished=1, truncated=7), "it knows how to end"


def test_the_advice_fits_the_template_and_the_loss():
    plain = warning(spec(template={"kind": "plain"}), finished=0, truncated=8)
    chat = warning(spec(template={"kind": "chat"}), finished=0, truncated=8)
    assert "template.kind chat" in plain
    assert "template.kind plain" in chat
    assert "another template.kind than the one that auto chose" in warning(finished=0, truncated=8)
    assert "trained on as they were cut" in plain
    masked = warning(spec(rl={"mask_truncated": True}), finished=0, truncated=8)
    assert "left out of the loss as they were cut" in masked


def test_it_loads_no_torch():
    code = "import sys, bridge_engine.endings; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
