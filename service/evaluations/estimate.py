"""What an evaluation will cost: one pass of sampling over all problems.

    rollouts   = Σ problems × samples           (sets whose size nobody knows yet count as 0)
    max tokens = rollouts × max_new_tokens

Memory and time by the formulas of a training job's sampling (`service.jobs.memory`, `.duration`).
"""

from __future__ import annotations

from bridge_engine.data import registry
from bridge_engine.evaluation.checks import problems_known
from bridge_engine.evaluation.spec import EvalSet, EvaluationSpec
from bridge_engine.models.catalog import ModelInfo
from bridge_engine.models.shapes import Shape, shape_of
from service.jobs.duration import DEVICES, Sampled, Work
from service.jobs.estimate import Estimates, MemoryParts, rounded
from service.jobs.lengths import CHAT, mean_problem
from service.jobs.memory import PROCESS, scalar_bytes
from service.store import NotFound, Store

_SHARES = {registry.TENTH: 0.1, registry.REST: 0.9}
"""Of an upload's rows, in its splits: about so many."""


def problems(spec: EvaluationSpec, store: Store) -> int:
    """Problems of all sets, as far as that is known before they are read."""
    return sum(_problems(one, store) for one in spec.benchmarks)


def _problems(one: EvalSet, store: Store) -> int:
    known = problems_known(one)
    if one.name.startswith("ds_"):
        try:
            rows = round(store.get_dataset(one.name).rows * _SHARES.get(one.split or "", 1))
        except NotFound:
            return 0
        return min(one.limit or rows, rows)
    return known or 0


def estimate(spec: EvaluationSpec, model: ModelInfo, store: Store) -> Estimates:
    """The estimates of a resolved spec."""
    counts = [_problems(one, store) for one in spec.benchmarks]
    asked = [n * spec.samples_of(one) for n, one in zip(counts, spec.benchmarks, strict=True)]
    limit, rollouts = spec.sampling.max_new_tokens or 0, sum(asked)
    shape = shape_of(model)
    parts = _memory(spec, shape, limit) if shape else None
    work = _work(spec, shape, counts, asked, limit) if shape else None
    return Estimates(
        steps=sum(counts),
        rollouts=rollouts,
        max_tokens=rollouts * limit,
        model_parameters=model.parameters,
        adapter_parameters=0,
        exported_rank=None,
        memory_bytes=(
            parts.process + parts.base + parts.trained + parts.sampling if parts else None
        ),
        memory=parts,
        flops=rounded(work.flops) if work else None,
        seconds=_seconds(spec, work) if work else None,
    )


def _prompt(one: EvalSet, spec: EvaluationSpec) -> int:
    """Tokens of a usual prompt of the set."""
    template = spec.template_of(one)
    around = 0 if template.kind == "plain" or one.name == "arithmetic" else CHAT
    around += (len(template.system or "") + len(template.suffix)) // 4
    return mean_problem(one) + around


def _memory(spec: EvaluationSpec, shape: Shape, limit: int) -> MemoryParts:
    width = scalar_bytes(spec.runtime)
    rows, length = spec.sampling.batch_size, limit + max(_prompt(o, spec) for o in spec.benchmarks)
    cache = rows * length * 2 * shape.layers * shape.keys * width
    logits = rows * shape.vocabulary * (4 + 4 + 8)
    merges = spec.adapter is not None and spec.sampling.merge_weights
    merged = shape.linear_parameters() * width if merges else 0
    return MemoryParts(
        process=PROCESS,
        base=shape.parameters * width,
        trained=0,
        sampling=cache + logits + merged if spec.sampling.engine == "native" else 0,
        training=0,
        host=0,
    )


def _work(
    spec: EvaluationSpec, shape: Shape, counts: list[int], asked: list[int], limit: int
) -> Work:
    width, batch = scalar_bytes(spec.runtime), spec.sampling.batch_size
    parts = [
        Sampled(
            prompts=count,
            prompt=_prompt(one, spec),
            rows=rows,
            written=limit / 2,
            batches=-(-rows // batch),
            longest=limit,
        )
        for one, count, rows in zip(spec.benchmarks, counts, asked, strict=True)
    ]
    return Work(
        sampling_flops=sum(part.flops(shape) for part in parts),
        sampling_bytes=sum(part.bytes(shape, width) for part in parts),
        sampling_blocks=sum(part.blocks(shape) for part in parts),
        pass_flops=0,
        pass_blocks=0,
    )


def _seconds(spec: EvaluationSpec, work: Work) -> dict[str, float]:
    launches = spec.sampling.engine == "native"
    full = spec.runtime.dtype == "float32"
    on_core = scalar_bytes(spec.runtime)
    return {
        name: rounded(
            work.seconds(
                device,
                width=4 if full else on_core if name == "cpu_core" else 2,
                launches=launches,
            )
        )
        for name, device in DEVICES.items()
    }
