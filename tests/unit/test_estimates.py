"""What an estimate says of memory and arithmetic is what torch counts when it is done."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from bridge_engine.forward import logprobs
from bridge_engine.models.catalog import ModelInfo
from bridge_engine.models.shapes import Shape, shape_of
from bridge_engine.parameters import ParameterSet
from bridge_engine.policy import Policy
from bridge_engine.spec.train import TrainSpec
from bridge_engine.vector import Vector
from service.jobs.duration import DEVICES, work
from service.jobs.estimate import estimate
from service.jobs.lengths import lengths
from service.jobs.memory import KEPT_LOGITS, LOGIT, LOGITS_AT_ONCE, Memory, memory

SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
CONTEXT = 512


def spec(**changes: Any) -> TrainSpec:
    data = {"prompts": "gsm8k", "demos": "gsm8k"}
    return TrainSpec.model_validate({"method": "bridge", "data": data, **changes})


def policy(dtype: torch.dtype = torch.float32, given: TrainSpec | None = None) -> Policy:
    """A model of the sizes above with the adapters of the method."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, eos_token_id=1)).to(dtype)
    tokenizer = SimpleNamespace(eos_token_id=1, pad_token_id=0, chat_template=None)
    given = given or spec()
    made = Policy(model, tokenizer, given.lora)
    for name in given.method.adapters:
        made.adapters.add(name, 0)
    return made


@pytest.fixture(scope="module")
def info() -> ModelInfo:
    parameters = sum(p.numel() for p in policy().model.parameters() if not p.requires_grad)
    return ModelInfo("mine", "folder", CONTEXT, parameters, None, SIZES)


@pytest.fixture(scope="module")
def shape(info: ModelInfo) -> Shape:
    found = shape_of(info)
    assert found is not None
    return found


# --------------------------------------------------------------------------- memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_blocks_activations_are_what_torch_saves_for_its_backward(
    shape: Shape, dtype: torch.dtype
) -> None:
    tokens, width = 256, dtype.itemsize
    made = policy(dtype)
    weights = {p.untyped_storage().data_ptr() for p in made.model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    given = spec(method="sft", sft={"batch_size": 1, "max_tokens": tokens}, lora={"rank": 1})
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), made.using("student"):
        # `hidden` lives as long as the graph: no storage is freed and counted under a new one
        hidden = made.model.base_model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    assert hidden is not None
    block = 4 * shape.ffn + 6 * shape.hidden + 3 * shape.queries + 2 * shape.keys
    ours = _activations(given, shape, width, tokens)
    assert ours == tokens * shape.layers * block * width
    assert sum(saved.values()) == pytest.approx(ours, rel=0.15)


def _activations(given: TrainSpec, shape: Shape, width: int, tokens: int) -> int:
    """What is left of `training` without gradients and logits, for demonstrations of `tokens`."""
    dtype = {2: "bfloat16", 4: "float32"}[width]
    given = given.model_copy(update={"runtime": given.runtime.model_copy(update={"dtype": dtype})})
    given.data.demos = given.data.demos.model_copy(update={"name": "math"})  # type: ignore[union-attr]
    adapter = shape.adapter_parameters(given.lora.rank, "all-linear")
    logits = tokens * shape.vocabulary * LOGIT
    return memory(given, shape, CONTEXT).training - 4 * adapter - logits


