"""Checkpoints appear whole or not at all."""

import errno
import os

import pytest
import torch

from bridge_engine import checkpoint
from bridge_engine.errors import EngineError
from bridge_engine.parameters import ParameterSet
from bridge_engine.spec import OptimizerSpec
from bridge_engine.vector import Vector


def fill(text):
    def write(folder):
        (folder / "a.txt").write_text(text)
        (folder / "b.txt").write_text(text * 2)

    return write


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage):
    for step in (1, 2):
        checkpoint.publish(tmp_path / checkpoint.step_folder(step), fill(f"step {step}"))
    newest = tmp_path / checkpoint.step_folder(2)
    match damage:
        case "truncate":
            os.truncate(newest / "a.txt", 3)
        case "flip":
            (newest / "b.txt").write_text("step 3step 3")
        case "remove":
            (newest / "a.txt").unlink()
        case "no manifest":
            (newest / checkpoint.MANIFEST).unlink()
    assert checkpoint.newest_whole(tmp_path) == (tmp_path / "step-000001", [newest])


def test_a_crash_while_writing_leaves_nothing_that_looks_like_a_checkpoint(tmp_path):
    def die(folder):
        (folder / "a.txt").write_text("half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        checkpoint.publish(tmp_path / "step-000001", die)
    assert checkpoint.newest_whole(tmp_path) == (None, [])
    assert list(tmp_path.glob("step-*")) == []


def test_a_full_disk_is_one_clear_sentence_and_costs_no_older_checkpoint(tmp_path):
    checkpoint.publish(tmp_path / "step-000001", fill("good"))

    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(EngineError, match=r"full.*free some space") as caught:
        checkpoint.publish(tmp_path / "step-000002", full)
    assert (caught.value.code, caught.value.retryable) == ("disk_full", True)
    with pytest.raises(EngineError, match="full"):
        checkpoint.publish(tmp_path / "step-000003", fill("x"), expected_bytes=2**60)
    assert checkpoint.newest_whole(tmp_path) == (tmp_path / "step-000001", [])


def test_old_checkpoints_and_leftovers_are_pruned(tmp_path):
    for step in range(1, 6):
        checkpoint.publish(tmp_path / checkpoint.step_folder(step), fill("x"))
    (tmp_path / ".step-000006.1.tmp").mkdir()
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000004", "step-000005"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_parameter_set_restored_goes_on_bit_for_bit(tmp_path, optimizer):
    spec = OptimizerSpec(name=optimizer, warmup_steps=3)

    def fresh():
        torch.manual_seed(0)
        return ParameterSet("student", [torch.nn.Parameter(torch.randn(4, 3))], spec, 0.1)

    def gradients():
        rng = torch.Generator().manual_seed(1)
        return [Vector([torch.randn(4, 3, generator=rng)]) for _ in range(6)]

    straight = fresh()
    for gradient in gradients():
        straight.ascend(gradient)
    first = fresh()
    for gradient in gradients()[:3]:
        first.ascend(gradient)
    checkpoint.save_tensors(tmp_path / "s.safetensors", first.state())
    second = fresh()
    second.load(checkpoint.load_tensors(tmp_path / "s.safetensors"))
    for gradient in gradients()[3:]:
        second.ascend(gradient)
    assert torch.equal(second.tensors[0], straight.tensors[0])


def test_a_gradient_that_is_not_finite_is_refused_before_anything_moves():
    tensor = torch.nn.Parameter(torch.ones(3))
    parameters = ParameterSet("teacher", [tensor], OptimizerSpec(), 0.1)
    with pytest.raises(EngineError, match="teacher is not finite"):
        parameters.ascend(Vector([torch.tensor([1.0, float("nan"), 0.0])]))
    assert torch.equal(tensor.detach(), torch.ones(3))


def test_clipping_keeps_the_direction_and_limits_the_length():
    tensor = torch.nn.Parameter(torch.zeros(2))
    parameters = ParameterSet("s", [tensor], OptimizerSpec(name="sgd", max_grad_norm=1.0), 1.0)
    assert parameters.ascend(Vector([torch.tensor([3.0, 4.0])])) == pytest.approx(5.0)
    torch.testing.assert_close(tensor.detach(), torch.tensor([0.6, 0.8]))
