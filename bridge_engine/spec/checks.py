"""Can a spec's job be run? Whether its names can be had, and what they imply.

Imports no torch: the service asks on every POST /jobs. `bridge_engine.spec.train` refuses what is
wrong in itself; this page refuses what is wrong about the names in it, and fills the defaults that
depend on them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from bridge_engine.data import arithmetic, registry
from bridge_engine.data.registry import DatasetInfo, Role
from bridge_engine.errors import EngineError
from bridge_engine.models.catalog import ModelInfo, model_names, resolve_model
from bridge_engine.models.known import KNOWN
from bridge_engine.spec.errors import FieldError, nearest_name, unknown_name
from bridge_engine.spec.train import DatasetRef, RuntimeSpec, TemplateSpec, TrainSpec

ROLES: tuple[Role, ...] = ("prompts", "demos", "eval")


def _given(spec: TrainSpec) -> Iterator[tuple[Role, DatasetRef]]:
    for role in ROLES:
        ref: DatasetRef | None = getattr(spec.data, role)
        if ref is not None:
            yield role, ref


def check_spec(spec: TrainSpec) -> list[FieldError]:
    """Everything wrong about the names in a spec, and about what they imply. Empty: it can run."""
    errors: list[FieldError] = []
    known: dict[Role, DatasetInfo] = {}
    for role, ref in _given(spec):
        found, info = check_dataset(role, ref, f"data.{role}")
        errors += found
        if info is not None:
            known[role] = info
    if not errors:
        errors += _check_held_out(spec, known)
        errors += _check_pairs(spec, known)
    found, model = check_model(spec.model)
    errors += found
    if model is not None:
        errors += _check_lengths(spec, model)
        errors += _check_layers(spec, model)
        errors += check_template(spec.template, model, "template.kind")
        errors += _check_rank(spec, model)
    return [*errors, *check_attention(spec.runtime)]


def check_model(name: str) -> tuple[list[FieldError], ModelInfo | None]:
    """What is known of a base model; the error where nothing is."""
    try:
        return [], resolve_model(name)
    except EngineError as error:
        near = nearest_name(name, model_names())
        unknown = error.code == "unknown_model"
        return [
            FieldError(
                "model",
                error.code,
                error.message,
                given=name,
                allowed=model_names() if unknown else None,
                nearest=near if unknown else None,
            )
        ], None


def check_dataset(
    role: Role, ref: DatasetRef, where: str
) -> tuple[list[FieldError], DatasetInfo | None]:
    """What is wrong with the dataset that the field `where` names, and what is known of it."""
    try:
        info = registry.info(ref.name)
    except EngineError as error:
        if error.code == "unknown_dataset" and not ref.name.startswith(("ds_", "hub:")):
            return [unknown_name(f"{where}.name", "dataset", ref.name, registry.names())], None
        return [FieldError(f"{where}.name", error.code, error.message, given=ref.name)], None
    split = ref.split or info.default_splits.get(role)
    if split is None:
        return [
            FieldError(
                f"{where}.split",
                "split_required",
                f"{ref.name} has no split that is meant for {role}; if you want one of "
                f"{', '.join(info.splits)} for it, name it: {ref.name}/{info.splits[0]}"
                if info.splits
                else f"{ref.name} has no data files that can be read (Parquet, JSON Lines)",
                allowed=list(info.splits),
            )
        ], None
    if split not in info.splits:
        return [unknown_name(f"{where}.split", "split", split, info.splits)], None
    errors = _check_kinds(where, ref, info)
    if info.source == "generated" and (ref.limit or 0) > arithmetic.MOST:
        errors.append(
            FieldError(
                f"{where}.limit",
                "limit_too_large",
                f"{where}.limit is {ref.limit}, and {ref.name} makes at most {arithmetic.MOST}",
                given=ref.limit,
            )
        )
    try:
        registry.check_available(ref.name, split)
        solutions = _has_solutions(info, split) if role == "demos" else True
    except EngineError as error:
        return [
            *errors,
            FieldError(f"{where}.name", error.code, error.message, given=ref.name),
        ], None
    if not solutions:
        errors.append(
            FieldError(
                f"{where}.name",
                "no_solutions",
                f"{ref.name} has answers but no worked solutions, so there is nothing to imitate; "
                "use it for prompts or eval, or give demos a dataset with solutions",
                given=ref.name,
                allowed=[name for name in registry.names() if registry.info(name).has_solutions],
            )
        )
    return errors, info


def _check_kinds(where: str, ref: DatasetRef, info: DatasetInfo) -> list[FieldError]:
    if ref.kinds is None:
        return []
    if not ref.kinds:
        message = "kinds must name at least one kind; leave it out for all of them"
        return [FieldError(f"{where}.kinds", "invalid_kinds", message)]
    if len(set(ref.kinds)) < len(ref.kinds):
        message = f"kinds names one kind twice: {', '.join(ref.kinds)}"
        return [FieldError(f"{where}.kinds", "invalid_kinds", message)]
    if info.source == "file" and info.kinds is None:
        message = f"{info.name} has no kinds; leave kinds out"
        return [FieldError(f"{where}.kinds", "invalid_kinds", message)]
    if info.kinds is None:
        return []
    unknown = [kind for kind in ref.kinds if kind not in info.kinds]
    return [unknown_name(f"{where}.kinds", "kind", kind, info.kinds) for kind in unknown]


def _has_solutions(info: DatasetInfo, split: str) -> bool:
    if info.source != "upload":
        return info.has_solutions is not False
    from bridge_engine.data.datasets import first_row

    return first_row(registry.uploaded_file(info.name)).solution is not None


def _check_held_out(spec: TrainSpec, known: Mapping[Role, DatasetInfo]) -> list[FieldError]:
    """Problems that are trained on say nothing about problems that are not."""
    held_out = spec.data.eval
    if held_out is None:
        return []
    info = known["eval"]
    for role, ref in _given(spec):
        if role == "eval" or ref.name != held_out.name:
            continue
        one = ref.split or known[role].default_splits[role]
        other = held_out.split or info.default_splits["eval"]
        if shared(_filled(ref, one), _filled(held_out, other), info):
            hint = (
                f" (of an upload, {ref.name}/{registry.REST} to train on and "
                f"{ref.name}/{registry.TENTH} to measure on)"
                if info.source == "upload"
                else ""
            )
            return [
                FieldError(
                    "data.eval",
                    "eval_is_training_data",
                    f"data.eval ({held_out.name}/{other}) shares problems with data.{role} "
                    f"({ref.name}/{one}): accuracy on problems that are trained on measures "
                    f"memory; evaluate on another split{hint}, other kinds or another dataset",
                    given=f"{held_out.name}/{other}",
                    allowed=[s for s in info.splits if not info.share_problems(one, s)],
                )
            ]
    return []


def shared(one: DatasetRef, other: DatasetRef, info: DatasetInfo) -> bool:
    """Can two parts of one dataset, whose splits are named, have a problem in common?"""
    apart = one.kinds and other.kinds and not set(one.kinds) & set(other.kinds)
    return info.share_problems(str(one.split), str(other.split)) and not apart


def _filled(ref: DatasetRef, split: str) -> DatasetRef:
    return ref.model_copy(update={"split": split})


def _check_pairs(spec: TrainSpec, known: Mapping[Role, DatasetInfo]) -> list[FieldError]:
    """A paired method explores problems that have a demonstration: can there be any?"""
    prompts, demos = spec.data.prompts, spec.data.demos
    if not spec.method.paired or prompts is None or demos is None or prompts.name != demos.name:
        return []  # two data sets may hold the same problems; the engine reads them and knows
    one = prompts.split or known["prompts"].default_splits["prompts"]
    other = demos.split or known["demos"].default_splits["demos"]
    if shared(_filled(prompts, one), _filled(demos, other), known["demos"]):
        return []
    return [
        FieldError(
            "data.prompts",
            "no_pairs",
            f"method {spec.method.name} explores problems that have a demonstration, and "
            f"{prompts.name}/{one} shares none with data.demos ({demos.name}/{other}); name the "
            "same problems for both",
            given=f"{prompts.name}/{one}",
            allowed=[s for s in known["demos"].splits if known["demos"].share_problems(s, other)],
        )
    ]


def check_room(param: str, given: int | None, model: ModelInfo) -> list[FieldError]:
    """A completion of so many tokens leaves no room for a prompt?"""
    if given is None or given < model.context:
        return []
    return [
        FieldError(
            param,
            "longer_than_context",
            f"{param} is {given}, but {model.name} reads at most {model.context} tokens, "
            "prompt and completion together: leave room for the prompt",
            given=given,
        )
    ]


def _check_lengths(spec: TrainSpec, model: ModelInfo) -> list[FieldError]:
    errors = check_room("rollout.max_new_tokens", spec.rollout.max_new_tokens, model)
    errors += check_room("eval.max_new_tokens", spec.eval.max_new_tokens, model)
    limit = spec.sft.max_tokens
    if limit is not None and limit > model.context:
        errors.append(
            FieldError(
                "sft.max_tokens",
                "longer_than_context",
                f"sft.max_tokens is {limit}, but {model.name} reads at most {model.context} tokens",
                given=limit,
            )
        )
    return errors


_LLAMA_LIKE = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_LLAMA_LAYERS = frozenset(
    {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
)


def _check_layers(spec: TrainSpec, model: ModelInfo) -> list[FieldError]:
    """The layers that get adapters, where the model's config tells; the engine knows the rest."""
    if (
        model.config.get("model_type") not in _LLAMA_LIKE
        or spec.lora.target_modules == "all-linear"
    ):
        return []
    return [
        unknown_name("lora.target_modules", "linear layer", layer, _LLAMA_LAYERS)
        for layer in spec.lora.target_modules
        if layer not in _LLAMA_LAYERS
    ]


