"""A trainer on bridge-tiny in a folder of its own, with verdicts that a test decides."""

from bridge_engine.distributed.process_group import Unheard
from bridge_engine.events import EventWriter
from bridge_engine.rewards import Verdict
from bridge_engine.spec.checks import resolve_spec
from bridge_engine.spec.train import TrainSpec
from bridge_engine.trainer import Trainer

SPEC = {
    "method": "bridge",
    "data": {"prompts": "arithmetic", "demos": {"name": "arithmetic", "limit": 16}},
    "steps": 3,
    "rollout": {"prompts_per_step": 3, "group_size": 4, "max_new_tokens": 24},
    "sft": {"batch_size": 4},
    "checkpoint": {"every": 100},
}


class ScriptedVerifier:
    """Stands where the verifier stands; gives the verdicts it is told to, in turn."""

    def __init__(self, verdicts=(True, False)):
        self.verdicts = verdicts
        self.asked = []

    def judge(self, pairs):
        self.asked.append([(case.gold, case.text) for case in pairs])
        return [
            Verdict(self.verdicts[i % len(self.verdicts)], "scripted", fast=True)
            for i in range(len(pairs))
        ]


def make_trainer(folder, world=None, **changes):
    """The trainer of SPEC with these changes, in a folder that is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = resolve_spec(TrainSpec.model_validate({**SPEC, **changes}))
    writes = world is None or world.is_first
    made = Trainer(spec, folder, EventWriter(folder) if writes else Unheard(folder), world=world)
    made.explorer.verifier = ScriptedVerifier()
    return made