def test_weights_moments_and_gradient_are_16_bytes_a_parameter_of_a_full_student(
    shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = memory(spec(method="sft", student="full"), shape, CONTEXT)
    monkeypatch.setattr("service.jobs.memory.KEPT_LOGITS", 0)
    tensors = [torch.nn.Parameter(torch.zeros(5, 7))]
    held = ParameterSet("student", tensors, spec().optimizer, 1e-3)
    held.ascend(Vector([torch.ones(5, 7)]))
    states = [v for v in held.optimizer.state[tensors[0]].values() if v.numel() > 1]
    resting = sum(t.nbytes for t in (*tensors, *states)) // 35
    assert resting == 12

    lora, full = (memory(spec(method="sft", student=s), shape, CONTEXT) for s in ("lora", "full"))
    adapter = shape.adapter_parameters(8, "all-linear")
    assert lora.trained == resting * adapter
    assert full.trained == resting * shape.parameters
    assert full.training - lora.training == 4 * (shape.parameters - adapter)
    kept = few.training - full.training
    assert kept > 0
    assert kept % (4 * shape.vocabulary) == 0, "logits that are few are kept, 4 bytes each"
    assert (lora.base, full.base) == (4 * shape.parameters, 0)
    reference = spec(method="rl", student="full", rl={"kl_coef": 0.1})
    assert memory(reference, shape, CONTEXT).base == 4 * shape.parameters
    sgd = spec(method="sft", student="full", optimizer={"name": "sgd"})
    assert memory(sgd, shape, CONTEXT).trained == 4 * shape.parameters


def test_the_shadow_of_a_full_student_is_a_second_model_that_can_be_halved_or_moved_away(
    shape: Shape,
) -> None:
    def of(method: str, **student: Any) -> Memory:
        return memory(spec(method=method, student={"form": "full", **student}), shape, CONTEXT)

    one, whole = of("rl"), of("bridge")
    weights, teacher = shape.parameters, shape.adapter_parameters(8, "all-linear")
    assert whole.trained - one.trained == 12 * (weights + teacher)
    assert whole.training - one.training == 4 * (weights + teacher)
    half = of("bridge", shadow_dtype="bfloat16")
    assert half.trained - one.trained == 6 * weights + 12 * teacher
    away = of("bridge", shadow_offload=True)
    assert away.trained - one.trained == 12 * teacher
    assert away.training - one.training == 8 * weights + 4 * teacher, "value and gradient, to pass"
    assert (away.host, whole.host) == (16 * weights, 0)
    on_cpu = {"form": "full", "shadow_offload": True}
    there = memory(spec(student=on_cpu, runtime={"device": "cpu"}), shape, CONTEXT)
    assert (there.trained, there.host) == (whole.trained, 0), "the host is the device"
    assert of("rl", shadow_offload=True) == one, "no shadow, nothing to move"


def test_the_sampler_holds_a_cache_and_a_merged_copy_of_the_adapted_layers(shape: Shape) -> None:
    made = policy()
    rows, length = 3, 40
    with torch.no_grad():
        cache = made.model(torch.zeros(rows, length, dtype=torch.long), use_cache=True)
    held = sum(
        t.nbytes for layer in cache.past_key_values.layers for t in (layer.keys, layer.values)
    )
    with torch.no_grad(), made.using("student", "teacher", merged=True):
        made.model(torch.zeros(1, 1, dtype=torch.long))
        copies = sum(layer.merged.nbytes for layer in made.adapters.layers.values())  # type: ignore[union-attr]

    new = 64
    rollout = {"prompts_per_step": 1, "group_size": rows, "max_new_tokens": new}
    given = spec(rollout=rollout)
    texts = lengths(given, CONTEXT)
    merged = memory(given, shape, CONTEXT)
    without = memory(spec(rollout={**rollout, "merge_weights": False}), shape, CONTEXT)
    assert merged.sampling - without.sampling == copies
    per_token = held / (rows * length)
    logits = rows * shape.vocabulary * 16
    assert without.sampling == rows * texts.long_rollout * per_token + logits
    on_cpu = memory(spec(rollout=rollout, runtime={"device": "cpu"}), shape, CONTEXT)
    packed = sum(w.nbytes for w in {*_matrices(made), made.model.lm_head.weight})
    assert on_cpu.sampling - without.sampling == packed, "all that decoding multiplies with"
    elsewhere = memory(spec(rollout={**rollout, "engine": "vllm"}), shape, CONTEXT)
    assert elsewhere.sampling == 0
    assert memory(spec(method="sft"), shape, CONTEXT).sampling == 0


def _matrices(made: Policy) -> list[torch.Tensor]:
    return [layer.base.weight for layer in made.adapters.layers.values()]


def test_the_logits_that_exist_at_once_are_as_many_as_in_training() -> None:
    assert LOGITS_AT_ONCE == logprobs.LOGITS_AT_ONCE
    assert KEPT_LOGITS == logprobs.KEPT_LOGITS


def test_what_is_meant_to_save_memory_does(shape: Shape) -> None:
    def training(**changes: Any) -> int:
        return memory(spec(**changes), shape, CONTEXT).training

    plain = training()
    assert training(runtime={"gradient_checkpointing": True}) < 0.6 * plain
    assert training(runtime={"micro_batch": 4}) < 0.3 * plain
    assert training(runtime={"dtype": "bfloat16"}) < 0.7 * plain


# --------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("form", ["lora", "full"])
def test_the_operations_of_a_pass_are_those_torch_counts(shape: Shape, form: str) -> None:
    given = spec(method="sft", steps=1, sft={"batch_size": 2}, student=form, lora={"rank": 1})
    made = policy(torch.float64, given)  # whose products torch's counter knows
    if form == "full":
        made.model.requires_grad_(True)
    texts = lengths(given, CONTEXT)
    prompt = texts.demo - texts.demo_solution
    tokens = torch.zeros(2, texts.demo, dtype=torch.long)

    def counted(backend: SDPBackend) -> int:
        counter = FlopCounterMode(display=False)
        with counter, made.using("student"), sdpa_kernel(backend):
            hidden = made.model.base_model(tokens, use_cache=False).last_hidden_state
            logits = made.model.get_output_embeddings()(hidden[:, prompt - 1 : -1])
            logits.log_softmax(-1).sum().backward()
        return int(counter.get_total_flops())

    # the CPU's fused attention is not counted at all, the plain one as a whole square
    without, square = counted(SDPBackend.FLASH_ATTENTION), counted(SDPBackend.MATH)
    assert square > 1.2 * without
    done = work(given, shape, CONTEXT)
    assert done.pass_flops == pytest.approx((without + square) / 2, rel=0.03)
    assert done.sampling_flops == 0


def test_each_methods_passes_are_counted(shape: Shape) -> None:
    def passes(**changes: Any) -> float:
        return work(spec(steps=10, **changes), shape, CONTEXT).pass_flops

    sft, rl, bridge = (passes(method=m) for m in ("sft", "rl", "bridge"))
    assert bridge == pytest.approx(sft + 2 * rl)
    assert passes(method="mix") == pytest.approx(sft + rl)
    assert passes(method="cold_start") == pytest.approx((sft + rl) / 2)
    assert passes(method={"name": "bridge", "meta": False}) == pytest.approx(sft + rl)
    assert passes(method={"name": "bridge", "order": "sequential"}) == pytest.approx(2 * bridge)
    assert passes(method="rl", rl={"inner_epochs": 3}) == pytest.approx(3 * rl)
    assert passes(method="rl", rl={"kl_coef": 0.1}) == pytest.approx(1.5 * rl, rel=0.08)
    truncated = {"importance_correction": "truncated"}
    assert passes(method="rl", rl=truncated) == pytest.approx(1.5 * rl, rel=0.08)
    assert passes(method="rl", student="full") == pytest.approx(1.5 * rl, rel=0.08)
    assert passes(method="rl", runtime={"gradient_checkpointing": True}) == pytest.approx(
        1.5 * rl, rel=0.08
    )


def test_sampling_is_the_same_for_every_method_that_explores(shape: Shape) -> None:
    rl, bridge = (work(spec(method=m), shape, CONTEXT) for m in ("rl", "bridge"))
    assert rl.sampling_flops == bridge.sampling_flops > 0
    assert rl.sampling_bytes == bridge.sampling_bytes
    expert = work(spec(method="luffy"), shape, CONTEXT)  # one place in eight is the expert's
    assert expert.sampling_bytes < rl.sampling_bytes


def test_every_device_has_a_duration_and_the_faster_one_the_shorter(info: ModelInfo) -> None:
    seconds = estimate(spec(), info).seconds
    assert seconds is not None
    assert list(seconds) == list(DEVICES)
    assert seconds["cpu_core"] > seconds["a100"] >= seconds["h200"] > 0
    sampler = estimate(spec(rollout={"engine": "vllm"}), info).seconds
    assert sampler is not None
    assert sampler["h200"] < seconds["h200"], "vLLM does not launch block by block"


def test_a_model_of_unknown_shape_has_no_figures_that_would_be_guesses(info: ModelInfo) -> None:
    for config, parameters in (({}, info.parameters), (SIZES, None)):
        unknown = ModelInfo("mine", "hub", CONTEXT, parameters, None, config)
        answer = estimate(spec(), unknown)
        assert answer.memory_bytes is answer.seconds is answer.adapter_parameters is None
        assert answer.rollouts == 100 * 64
        assert answer.exported_rank == 16
