"""The exported adapter is the trained policy, for PEFT as for us."""

import copy
import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bridge_engine.events import EventReader
from bridge_engine.export import AdapterCard, export_adapter
from bridge_engine.export.canary import canary
from bridge_engine.export.initial import InitialWeights
from bridge_engine.export.merged import export_merged, merged_weights
from bridge_engine.export.svd import export_svd, low_rank
from bridge_engine.methods.bridge import BridgeOptions
from bridge_engine.models.folders import materialize_model
from bridge_engine.policy import Policy
from bridge_engine.spec.train import LoraSpec, StudentSpec
from tests.support.tiny import full_policy, random_model, random_policy
from tests.support.training import make_trainer


def card(rank):
    return AdapterCard(
        base_model="bridge-tiny",
        method="bridge",
        step=7,
        rank=rank,
        template={"kind": "plain", "system": None, "suffix": ""},
        max_new_tokens=16,
    )


@pytest.mark.parametrize("names", [("student",), ("student", "teacher")])
def test_peft_loads_the_export_and_gives_the_policys_logprobs(names, tmp_path):
    policy = random_policy("student", "teacher", "shadow", dtype=torch.float32, rank=3)
    rank = 3 * len(names)
    export_adapter(policy.adapters, names, tmp_path / "adapter", card(rank))
    theirs = PeftModel.from_pretrained(random_model(torch.float32), str(tmp_path / "adapter"))
    tokens = torch.randint(2, 23, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        bare = policy.model(tokens).logits.log_softmax(-1)
        with policy.using(*names):
            expected = policy.model(tokens).logits.log_softmax(-1)
        actual = theirs(tokens).logits.log_softmax(-1)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    assert (bare - expected).abs().max() > 0.05, "an adapter that does nothing proves nothing"


def test_the_shadow_never_leaves_the_house(tmp_path):
    policy = random_policy("student", "teacher", "shadow", dtype=torch.float32)
    names = BridgeOptions().policy
    export_adapter(policy.adapters, names, tmp_path / "one", card(6))
    with torch.no_grad():
        for parameter in policy.adapters.parameters("shadow"):
            parameter.add_(1.0)
    export_adapter(policy.adapters, names, tmp_path / "two", card(6))
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_export_says_what_it_is(tmp_path):
    policy = random_policy("student", "teacher", dtype=torch.float32, rank=3)
    sha = export_adapter(policy.adapters, ("student", "teacher"), tmp_path / "a", card(6))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (6, 12)
    assert config["base_model_name_or_path"] == "bridge-tiny"
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["adapter_model.safetensors"] == sha
    assert json.loads((tmp_path / "a" / "bridge.json").read_text())["step"] == 7


# --------------------------------------------------------------------------- whole models


def logprobs_of(model, tokens):
    with torch.no_grad():
        return model(tokens).logits.float().log_softmax(-1)


TOKENS = torch.randint(2, 23, (4, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["lora", "full"])
@pytest.mark.parametrize("names", [("student",), ("student", "teacher")])
def test_transformers_loads_the_merged_model_and_gives_the_policys_logprobs(
    names, form, dtype, tmp_path
):
    make = random_policy if form == "lora" else full_policy
    policy = make("student", "teacher", dtype=torch.float32)
    if form == "full":
        moved(policy)
    policy.tokenizer = SavesNothing()
    export_merged(policy, names, tmp_path / "model", card(0), dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert theirs.dtype == dtype
    with policy.using(*names):
        expected = logprobs_of(policy.model, TOKENS)
    error = (logprobs_of(theirs, TOKENS) - expected).abs()
    trained = (logprobs_of(random_model(torch.float32), TOKENS) - expected).abs()
    if dtype == torch.float32:
        assert error.max() < 1e-4 < 0.4 < trained.max()
    else:  # this model's logits spread over ±20, and bfloat16 keeps three digits of them
        assert error.mean() < 0.15 < trained.mean()
    files = {p.name for p in (tmp_path / "model").iterdir()}
    assert {"model.safetensors", "config.json", "bridge.json", "manifest.json"} <= files


class SavesNothing:
    """Stands where the tokenizer stands; the tiny model has none."""

    def save_pretrained(self, folder):
        pass


def moved(policy, by=0.05, only_linear=False):
    """Moves a full student's weights as training would, from its initial ones."""
    rng = torch.Generator().manual_seed(7)
    linear = {f"{path}.base.weight" for path in policy.adapters.layers}
    with torch.no_grad():
        for name, parameter in policy.adapters.base_named_parameters():
            if not only_linear or name in linear:
                parameter.add_(by * torch.randn(parameter.shape, generator=rng))


# --------------------------------------------------------------------------- SVD


@pytest.fixture
def base(tmp_path, monkeypatch):
    """The tiny model as a base model's folder, under the name `base`."""
    random_model(torch.float32).save_pretrained(tmp_path / "models" / "base")
    tokenizer = AutoTokenizer.from_pretrained(materialize_model("bridge-tiny"))
    tokenizer.save_pretrained(tmp_path / "models" / "base")
    monkeypatch.setenv("BRIDGE_MODEL_DIR", str(tmp_path / "models"))
    return tmp_path / "models" / "base"


class Letters(SimpleNamespace):
    """A tokenizer of the tiny model's few tokens."""

    eos_token_id, pad_token_id, chat_template = 1, 0, None

    def __call__(self, text):
        return {"input_ids": [2 + ord(letter) % 20 for letter in text]}


def svd_export(policy, names, folder, rank):
    policy.tokenizer = Letters()
    return export_svd(policy, names, folder, replace(card(rank), base_model="base"))


@pytest.mark.parametrize("names", [("student",), ("student", "teacher")])
def test_an_svd_adapter_of_full_rank_is_the_policy_where_only_linear_layers_moved(
    names, base, tmp_path
):
    policy = full_policy("student", "teacher", dtype=torch.float32)
    moved(policy, only_linear=True)
    _, error = svd_export(policy, names, tmp_path / "a", 24)
    theirs = PeftModel.from_pretrained(random_model(torch.float32), str(tmp_path / "a"))
    with policy.using(*names):
        expected = logprobs_of(policy.model, TOKENS)
    torch.testing.assert_close(logprobs_of(theirs, TOKENS), expected, atol=1e-4, rtol=0)
    assert error < 1e-6
    figures, trained = noted_canary(tmp_path / "a"), canary(policy, names)
    assert figures["logprobs"] == pytest.approx(trained["logprobs"], abs=1e-4)
    assert figures["tokens"] == trained["tokens"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_canary_of_an_svd_adapter_is_what_it_says_itself_not_what_the_policy_says(
    dtype, base, tmp_path
):
    compute_dtype = None if dtype == torch.float32 else dtype
    policy = full_policy("student", "teacher", dtype=torch.float32, compute_dtype=compute_dtype)
    moved(policy)
    names = ("student", "teacher")
    before = merged_weights(policy, names)
    svd_export(policy, names, tmp_path / "a", 2)
    after = merged_weights(policy, names)
    assert all(torch.equal(before[name], after[name]) for name in before), "training goes on"
    figures = noted_canary(tmp_path / "a")
    assert figures["dtype"] == str(dtype).removeprefix("torch.")
    bare = random_model(dtype)
    theirs = PeftModel.from_pretrained(random_model(dtype), str(tmp_path / "a"))
    ids = torch.tensor([figures["tokens"]])
    for key, model in (("logprobs", theirs), ("base", bare)):
        expected = logprobs_of(model, ids)[:, :-1].gather(2, ids[:, 1:, None]).squeeze()
        off = (torch.tensor(figures[key]) - expected).abs().mean()
        assert off < (1e-4 if dtype == torch.float32 else 0.15)
    trained = torch.tensor(canary(policy, names)["logprobs"])
    assert (torch.tensor(figures["logprobs"]) - trained).abs().mean() > 0.3, "rank 2 lacks a lot"


def noted_canary(folder):
    return json.loads((folder / "bridge.json").read_text())["canary"]


def test_the_error_of_an_svd_adapter_is_what_it_lacks_and_falls_with_its_rank(base, tmp_path):
    policy = full_policy("student", "teacher", dtype=torch.float32)
    moved(policy)
    names = ("student", "teacher")
    initial = dict(random_model(torch.float32).named_parameters())
    now = merged_weights(policy, names)
    total = sum((now[n] - initial[n]).square().sum() for n in now) ** 0.5
    layers = {f"{path}.weight" for path in policy.adapters.layers}
    errors, shares = [], []
    for rank in (1, 4, 16):
        folder = tmp_path / str(rank)
        _, error = svd_export(policy, names, folder, rank)
        theirs = PeftModel.from_pretrained(random_model(torch.float32), str(folder))
        got = dict(theirs.merge_and_unload().named_parameters())
        lack = {n: (now[n] - got[n]).square().sum().item() for n in now}
        assert error == pytest.approx(sum(lack.values()) ** 0.5 / total.item(), rel=1e-3)
        written = json.loads((folder / "bridge.json").read_text())
        assert (written["form"], written["relative_error"]) == ("svd", error)
        outside = sum(v for n, v in lack.items() if n not in layers) / sum(lack.values())
        assert written["error_outside"] == pytest.approx(outside, rel=1e-3)
        errors.append(error)
        shares.append(written["error_outside"])
    assert errors[0] > errors[1] > errors[2] > 0.05, "norms and embeddings moved too"
    assert shares[0] < shares[1] < shares[2] == pytest.approx(1, abs=1e-6), "all that is left"


def test_a_teacher_on_few_layers_keeps_no_other_layer_out_of_the_svd(base, tmp_path):
    model, tokenizer = random_model(torch.float32), random_policy("student").tokenizer
    lora = LoraSpec(rank=2, target_modules=["q_proj"])
    policy = Policy(model, tokenizer, lora, StudentSpec(form="full"))
    for name in ("student", "teacher"):
        policy.add(name, 0)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight.mul_(1.5)
    _, error = svd_export(policy, ("student", "teacher"), tmp_path / "a", 16)
    assert error < 1e-6


@pytest.mark.parametrize("spectrum", ["steep", "flat"])
def test_the_randomised_factors_of_a_large_layer_are_within_a_hundredth_of_the_best(spectrum):
    rng = torch.Generator().manual_seed(0)
    matrix = torch.randn(160, 300, generator=rng)
    if spectrum == "steep":
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        matrix = (u * s * torch.arange(1, 161) ** -1.0) @ v
    a, b = low_rank(matrix, 8)
    before = torch.get_rng_state()
    again = low_rank(matrix, 8)
    assert all(torch.equal(x, y) for x, y in zip((a, b), again, strict=True)), "the same bytes"
    assert torch.equal(torch.get_rng_state(), before), "and nobody else's draws are touched"
    best = torch.linalg.svdvals(matrix)[8:].norm()
    assert best * (1 - 1e-4) < (matrix - b @ a).norm() < best * 1.01


def test_initial_weights_are_found_in_shards_and_under_other_names(base, tmp_path, monkeypatch):
    model = random_model(torch.float32)
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    renamed = {
        n.removeprefix("model."): p.detach()
        for n, p in model.named_parameters()
        if not n.startswith("lm_head")
    }
    (tmp_path / "renamed").mkdir()
    save_file(renamed, tmp_path / "renamed" / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(tmp_path / "renamed")
    tokenizer = AutoTokenizer.from_pretrained(materialize_model("bridge-tiny"))
    tokenizer.save_pretrained(tmp_path / "renamed")
    for folder in (base, tmp_path / "shards", tmp_path / "renamed"):
        initial = InitialWeights(folder)
        for name, parameter in model.named_parameters():
            assert torch.equal(initial[name], parameter), (folder.name, name)
    with pytest.raises(KeyError):
        InitialWeights(tmp_path / "renamed")["no.such.weight"]


# --------------------------------------------------------------------------- what a run writes


@pytest.mark.parametrize("form", ["lora", "full"])
def test_a_run_writes_policy_and_student_alone_in_every_form_it_is_asked_for(form, tmp_path):
    export = {"merged": True} if form == "lora" else {"svd_rank": 4}
    made = make_trainer(tmp_path / "run", student=form, export=export, steps=2)
    assert made.run()
    (event,) = [e for e in EventReader(made.events.path).read() if e.type == "checkpoint"]
    root = tmp_path / "run"
    assert (event.adapter, event.student) == (
        "adapters/step-000002",
        "adapters/step-000002-student",
    )
    assert event.merged == "models/step-000002"
    assert (event.relative_error is None) == (form == "lora")
    assert event.template == {"kind": "plain", "system": None, "suffix": ""}, "auto, decided"
    base = AutoModelForCausalLM.from_pretrained(materialize_model("bridge-tiny"))
    tokens = TOKENS.clamp(max=20)
    for folder, names in (
        (event.merged, ("student", "teacher")),
        (event.adapter, ("student", "teacher")),
        (event.student, ("student",)),
    ):
        with made.policy.using(*names):
            expected = logprobs_of(made.policy.module, tokens)
        if folder == event.merged:
            theirs = AutoModelForCausalLM.from_pretrained(root / folder)
        else:
            theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(root / folder))
        error = (logprobs_of(theirs, tokens) - expected).abs()
        noted = json.loads((root / folder / "bridge.json").read_text())
        assert noted["end_tokens"] == made.policy.eos_ids
        figures = noted["canary"]
        ids = torch.tensor([figures["tokens"]])
        found = logprobs_of(theirs, ids)[:, :-1].gather(2, ids[:, 1:, None]).squeeze()
        assert (found - torch.tensor(figures["logprobs"])).abs().max() < 1e-4
        if form == "lora" or noted["form"] == "svd":
            bare = logprobs_of(base, ids)[:, :-1].gather(2, ids[:, 1:, None]).squeeze()
            assert (bare - torch.tensor(figures["base"])).abs().max() < 1e-4
            assert (bare - found).abs().max() > 1e-2
        else:  # its base was trained itself
            assert "base" not in figures
        if form == "lora" or folder == event.merged:
            assert error.max() < 1e-4
        else:  # rank 4 of a change of every weight: nearer than the base, and its error is told
            assert error.mean() < 0.7 * (logprobs_of(base, tokens) - expected).abs().mean()
    cards = [
        json.loads((root / f / "bridge.json").read_text())
        for f in (event.adapter, event.student, event.merged)
    ]
    assert [c["deployment"] for c in cards] == ["policy", "student", "policy"]


def test_a_full_student_without_an_svd_rank_leaves_a_whole_model_and_no_adapter(tmp_path):
    made = make_trainer(
        tmp_path / "run", student="full", steps=2, checkpoint={"every": 1}, method="rl"
    )
    assert made.run()
    first, last = [e for e in EventReader(made.events.path).read() if e.type == "checkpoint"]
    assert (first.adapter, first.merged) == (None, None), "not the last, not measured: not written"
    assert (last.adapter, last.merged) == (None, "models/step-000002")
    manifest = tmp_path / "run" / last.merged / "manifest.json"
    assert last.merged_sha256 == hashlib.sha256(manifest.read_bytes()).hexdigest()
