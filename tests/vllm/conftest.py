"""Over a real vLLM server, in an environment of its own: `make test-vllm`."""

from pathlib import Path

import pytest
import torch

from bridge_engine.policy import Policy
from bridge_engine.rollout.vllm import VllmSampler
from bridge_engine.rollout.vllm_server import VllmServer
from bridge_engine.spec.train import LoraSpec, RuntimeSpec, StudentSpec, TrainSpec
from tests.support.vllm_server import PYTHON

TINY = Path(__file__).resolve().parents[2] / "bridge_engine/assets/bridge-tiny"
NAMES = ("student", "teacher")


def pytest_collection_modifyitems(items):
    """Marks every test here; skips them where there is no vLLM."""
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker(pytest.mark.vllm)
        item.add_marker(pytest.mark.timeout(600))
        if not PYTHON.exists():
            reason = f"no vLLM: {PYTHON} is not there; `make test-vllm` installs it"
            item.add_marker(pytest.mark.skip(reason=reason))


def spec_for(*, full=False, steps=2, **rollout):
    """A spec for bridge-tiny that samples by vLLM."""
    return TrainSpec.model_validate(
        {
            "method": "bridge",
            "steps": steps,
            "data": {"prompts": "arithmetic", "demos": "arithmetic"},
            "lora": {"rank": 4},
            "student": "full" if full else "lora",
            "rollout": {"engine": "vllm", "max_new_tokens": 24, **rollout},
            "runtime": {"device": "cpu", "dtype": "float32"},
        }
    )


def tiny_policy(*, full=False, model="bridge-tiny", dtype="float32"):
    """bridge-tiny with an untrained student and teacher."""
    policy = Policy.load(
        model,
        LoraSpec(rank=4),
        RuntimeSpec(device="cpu", dtype=dtype),
        StudentSpec(form="full" if full else "lora"),
    )
    for name in NAMES:
        policy.add(name, 0)
    return policy


def train(policy, seed, amount=0.02):
    """Moves every parameter set, as a step would, only further."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in NAMES:
            for parameter in policy.parameters(name):
                parameter.add_(amount * torch.randn(parameter.shape, generator=rng))


@pytest.fixture
def make_sampler(tmp_path):
    """Samplers on a server; closed when the test ends."""
    made = []

    def make(policy, url, *, full=False, mode=None, transport=None, names=NAMES):
        server = VllmServer(url, timeout_s=120, transport=transport)
        sampler = VllmSampler(
            policy, names, spec_for(full=full), tmp_path / "vllm", server, mode=mode
        )
        made.append(sampler)
        return sampler

    yield make
    for sampler in made:
        sampler.close()
