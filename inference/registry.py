"""What is loaded: base models, and the adapters that stand on them.

Of each only so many are kept; the one that was asked for the longest ago makes room. Nothing is
lost by that: a base model is loaded again when it is named, and who asks for an adapter that is not
here (404) loads it and asks again.

Every method runs on the generation thread, one at a time: loading, choosing an adapter and
generating never overlap, so one request can never see another's adapter, and what makes room is
never in use.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from bridge_engine.errors import EngineError
from inference.errors import InferenceError, not_found

MAX_ADAPTERS = 32
MAX_BASES = 2

Kept = TypeVar("Kept")


@dataclass
class Base:
    """A base model in memory. `model` is the bare one until the first adapter wraps it."""

    name: str
    path: Path
    model: Any
    tokenizer: Any
    context: int
    """Tokens of prompt and completion together."""
    loaded_at: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter. Its name means these bytes for ever."""

    name: str
    path: Path
    base: Base
    slot: str
    """PEFT's name for it: adapter names may hold characters that module names may not."""
    loaded_at: float


class Registry:
    """Base models on demand by name, adapters by explicit load."""

    def __init__(
        self,
        materialize: Callable[[str], Path],
        device: str = "auto",
        *,
        max_adapters: int = MAX_ADAPTERS,
        max_bases: int = MAX_BASES,
    ) -> None:
        self._materialize = materialize
        self._max_adapters = max_adapters
        self._max_bases = max_bases
        self.device = (
            ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        )
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        # Both in the order of their last use, the latest at the end.
        self.bases: dict[str, Base] = {}
        self.adapters: dict[str, Adapter] = {}
        self._slots = 0

    def base(self, name: str) -> Base:
        """The base model of that name, loaded on first use."""
        if name in self.bases:
            return _used(self.bases, name)
        try:
            path = self._materialize(name)
        except EngineError as error:
            raise not_found(error.message) from error
        while len(self.bases) >= self._max_bases:  # before loading: both might not fit
            self._drop_base(next(iter(self.bases)))
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=self.dtype, use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise InferenceError(
                f"The base model {name!r} could not be loaded from {path}: {error}",
                status=500,
                type="InternalServerError",
                param="model",
            ) from error
        model.to(self.device).eval().requires_grad_(False)
        base = Base(name, path, model, tokenizer, _context(model.config, tokenizer))
        self.bases[name] = base
        return base

    def load_adapter(self, name: str, path: Path, base_model: str | None) -> Adapter:
        """Loads the adapter at `path` under `name`; the same name and path again is no error.

        Raises `InferenceError`: 400 for a used name with another path, a missing or broken folder,
        weights that do not fit the base; 404 for an unknown base model.
        """
        known = self.adapters.get(name)
        if known is not None:
            if known.path == path:
                _used(self.bases, known.base.name)
                return _used(self.adapters, name)
            raise InferenceError(
                f"The adapter name {name!r} is already loaded from {known.path}. Names are never "
                "reused, because cached results of the old weights would answer for the new ones: "
                "load it under another name.",
                param="lora_name",
            )
        if name in self.bases:
            raise InferenceError(f"{name!r} is the name of a base model.", param="lora_name")
        base = self.base(_checked_base(path, base_model))
        self._slots += 1
        slot = f"slot{self._slots}"
        try:
            _attach(base, path, slot)
        except Exception as error:  # whatever PEFT or safetensors make of damaged files
            self._undo_attach(base, slot)
            raise InferenceError(
                f"The adapter at {path} does not fit the base model {base.name!r}: {error}",
                param="lora_path",
            ) from error
        adapter = Adapter(name, path, base, slot, time.time())
        self.adapters[name] = adapter
        while len(self.adapters) > self._max_adapters:
            self.unload_adapter(next(iter(self.adapters)))
        return adapter

    def _undo_attach(self, base: Base, slot: str) -> None:
        """After a failed load: the base is as it was, or is loaded anew when next asked for."""
        if any(adapter.base is base for adapter in self.adapters.values()):
            _detach(base, slot)
        else:  # PEFT had begun to rewrite the bare model in place
            del self.bases[base.name]

    def unload_adapter(self, name: str) -> None:
        """Frees the adapter. Its name stays free to be loaded again."""
        adapter = self.adapters.pop(name, None)
        if adapter is None:
            raise not_found(f"No adapter named {name!r} is loaded.")
        _detach(adapter.base, adapter.slot)

    def _drop_base(self, name: str) -> None:
        """Frees the base model and all that stands on it."""
        self.adapters = {n: a for n, a in self.adapters.items() if a.base.name != name}
        del self.bases[name]
        gc.collect()  # modules and their hooks point at each other
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def find(self, name: str) -> Base | Adapter:
        """The loaded adapter, or the base model, of that name."""
        if name in self.adapters:
            adapter = _used(self.adapters, name)
            _used(self.bases, adapter.base.name)
            return adapter
        if "@" in name:  # JOB@STEP: never a base model's name
            raise not_found(f"No adapter named {name!r} is loaded.")
        return self.base(name)

    @contextmanager
    def active(self, target: Base | Adapter) -> Iterator[Any]:
        """The model with exactly this adapter (or none) switched on."""
        if isinstance(target, Adapter):
            target.base.model.set_adapter(target.slot)
            target.base.model.requires_grad_(False)
            yield target.base.model
        elif isinstance(target.model, PeftModel):
            with target.model.disable_adapter():
                yield target.model
        else:
            yield target.model


