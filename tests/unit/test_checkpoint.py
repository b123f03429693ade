"""Checkpoints appear whole or not at all."""

import contextlib
import errno
import os
import subprocess

import pytest
import torch

from bridge_engine.errors import EngineError
from bridge_engine.events import EventReader, EventWriter, Log
from bridge_engine.parameters import ParameterSet
from bridge_engine.spec.train import OptimizerSpec
from bridge_engine.state import checkpoint
from bridge_engine.state.tensor_files import load_tensors, save_tensors
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


def test_a_damaged_checkpoint_never_pushes_a_whole_one_out(tmp_path):
    for step in (6, 8):
        checkpoint.publish(tmp_path / checkpoint.step_folder(step), fill("x"))
    os.truncate(tmp_path / "step-000008" / "a.txt", 0)
    _, (damaged,) = checkpoint.newest_whole(tmp_path)
    checkpoint.set_aside(damaged)
    checkpoint.publish(tmp_path / "step-000007", fill("x"))
    checkpoint.prune(tmp_path, keep=1)
    assert checkpoint.newest_whole(tmp_path) == (tmp_path / "step-000007", [])


@pytest.mark.parametrize("manifest", ["{}", "[]", "null", "not json"])
def test_a_folder_without_a_manifest_of_its_files_is_no_checkpoint(tmp_path, manifest):
    (tmp_path / "step-000001").mkdir()
    (tmp_path / "step-000001" / checkpoint.MANIFEST).write_text(manifest)
    assert not checkpoint.is_whole(tmp_path / "step-000001")


def test_publishing_the_same_bytes_again_touches_nothing(tmp_path):
    final = tmp_path / "step-000001"
    checkpoint.publish(final, fill("x"))
    before = final.stat().st_ino
    checkpoint.publish(final, fill("x"))
    assert final.stat().st_ino == before
    checkpoint.publish(final, fill("y"))
    assert (final / "a.txt").read_text() == "y"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_while_tensors_are_written_is_told_as_such(small_disk, monkeypatch):
    monkeypatch.setattr(checkpoint, "SPARE_BYTES", 0)
    checkpoint.publish(small_disk / "step-000001", fill("good"))
    tensors = {"big": torch.zeros(1_000_000)}
    with pytest.raises(EngineError, match=r"full.*free some space") as caught:
        checkpoint.publish(
            small_disk / "step-000002",
            lambda folder: save_tensors(folder / "t.safetensors", tensors),
        )
    assert caught.value.code == "disk_full"
    assert checkpoint.newest_whole(small_disk) == (small_disk / "step-000001", [])


def test_a_full_disk_leaves_no_half_event_that_would_hide_those_that_follow(small_disk):
    writer = EventWriter(small_disk)
    writer.emit(Log(message="first"))
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 1000):
            pass
    with pytest.raises(OSError, match="No space left"):
        writer.emit(Log(message="x" * 100_000))
    ballast.unlink()
    writer.emit(Log(message="second"))
    events = EventReader(small_disk / "events.jsonl").read()
    assert [(e.seq, e.message) for e in events] == [(1, "first"), (2, "second")]


def test_old_checkpoints_and_leftovers_are_pruned(tmp_path):
    for step in range(1, 6):
        checkpoint.publish(tmp_path / checkpoint.step_folder(step), fill("x"))
    (tmp_path / ".step-000006.1.tmp").mkdir()
    checkpoint.prune(tmp_path, keep=2)
    checkpoint.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000004", "step-000005"]


def test_steps_go_by_number_when_their_names_grow_longer(tmp_path):
    """`step-1000000` sorts before `step-999999` as a text."""
    for step in (1_000_000, 999_999, 5, 10_000_000):
        name = checkpoint.step_folder(step)
        checkpoint.publish(tmp_path / name, lambda folder: (folder / "a").write_text("x"))
    (tmp_path / "step-x").mkdir()
    newest, torn = checkpoint.newest_whole(tmp_path)
    assert (newest.name, torn) == ("step-10000000", [])
    checkpoint.prune(tmp_path, keep=2)
    left = {folder.name for folder in tmp_path.glob("step-*")}
    assert left == {"step-10000000", "step-1000000", "step-x"}


def test_the_best_checkpoint_is_never_pruned(tmp_path):
    for step in range(1, 6):
        checkpoint.publish(tmp_path / checkpoint.step_folder(step), fill("x"))
    checkpoint.prune(tmp_path, keep=1, best=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000005"]


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
    save_tensors(tmp_path / "s.safetensors", first.state())
    second = fresh()
    second.load(load_tensors(tmp_path / "s.safetensors"))
    for gradient in gradients()[3:]:
        second.ascend(gradient)
    assert torch.equal(second.tensors[0], straight.tensors[0])


def test_a_gradient_that_is_not_finite_is_refused_before_anything_moves():
    tensor = torch.nn.Parameter(torch.ones(3))
    parameters = ParameterSet("teacher", [tensor], OptimizerSpec(), 0.1)
    with pytest.raises(EngineError, match="gradient of the teacher became NaN"):
        parameters.ascend(Vector([torch.tensor([1.0, float("nan"), 0.0])]))
    assert torch.equal(tensor.detach(), torch.ones(3))


def test_parameters_that_are_not_finite_never_reach_a_checkpoint():
    tensor = torch.nn.Parameter(torch.ones(3))
    parameters = ParameterSet(
        "student", [tensor], OptimizerSpec(name="sgd", max_grad_norm=None), 3e38
    )
    with pytest.raises(EngineError, match="student's parameters are not finite"):
        parameters.ascend(Vector([torch.full((3,), 2.0)]))


def test_infinities_that_cancel_are_not_finite_and_large_parameters_are():
    sgd = OptimizerSpec(name="sgd", max_grad_norm=None)
    large = torch.nn.Parameter(torch.full((4,), 3e38))  # whose sum is none in float32
    ParameterSet("student", [large], sgd, 0.1).ascend(Vector([torch.ones(4)]))
    tensor = torch.nn.Parameter(torch.zeros(2))
    parameters = ParameterSet("student", [tensor], sgd, 3e38)
    with pytest.raises(EngineError, match="student's parameters are not finite"):
        parameters.ascend(Vector([torch.tensor([2.0, -2.0])]))


def test_adam_follows_its_betas_and_the_warmup_by_hand():
    spec = OptimizerSpec(betas=(0.8, 0.95), warmup_steps=2, max_grad_norm=None)
    tensor = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    parameters = ParameterSet("student", [tensor], spec, 0.3)
    value, m, v = 0.0, 0.0, 0.0
    for step, gradient in enumerate([2.0, -1.0, 0.5, 4.0], start=1):
        parameters.ascend(Vector([torch.tensor([gradient], dtype=torch.float64)]))
        m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient**2
        rate = 0.3 * min(1.0, step / 3)
        value += rate * (m / (1 - 0.8**step)) / ((v / (1 - 0.95**step)) ** 0.5 + 1e-8)
        assert tensor.item() == pytest.approx(value, rel=1e-9)


def test_clipping_keeps_the_direction_and_limits_the_length():
    tensor = torch.nn.Parameter(torch.zeros(2))
    parameters = ParameterSet("s", [tensor], OptimizerSpec(name="sgd", max_grad_norm=1.0), 1.0)
    assert parameters.ascend(Vector([torch.tensor([3.0, 4.0])])) == pytest.approx(5.0)
    torch.testing.assert_close(tensor.detach(), torch.tensor([0.6, 0.8]))
