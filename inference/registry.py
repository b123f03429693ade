"""What is loaded: base models, and the adapters for them.

Of each only so many are kept, within a limit of memory; the one that was asked for the longest ago
makes room, unless a request is using it. Nothing is lost by that: a base model is loaded again when
it is named, and who asks for an adapter that is not here (404) loads it and asks again.

All of this lives on the event loop; what takes long (reading files) is done by one other thread,
while requests are answered. An adapter is a set of tensors of its own and is never written into the
base, so loading and dropping one cannot change what another answers.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bridge_engine.data.template import end_tokens
from bridge_engine.errors import EngineError
from bridge_engine.forward import logits
from inference.batch import Batch
from inference.errors import InferenceError, not_found, not_had, too_large
from inference.folders import bytes_of, check_model, checked_base
from inference.limits import Limits
from inference.lora import LoraWeights, read_lora

LOAD_SECONDS = 20.0
"""So long a request waits for a model to be loaded; then it hears when to come back."""

Kept = TypeVar("Kept", "Base", "Adapter")
Result = TypeVar("Result")
log = logging.getLogger(__name__)


@dataclass(eq=False)
class Base:
    """A base model in memory."""

    name: str
    path: Path
    model: Any
    tokenizer: Any
    context: int
    """Tokens of prompt and completion together."""
    batch: Batch
    bytes: int
    loaded_at: float = field(default_factory=time.time)
    pins: int = 0
    """Requests and loads that use it now."""
    pinned: bool = False
    """Never makes room for others; this is one of the pins."""


@dataclass(eq=False)
class Adapter:
    """A loaded adapter. Its name means these bytes for ever."""

    name: str
    path: Path
    base: Base
    weights: LoraWeights
    loaded_at: float = field(default_factory=time.time)
    pins: int = 0
    pinned: bool = False
    """Never makes room for others; this is one of the pins, of its base too."""

    @property
    def bytes(self) -> int:
        """Memory it takes."""
        return self.weights.bytes


class Registry:
    """Base models on demand by name, adapters by explicit load."""

    def __init__(
        self, materialize: Callable[[str], Path], device: str = "auto", limits: Limits | None = None
    ) -> None:
        """`materialize` turns a base model's name into a folder of weights."""
        self._materialize = materialize
        self.limits = limits or Limits()
        self.device = (
            ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        )
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        # Both in the order of their last use, the latest at the end.
        self.bases: dict[str, Base] = {}
        self.adapters: dict[str, Adapter] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="loading")
        self._loads: dict[tuple[str, str], asyncio.Task[Any]] = {}
        self._leaving: list[Base | Adapter] = []
        """Dropped while requests use them: their memory is not free yet."""
        self._freed = asyncio.Event()
        self._making_room = asyncio.Lock()
        self._promised = 0
        """Bytes of the base model that is being read."""

    def close(self) -> None:
        """Ends the loading thread."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------ use

    @contextmanager
    def pinned(self, target: Base | Adapter) -> Iterator[Base]:
        """Within: neither it nor its base makes room for others. Gives the base."""
        base = target.base if isinstance(target, Adapter) else target
        held: list[Base | Adapter] = [base, target] if target is not base else [base]
        for kept in held:
            kept.pins += 1
        try:
            yield base
        finally:
            for kept in held:
                kept.pins -= 1
            self._leaving = [kept for kept in self._leaving if kept.pins]
            self._freed.set()

    async def find(self, name: str) -> Base | Adapter:
        """The loaded adapter, or the base model, of that name."""
        if name in self.adapters:
            adapter = _used(self.adapters, name)
            _used(self.bases, adapter.base.name)
            return adapter
        if "@" in name and name not in self.bases:  # JOB@STEP: no base model's name
            raise not_found(f"No adapter named {name!r} is loaded.")
        return await self.base(name)

    # ------------------------------------------------------------------ base models

    async def base(self, name: str) -> Base:
        """The base model of that name, loaded on first use.

        Raises `InferenceError`: 404 for an unknown name, 503 while it takes long to load, cannot be
        fetched or all that is loaded is in use, 507 where it is larger than may be loaded.
        """
        if name in self.bases:
            return _used(self.bases, name)
        return await self._loaded("base model", name, lambda: self._load_base(name))

    async def load_model(self, name: str, path: Path, *, pinned: bool = False) -> Base:
        """Loads a whole model that was trained. It takes a base model's place, and is forgotten
        when it makes room, unless it is `pinned`. Raises `InferenceError` as `base` does, 400 for a
        folder without one."""
        if name in self.bases:
            base = _used(self.bases, name)
        else:
            check_model(path)
            base = await self._loaded("model", name, lambda: self._load_base(name, path))
        _pin(base, pinned)
        return base

    async def _load_base(self, name: str, folder: Path | None = None) -> Base:
        try:
            path = folder if folder else await self._read(lambda: self._materialize(name))
        except EngineError as error:
            raise not_had(error) from error
        need = await self._read(lambda: bytes_of(path, self.dtype))
        async with self._making_room:  # two at once would find the same room
            await self._room_for_base(name, need)
            self._promised = need
            try:
                base = await self._read(lambda: self._read_base(name, path, need))
            finally:
                self._promised = 0
            self.bases[name] = base
        log.info("loaded %s (%.1f MB)", name, need / 1e6)
        return base

    def _read_base(self, name: str, path: Path, need: int) -> Base:
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=self.dtype, use_safetensors=True, trust_remote_code=False
            )
            model.to(self.device).eval().requires_grad_(False)
            logits.check(model)
        except (OSError, ValueError, EngineError) as error:
            raise InferenceError(
                f"The base model {name!r} could not be loaded from {path}: {error}",
                status=500,
                type="InternalServerError",
                param="model",
            ) from error
        places = max(1, self.limits.cache // _cache_bytes(model, self.dtype))
        ends = _ends(model, tokenizer)
        batch = Batch(model, tokenizer, ends, rows=self.limits.rows, places=places)
        return Base(name, path, model, tokenizer, _context(model.config, tokenizer), batch, need)

    async def _room_for_base(self, name: str, need: int) -> None:
        """Before it is loaded: both might not fit."""
        limit = self.limits.memory
        if limit is not None and need > limit:
            raise too_large(f"The base model {name!r} needs", need, limit, "model")
        while len(self.bases) >= self.limits.bases or self._over(need):
            if (oldest := _unused(self.bases)) is not None:
                self._drop_base(oldest)
            else:
                await self._until_freed()

    def _drop_base(self, name: str) -> None:
        """Frees the base model and all that stands on it."""
        self.adapters = {n: a for n, a in self.adapters.items() if a.base.name != name}
        self._leave(self.bases.pop(name))
        gc.collect()  # modules and their hooks point at each other
        if self.device == "cuda":
            torch.cuda.empty_cache()

    # ------------------------------------------------------------------ adapters

    async def load_adapter(
        self,
        name: str,
        path: Path,
        base_model: str | None,
        sha256: str | None = None,
        *,
        pinned: bool = False,
    ) -> Adapter:
        """Loads the adapter at `path` under `name`; the same name and path again is no error.
        A `pinned` one never makes room for others.

        Raises `InferenceError`: 400 for a used name with another path, a missing or broken folder,
        weights that do not fit the base or are not those of `sha256`; 404 for an unknown base
        model; 503 and 507 as `base` does, or where all adapters that are loaded are in use.
        """
        known = self.adapters.get(name)
        if known is not None:
            if known.path == path:
                _used(self.bases, known.base.name)
                _pin(known, pinned)
                return _used(self.adapters, name)
            raise InferenceError(
                f"The adapter name {name!r} is already loaded from {known.path}. Names are never "
                "reused, because cached results of the old weights would answer for the new ones: "
                "load it under another name.",
                param="lora_name",
            )
        if name in self.bases:
            raise InferenceError(f"{name!r} is the name of a base model.", param="lora_name")
        base_name = checked_base(path, base_model)
        adapter = await self._loaded(
            "adapter", name, lambda: self._load_adapter(name, path, base_name, sha256)
        )
        _pin(adapter, pinned)
        return adapter

    async def _load_adapter(
        self, name: str, path: Path, base_name: str, sha256: str | None
    ) -> Adapter:
        base = await self.base(base_name)
        with self.pinned(base):
            try:
                weights = await self._read(
                    lambda: read_lora(
                        path, base.batch.routing.shapes, self.device, self.dtype, sha256
                    )
                )
            except Exception as error:  # whatever PEFT or safetensors make of damaged files
                raise InferenceError(
                    f"The adapter at {path} does not fit the base model {base.name!r}: {error}",
                    param="lora_path",
                ) from error
            limit, need = self.limits.memory, base.bytes + weights.bytes
            if limit is not None and need > limit:
                what = f"The adapter {name!r} and its base model need"
                raise too_large(what, need, limit, "lora_path")
            while len(self.adapters) >= self.limits.adapters or self._over(weights.bytes):
                if (oldest := _unused(self.adapters)) is not None:
                    del self.adapters[oldest]
                elif self._over(weights.bytes) and (idle := _unused(self.bases)) is not None:
                    self._drop_base(idle)  # another one: its own is pinned
                else:
                    await self._until_freed()
            adapter = self.adapters[name] = Adapter(name, path, base, weights)
            return adapter

    def unload_adapter(self, name: str) -> None:
        """Frees the adapter, or the whole model that was trained, once no request uses it. Its name
        stays free to be loaded again."""
        if name in self.bases and ":" in name:
            self._drop_base(name)
        elif (adapter := self.adapters.pop(name, None)) is not None:
            self._leave(adapter)
        else:
            raise not_found(f"No adapter named {name!r} is loaded.")
        self._freed.set()

    def _leave(self, dropped: Base | Adapter) -> None:
        _pin(dropped, False)
        if dropped.pins:
            self._leaving.append(dropped)

    # ------------------------------------------------------------------ loading

    def _over(self, more: int) -> bool:
        kept = [*self.bases.values(), *self.adapters.values(), *self._leaving]
        limit = self.limits.memory
        taken = sum(k.bytes for k in kept) + self._promised
        return limit is not None and bool(taken) and taken + more > limit

    async def _until_freed(self) -> None:
        """Until a request that used something has ended."""
        self._freed.clear()
        await self._freed.wait()

    async def _read(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, done on the loading thread."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, work)

    async def _loaded(self, kind: str, name: str, load: Callable[[], Awaitable[Result]]) -> Result:
        """What `load` gives; those who ask for the same meanwhile share it. It goes on when they
        tire of waiting, so that it is there when they come back."""
        key = (kind, name)
        task = self._loads.get(key)
        if task is None:
            task = self._loads[key] = asyncio.ensure_future(load())
            task.add_done_callback(lambda done: self._ended(key, done))
        done, _ = await asyncio.wait({task}, timeout=LOAD_SECONDS)
        if not done:
            raise InferenceError(
                f"The {kind} {name!r} is being loaded, or waits for others in use to make room; "
                "try again in a few seconds.",
                status=503,
                type="ServiceUnavailableError",
                param="model",
                retry_after=5,
            )
        result: Result = task.result()
        return result

    def _ended(self, key: tuple[str, str], task: asyncio.Task[Any]) -> None:
        self._loads.pop(key, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("the %s %s was not loaded: %s", *key, error)


def _used(kept: dict[str, Kept], name: str) -> Kept:
    """What is kept under the name, now the latest used."""
    kept[name] = kept.pop(name)
    return kept[name]


def _pin(kept: Base | Adapter, pinned: bool) -> None:
    change = int(pinned) - int(kept.pinned)
    kept.pinned = pinned
    kept.pins += change
    if isinstance(kept, Adapter):
        kept.base.pins += change


def _unused(kept: dict[str, Kept]) -> str | None:
    """The name that was not asked for the longest, among those that nobody uses now."""
    return next((name for name, item in kept.items() if not item.pins), None)


def _cache_bytes(model: Any, dtype: torch.dtype) -> int:
    """Of one token's keys and values in all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    depth = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = torch.empty((), dtype=dtype).element_size()
    return int(2 * config.num_hidden_layers * heads * depth * size)


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a text: those at which training sampled until. None known: it runs on."""
    try:
        return end_tokens(model, tokenizer)
    except EngineError:
        return []


def _context(config: Any, tokenizer: Any) -> int:
    """Longest sequence the model knows positions for."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    limit = int(tokenizer.model_max_length)
    return limit if limit < 1_000_000 else 2048
