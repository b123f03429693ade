"""When memory runs out, the error names what is left to lower, the cheapest first."""

import errno
import os
import signal

import pytest
import torch

from bridge_engine import run
from bridge_engine.events import EXIT_FAILED, EventReader
from bridge_engine.methods.bridge import BridgeOptions
from bridge_engine.process.memory import is_out_of_memory, levers, memory_advice, out_of_memory
from bridge_engine.spec.train import TrainSpec
from tests.support.tiny import tiny_spec


def test_an_allocation_that_the_machine_refuses_is_recognised():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 55)
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
    ids=["CUDA", "driver", "cuBLAS", "cuDNN", "C++", "system"],
)
def test_memory_that_runs_out_outside_torchs_allocator_is_recognised(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ValueError("CUDA error: out of memory"),
    ],
    ids=["access", "cuBLAS", "disk", "a value"],
)
def test_what_is_no_lack_of_memory_is_not_taken_for_one(error):
    assert not is_out_of_memory(error)


def test_the_error_names_the_first_field_to_lower():
    error = out_of_memory(tiny_spec(BridgeOptions()))
    assert (error.category, error.code, error.param) == (
        "oom",
        "out_of_memory",
        "runtime.micro_batch",
    )
    assert "runtime.gradient_checkpointing: set to true" in error.message


def test_the_jobs_error_names_the_step_and_its_log_has_the_sizes(tmp_path, monkeypatch, capsys):
    def train(spec, *_):
        try:
            raise RuntimeError("CUDA error: out of memory: tried 3 GiB")
        except RuntimeError as error:
            raise out_of_memory(spec, 7) from error

    monkeypatch.setattr(run, "_run", train)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    spec = tmp_path / "spec.json"
    spec.write_text(tiny_spec(BridgeOptions()).model_dump_json(by_alias=True))
    assert run.run(spec, tmp_path / "run") == EXIT_FAILED
    (failure,) = EventReader(tmp_path / "run" / "events.jsonl").read()
    assert (failure.code, failure.category, failure.step) == ("out_of_memory", "oom", 7)
    assert failure.message.startswith("at step 7: memory ran out; try in this order: runtime.")
    assert "tried 3 GiB" in capsys.readouterr().err


def test_memory_advice_names_what_is_left_to_lower_cheapest_first():
    spec = tiny_spec(BridgeOptions())
    fields = [field for field, _ in levers(spec)]
    assert fields[:4] == [
        "runtime.micro_batch",
        "runtime.gradient_checkpointing",
        "rollout.batch_size",
        "rollout.max_new_tokens",
    ]
    assert "student.shadow_offload" not in fields
    assert "runtime.micro_batch: lower it (now 64)" in memory_advice(spec)


def test_memory_advice_leaves_out_what_is_lowered_already():
    spec = tiny_spec("sft", micro_batch=1, gradient_checkpointing=True, padding_free=True)
    fields = [field for field, _ in levers(spec)]
    assert fields[0] == "runtime.padding_free"
    assert "runtime.micro_batch" not in fields
    assert "runtime.gradient_checkpointing" not in fields
    assert not any(field.startswith("rollout") for field in fields)


def test_memory_advice_for_a_full_student_names_its_shadow():
    given = tiny_spec(BridgeOptions()).model_dump(mode="json", by_alias=True)
    offloaded = {**given, "student": {"form": "full", "shadow_offload": True}}
    fields = [
        [f for f, _ in levers(TrainSpec.model_validate(s))]
        for s in ({**given, "student": "full"}, offloaded)
    ]
    assert "student.shadow_offload" in fields[0]
    assert "student.shadow_offload" not in fields[1]


def test_every_lever_is_a_field_of_the_spec():
    given = tiny_spec(BridgeOptions(), dtype="float32", padding_free=True).model_dump()
    given["student"]["form"] = "full"
    for field, _ in levers(TrainSpec.model_validate(given)):
        section, name = field.split(".")
        assert name in given[section]
