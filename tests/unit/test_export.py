"""The exported adapter is the trained policy, for PEFT as for us."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from bridge_engine.export import AdapterCard, export_adapter
from bridge_engine.methods.bridge import BridgeOptions
from tests.support.tiny import random_model, random_policy


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