def check_template(template: TemplateSpec, model: ModelInfo, param: str) -> list[FieldError]:
    """A chat template that the model has not, where its own files tell."""
    if template.kind != "chat" or has_chat_template(model):
        return []
    return [
        FieldError(
            param,
            "no_chat_template",
            f"the tokenizer of {model.name} has no chat template; use plain or auto",
            given="chat",
            allowed=["plain", "auto"],
        )
    ]


def has_chat_template(model: ModelInfo) -> bool:
    """Does its tokenizer have a chat template? True where nobody can tell yet: of a model on the
    hub whose tokenizer has not been downloaded, and that is not known by heart."""
    folder = model.path
    if folder is not None:
        if (folder / "chat_template.jinja").is_file():
            return True
        file = folder / "tokenizer_config.json"
        if file.is_file():
            return bool(json.loads(file.read_text("utf-8")).get("chat_template"))
        if model.source != "hub":  # such a folder is whole
            return False
    return model.name not in KNOWN or KNOWN[model.name].chat_template


def _check_rank(spec: TrainSpec, model: ModelInfo) -> list[FieldError]:
    """No difference of two weight matrices has a rank above their shorter side."""
    rank, hidden = spec.export.svd_rank, model.config.get("hidden_size")
    if rank is None or not isinstance(hidden, int) or rank <= hidden:
        return []
    return [
        FieldError(
            "export.svd_rank",
            "rank_too_large",
            f"export.svd_rank is {rank}, but the layers of {model.name} are {hidden} wide: no "
            f"change of theirs has a rank above {hidden}; ask for fewer, or for export.merged, "
            "which is exact",
            given=rank,
        )
    ]


