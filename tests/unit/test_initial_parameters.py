"""A run that starts from another one's checkpoint: its parameters, and nothing else of it."""

import shutil

import pytest
import torch

from bridge_engine.errors import EngineError
from bridge_engine.events import EventReader, Log
from bridge_engine.spec.train import TrainSpec
from bridge_engine.state.initial_parameters import unfit
from tests.support.training import SPEC, make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")

INIT = {"init": {"job": "job_0", "step": 2}}
SMALL = {
    "rollout": {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 6},
    "sft": {"batch_size": 2},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Runs of two steps by method, and their checkpoint."""
    made = {}

    def of(method):
        if method not in made:
            run = make_trainer(
                tmp_path_factory.mktemp("source") / method, method=method, steps=2, **SMALL
            )
            assert run.run()
            made[method] = (run, run.state.checkpoints / "step-000002")
        return made[method]

    return of


def started(folder, checkpoint, **changes):
    shutil.copytree(checkpoint, folder / "init")
    return make_trainer(folder, **SMALL, **INIT, **changes)


def values(run, name):
    return [tensor.detach().clone() for tensor in run.sets[name].tensors]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_run_starts_from_the_parameters_of_a_checkpoint_and_nothing_else_of_it(sources, tmp_path):
    source, checkpoint = sources("bridge")
    run = started(tmp_path, checkpoint)
    progress = run._start()
    assert (progress.step, progress.seconds, progress.best_step) == (0, 0.0, None)
    for name, parameters in run.sets.items():
        assert equal(values(run, name), values(source, name)), name
        assert not parameters.optimizer.state, "fresh optimisers"
    assert not equal(values(run, "student"), values(run, "shadow"))


def test_a_run_that_began_so_resumes_to_the_same_bytes(sources, tmp_path):
    _, checkpoint = sources("bridge")
    straight = started(tmp_path / "straight", checkpoint, steps=2)
    assert straight.run()
    first = started(tmp_path / "stopped", checkpoint, steps=2)
    first.stop_requested = lambda: (
        any(first.state.checkpoints.glob("step-*")) or bool(first.sets["student"].optimizer.state)
    )
    assert first.run() is False
    second = make_trainer(tmp_path / "stopped", **SMALL, **INIT, steps=2)
    assert second.run()
    assert equal(values(second, "student"), values(straight, "student"))


def test_what_the_checkpoint_lacks_begins_fresh_and_the_shadow_as_the_student(sources, tmp_path):
    source, checkpoint = sources("sft")
    run = started(tmp_path, checkpoint)
    teacher = values(run, "teacher")
    run._start()
    assert equal(values(run, "student"), values(source, "student"))
    assert equal(values(run, "shadow"), values(source, "student"))
    assert equal(values(run, "teacher"), teacher)
    said = [e.message for e in EventReader(tmp_path / "events.jsonl").read() if isinstance(e, Log)]
    assert any("starts from step 2 of job_0; begins fresh: teacher, shadow" in m for m in said)


def test_a_checkpoint_that_is_missing_or_damaged_is_named(sources, tmp_path):
    _, checkpoint = sources("bridge")
    with pytest.raises(EngineError) as missing:
        make_trainer(tmp_path / "missing", **SMALL, **INIT)._start()
    assert missing.value.code == "init_missing"
    run = started(tmp_path / "damaged", checkpoint)
    (tmp_path / "damaged" / "init" / "student.safetensors").write_bytes(b"torn")
    with pytest.raises(EngineError) as damaged:
        run._start()
    assert damaged.value.code == "init_damaged"


def test_a_checkpoint_of_other_shapes_is_refused(sources, tmp_path):
    _, checkpoint = sources("bridge")
    run = started(tmp_path, checkpoint, lora={"rank": 4})
    with pytest.raises(EngineError, match=r"lora\.rank is 4") as refused:
        run._start()
    assert (refused.value.code, refused.value.param) == ("init_does_not_fit", "lora.rank")
    state = {"0/value": torch.zeros(2, 2)}
    with pytest.raises(EngineError, match="student of the checkpoint"):
        run.sets["student"].take_values(state)


@pytest.mark.parametrize(
    ("before", "now", "params"),
    [
        ({}, {}, []),
        ({}, {"steps": 9, "rollout": {"group_size": 2}, "seed": 3}, []),
        ({}, {"lora": {"rank": 4, "alpha": 1}}, ["lora.rank", "lora.alpha"]),
        ({}, {"lora": {"target_modules": ["q_proj"]}}, ["lora.target_modules"]),
        ({}, {"model": "other"}, ["model"]),
        ({"student": "full"}, {}, ["student.form", "lora"]),
        ({"method": "bridge"}, {"method": "rl"}, ["method"]),
        ({"method": "sft"}, {"method": "bridge"}, []),
        ({"method": {"name": "bridge", "meta": False}}, {"method": "bridge"}, []),
        ({"method": "bridge"}, {"method": {"name": "bridge", "meta": False}}, []),
    ],
)
def test_what_fits_is_known_from_the_specs(before, now, params):
    source, spec = (TrainSpec.model_validate({**SPEC, **change}) for change in (before, now))
    assert [e.param for e in unfit(source, spec)] == [p for p in params if p != "lora"]
