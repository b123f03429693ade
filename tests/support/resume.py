"""A run that is stopped or killed and goes on, beside one that was not: the same to the bit."""

import json

import pytest
import torch

from bridge_engine.distributed.ranks import World
from bridge_engine.events import EventReader
from tests.support.training import ScriptedVerifier, make_trainer

FOUR = {"name": "arithmetic", "split": "demos", "limit": 4}
"""Four problems: at three a step, every step but the first ends an epoch and begins the next."""
STEPS = 4


class Killed(BaseException):
    """What SIGKILL is to a process: nothing runs after it."""


def assert_resumes_bitwise(folder, method, interruptions, world=None, **changes):
    """Trains by the method straight on, and again with each of these interruptions (`stopped` or
    `killed`, after so many steps), in folders under `folder`. Every rank of `world` calls it."""
    world = world or World()
    # ranks share the verdicts out, so that which groups fail is another matter with each number
    buffer = 2 if world.size == 1 else 1
    changes = {
        "method": {"name": method, "buffer": buffer} if method == "relift" else method,
        "data": {"prompts": FOUR, "demos": FOUR},
        "steps": STEPS,
        "seed": 3,  # by which the group that fails is another problem's, two steps in a row
        "eval": {"every": 1},  # which shows samples of every step
        "checkpoint": {"every": 2},
        **changes,
    }

    def made(name, stop=lambda: False):
        one = make_trainer(folder / name, world, **changes)
        one.explorer.verifier = ScriptedVerifier((True, *[False] * 7))  # every other group fails
        one.stop_requested = stop
        return one

    straight = made("straight")
    assert straight.run()
    if method == "relift" and world.size == 1:
        # either side of the third step a lesson, and after it a problem that waits for the second
        assert [row["buffer"] for row in figures(straight)] == [1, 0, 1, 0]
    for how, steps in interruptions:
        name = f"{how}-{steps}"
        first = made(name, _after(steps, how))
        if how == "killed":
            with pytest.raises(Killed):
                first.run()
        else:
            assert first.run() is False
        second = made(name)
        assert second.run() is True
        for one in straight.sets:
            pairs = zip(second.sets[one].tensors, straight.sets[one].tensors, strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
        if world.is_first:  # the one that writes
            assert figures(second) == figures(straight)
            assert samples(second) == samples(straight)
            assert files(second) == files(straight)


def _after(steps, how):
    """`stop_requested`, which is asked before each step, of a run that gets so far."""
    asked = 0

    def stop():
        nonlocal asked
        asked += 1
        if asked <= steps:
            return False
        if how == "killed":
            raise Killed
        return True

    return stop


def files(made):
    """Every tensor file of the last step by its place, as bytes: the state and what is exported."""
    root = made.state.root
    found = root.glob(f"*/step-{STEPS:06d}*/*.safetensors")
    contents = {str(file.relative_to(root)): file.read_bytes() for file in found}
    assert {name.partition("/")[0] for name in contents} > {"checkpoints"}
    return contents


def figures(made):
    """What a run reported, less the clock's."""
    rows = map(json.loads, made.events.metrics_path.read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def samples(made):
    """What was shown, each once, less what a resume took back."""
    shown = {}
    for event in EventReader(made.events.path).read(limit=10_000):
        if event.type == "resume":
            shown = {k: v for k, v in shown.items() if k[0] <= event.step}
        if event.type == "sample":
            shown[event.step, event.source, event.problem] = (event.completion, event.reward)
    return shown