def _used(kept: dict[str, Kept], name: str) -> Kept:
    """What is kept under the name, now the latest used."""
    kept[name] = kept.pop(name)
    return kept[name]


def _checked_base(path: Path, base_model: str | None) -> str:
    """The adapter's base model; checks the folder and, where the folder names it, the base."""
    weights = path / "adapter_model.safetensors"
    if not (path / "adapter_config.json").is_file() or not weights.is_file():
        raise InferenceError(
            f"No adapter lies at {path}: adapter_config.json and adapter_model.safetensors are "
            "needed (weights in any other format are refused).",
            param="lora_path",
        )
    card = path / "bridge.json"
    trained_on = None
    try:
        if card.is_file():
            trained_on = json.loads(card.read_text(encoding="utf-8")).get("base_model")
    except (ValueError, AttributeError) as error:
        raise InferenceError(f"{card} is not readable: {error}", param="lora_path") from error
    if trained_on and base_model and trained_on != base_model:
        raise InferenceError(
            f"The adapter at {path} was trained on {trained_on!r}, not on {base_model!r}.",
            param="base_model",
        )
    name = base_model or trained_on
    if not name:
        raise InferenceError(
            "The adapter's folder does not say which base model it belongs to: name base_model.",
            param="base_model",
        )
    return str(name)


def _attach(base: Base, path: Path, slot: str) -> None:
    """Puts the adapter beside the others on its base; weights that find no place are an error."""
    if not isinstance(base.model, PeftModel):
        base.model = PeftModel.from_pretrained(base.model, path, adapter_name=slot)
    else:
        base.model.load_adapter(path, adapter_name=slot)
    expected = {
        key.replace(f".{slot}.", ".") for key in base.model.state_dict() if f".{slot}." in key
    }
    given = _weight_names(path / "adapter_model.safetensors")
    if given != expected:
        odd = sorted(given ^ expected)[:3]
        raise ValueError(f"its weights are not those its adapter_config.json describes: {odd}")
    base.model.eval().requires_grad_(False)


def _detach(base: Base, slot: str) -> None:
    model = base.model
    if not isinstance(model, PeftModel) or slot not in model.peft_config:
        return
    if len(model.peft_config) == 1:
        base.model = model.unload()
    else:
        other = next(name for name in model.peft_config if name != slot)
        model.set_adapter(other)
        model.delete_adapter(slot)


def _weight_names(path: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def _context(config: Any, tokenizer: Any) -> int:
    """Longest sequence the model knows positions for."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    limit = int(tokenizer.model_max_length)
    return limit if limit < 1_000_000 else 2048