def check_attention(runtime: RuntimeSpec) -> list[FieldError]:
    """Flash attention is a kernel of CUDA's, for 16 bits."""
    if runtime.attention != "flash_attention_2":
        return []
    if runtime.device == "cpu":
        why, code = "runtime.device is cpu, and flash attention runs on a GPU", "needs_gpu"
    elif runtime.dtype == "float32":
        why, code = (
            "runtime.dtype is float32, and flash attention computes in 16 bits",
            "needs_bfloat16",
        )
    else:
        return []
    return [
        FieldError(
            "runtime.attention",
            code,
            f"{why}; use auto or sdpa",
            given="flash_attention_2",
            allowed=["auto", "sdpa", "eager"],
        )
    ]


def resolve_spec(spec: TrainSpec) -> TrainSpec:
    """The spec with every default filled in that depends on the names in it.

    Resolving twice changes nothing. EngineError (the first of `check_spec`) if it cannot run.
    """
    errors = check_spec(spec)
    if errors:
        raise EngineError(errors[0].message, code=errors[0].code, param=errors[0].param)
    return fill_defaults(spec)


def fill_defaults(spec: TrainSpec) -> TrainSpec:
    """The defaults of a spec in which `check_spec` has found nothing wrong."""
    resolved = spec.model_copy(deep=True)
    for role, ref in _given(resolved):
        fill_dataset(ref, role)
    resolved.sft.max_tokens = resolved.sft.max_tokens or resolve_model(spec.model).context
    resolved.eval.max_new_tokens = resolved.eval.max_new_tokens or resolved.rollout.max_new_tokens
    return resolved


def fill_dataset(ref: DatasetRef, role: Role) -> None:
    """Writes into the reference which part of the dataset is meant."""
    ref.split = ref.split or registry.info(ref.name).default_splits[role]
    if ref.name == registry.ARITHMETIC:
        ref.limit = ref.limit or arithmetic.DEFAULT_LIMIT[ref.split]
        ref.kinds = ref.kinds or list(arithmetic.default_kinds(ref.split))
