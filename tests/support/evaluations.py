"""Evaluation jobs on bridge-tiny in this process."""

import json
import shutil

from bridge_engine.evaluation.checks import read_card
from bridge_engine.evaluation.job import Evaluation
from bridge_engine.events import EventReader, EventWriter
from bridge_engine.rewards import Verifier
from bridge_engine.spec.job import check, fill, parse_spec
from bridge_engine.state.run_state import Progress
from tests.support.training import make_trainer

SPEC = {
    "kind": "eval",
    "benchmarks": [{"name": "arithmetic", "limit": 14}],
    "sampling": {"samples": 3, "temperature": 0.8, "max_new_tokens": 32, "batch_size": 12},
    "runtime": {"threads": 1},
}


def evaluation(folder, adapter=None, stop=lambda: False, **changes):
    """The job of SPEC with these changes; `adapter` is a folder that an earlier run exported."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {**SPEC, **changes}
    card = None
    if adapter is not None:
        shutil.copytree(adapter, folder / "init", dirs_exist_ok=True)
        document["adapter"], card = "job_1@2", read_card(folder / "init")
    spec = parse_spec(document)
    assert check(spec, card) == []
    return Evaluation(fill(spec, card), folder, EventWriter(folder), stop)


def run(folder, **options):
    """(the result, what was asked of each set) of an evaluation that is run to its end."""
    with evaluation(folder, **options) as made:
        assert made.run()
    return result(folder)


def events(folder, type_=None):
    found = EventReader(folder / "events.jsonl").read(limit=10_000)
    return [e for e in found if type_ in (None, e.type)]


def result(folder):
    """The result less what the clock says."""
    (done,) = events(folder, "done")
    return {**done.result, "seconds": None}


def lines(path):
    """The answers that were kept, by problem."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return {
        line["id"]: [(a["text"], a["tokens"], a["truncated"]) for a in line["answers"]]
        for line in found
        if "id" in line
    }


def train(folder, **changes):
    """A training job of two steps in this run directory; what it measured at the end."""
    made = make_trainer(
        folder,
        steps=2,
        data={
            "prompts": "arithmetic",
            "demos": {"name": "arithmetic", "limit": 16},
            "eval": {"name": "arithmetic", "limit": 20},
        },
        eval={"every": 0, "student_alone": False, "max_new_tokens": 20},
        optimizer={"student_lr": 3e-3, "teacher_lr": 3e-3},
        runtime={"threads": 1},
        **changes,
    )
    scripted = made.explorer.verifier
    with made:
        for step in range(2):
            made._step(Progress(step=step))
        assert scripted.asked
        made.explorer.verifier = Verifier()
        score = made.explorer.measure(2, made.method.options.policy, show=False)
        made.explorer.verifier.close()
        made.state.save(Progress(step=2))
    return score
