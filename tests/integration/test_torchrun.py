"""Two processes under torchrun: the run of one process, to rounding; and its own, to the bit."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from bridge_engine.evaluation.answers import COMPLETIONS
from bridge_engine.evaluation.job import Evaluation
from bridge_engine.events import EXIT_DONE, EXIT_FAILED, EventReader, EventWriter
from bridge_engine.methods import METHODS
from bridge_engine.policy import Policy
from bridge_engine.run import read_spec
from bridge_engine.spec.job import fill, parse_spec
from bridge_engine.state.tensor_files import load_tensors
from tests.support.waiting import gone, until

ENGINE = Path(__file__).parents[1] / "support" / "rank_engine.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ENGINE.parents[2])}

SPEC = {
    "method": "bridge",
    "model": "bridge-tiny",
    "data": {
        "prompts": {"name": "arithmetic", "split": "demos", "limit": 32},
        "demos": {"name": "arithmetic", "limit": 32},
        "eval": {"name": "arithmetic", "limit": 11},
    },
    "steps": 4,
    "seed": 3,
    "rollout": {"prompts_per_step": 3, "group_size": 6, "max_new_tokens": 32},
    "sft": {"batch_size": 5},
    "eval": {"every": 2},
    "checkpoint": {"every": 2, "keep": 2},
}


class Run:
    """A run directory, and the processes that train in it."""

    def __init__(self, folder, **changes):
        folder.mkdir(exist_ok=True)
        self.spec = folder / "spec.yaml"
        self.spec.write_text(yaml.safe_dump({**SPEC, **changes}))
        self.directory = folder / "run"
        self.log = folder / "log.txt"
        self.judged = folder / "judged"
        self.judged.mkdir(exist_ok=True)

    def start(self, processes, *arguments, trouble="", hold=None, **options):
        """torchrun, or for one process the engine itself. `hold`: the step that it waits after
        until it is told to stop, so that it is met in the middle however slow the test is."""
        environment = {**ENVIRONMENT, "JUDGED": str(self.judged), "TROUBLE": trouble}
        if hold is not None:
            environment["HOLD"] = f"{hold}:{self.spec.with_name('never')}"
        command = ["run", str(self.spec), "--dir", str(self.directory), *arguments]
        return launch(processes, *command, log=self.log, env=environment, **options)

    def finish(self, processes, **options):
        status = self.start(processes, **options).wait(timeout=120)
        assert status == EXIT_DONE, self.log.read_text()[-4000:]
        return self

    def events(self):
        return EventReader(self.directory / "events.jsonl").read(limit=10_000)

    def wait_for_step(self, process, step):
        def reached():
            ended = process.poll() is not None  # looked at first: it may get there and end
            found = any(e.type == "metric" and e.step >= step for e in self.events())
            assert found or not ended, self.log.read_text()[-4000:]
            return found

        until(reached, otherwise=f"step {step} never came")

    def metrics(self):
        """Figures by step, less the clock's."""
        lines = (self.directory / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]

    def samples(self):
        """What people were shown: of a step that was done twice, once."""
        shown = (e for e in self.events() if e.type == "sample")
        return {e.model_dump_json(exclude={"seq", "time"}) for e in shown}

    def adapters(self):
        files = sorted((self.directory / "adapters").glob("step-*/adapter_model.safetensors"))
        return {file.parent.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    def tensors(self, step):
        folder = self.directory / "checkpoints" / f"step-{step:06d}"
        return {
            f"{file.stem}/{name}": tensor
            for file in sorted(folder.glob("*.safetensors"))
            for name, tensor in load_tensors(file).items()
        }


def launch(processes, *arguments, log, **options):
    """torchrun, or for one process the engine itself, with its output in the file `log`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher = [*torchrun, f"--nproc-per-node={processes}"] if processes > 1 else [sys.executable]
    with log.open("a") as file:
        return subprocess.Popen(
            [*launcher, str(ENGINE), *arguments], stdout=file, stderr=subprocess.STDOUT, **options
        )


def ranks_of(torchrun):
    """The processes that torchrun started, by rank."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == torchrun.pid:
                variables = (entry / "environ").read_bytes().split(b"\0")
                ranks = [int(v[5:]) for v in variables if v.startswith(b"RANK=")]
                found |= dict.fromkeys(ranks, int(entry.name))
    return found


# --------------------------------------------------------------------------- as one process

SPECS = {
    "sft": {"method": "sft"},
    "rl": {
        "method": "rl",
        "rl": {"inner_epochs": 2, "mini_batches": 2, "importance_correction": "truncated"},
        "rollout": {**SPEC["rollout"], "dynamic_sampling": 1},
    },
    "bridge": {"method": "bridge", "runtime": {"micro_batch": 2}},
    "hpt": {"method": "hpt"},
    "relift": {"method": {"name": "relift", "buffer": 2}},
    "luffy": {"method": "luffy"},
    "srft": {"method": "srft"},
    "full": {
        "method": "bridge",
        "student": "full",
        "steps": 2,
        "rl": {"kl_coef": 0.05},
        "runtime": {"micro_batch": 2},
    },
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Each spec's run by one process and by two, each a folder in one launch for all of them."""
    folder = tmp_path_factory.mktemp("trained")
    launched, runs = [], []
    for processes in (1, 2):
        made = {name: Run(folder / f"{name}-{processes}", **SPECS[name]) for name in SPECS}
        folders = [str(run.spec.parent) for run in made.values()]
        log = folder / f"log-{processes}.txt"
        launched.append((launch(processes, "each", *folders, log=log, env=ENVIRONMENT), log))
        runs.append(made)
    for process, log in launched:
        assert process.wait(timeout=600) == EXIT_DONE, log.read_text()[-4000:]
    return {name: (runs[0][name], runs[1][name]) for name in SPECS}


def assert_as_close_as_adam_keeps_it(got, expected):
    """Equal to rounding, but for the odd element: Adam divides a gradient by its own size, so that
    one that is next to nothing takes a visible step whose length hangs on its last digits."""
    apart = ~torch.isclose(got, expected, rtol=1e-3, atol=1e-5)
    assert apart.float().mean() < 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=3e-4)


@pytest.mark.timeout(900)  # the first waits for all runs: forty seconds where nothing else runs
@pytest.mark.parametrize("name", SPECS)
def test_two_processes_train_what_one_does(trained, name):
    one, two = trained[name]
    for expected, got in zip(one.metrics(), two.metrics(), strict=True):
        assert got == pytest.approx(expected, rel=1e-3, abs=1e-5)
    learnt = [m["frac_reward_zero_std"] for m in two.metrics() if "frac_reward_zero_std" in m]
    assert name == "sft" or min(learnt) < 1, "rewards that differ, or RL has been tested on nothing"
    last = SPECS[name].get("steps", SPEC["steps"])
    expected, got = one.tensors(last), two.tensors(last)
    assert expected.keys() == got.keys()
    for key, tensor in expected.items():
        assert_as_close_as_adam_keeps_it(got[key], tensor)
    assert one.samples() == two.samples()
    # who judges is shared out, and what is judged is the same: every answer once
    answers = [
        Counter(line for file in run.judged.iterdir() for line in file.read_text().splitlines())
        for run in (one, two)
    ]
    assert answers[0] == answers[1]
    assert len(list(two.judged.iterdir())) == 2


@pytest.mark.timeout(900)
def test_the_model_that_two_processes_export_is_the_policy_they_trained(trained):
    """A full student's, from shards: under transformers it is what the saved parameters are."""
    _, two = trained["full"]
    spec = read_spec(two.spec)
    policy = Policy.load(spec.model, spec.lora, spec.runtime, spec.student)
    tokens = torch.arange(2, 50).reshape(4, 12)

    def logprobs(model):
        with torch.no_grad():
            return model(tokens).logits.log_softmax(-1)

    untrained, saved = logprobs(policy.model), two.tensors(2)
    for name in ("student", "teacher"):
        policy.add(name, spec.seed)
        with torch.no_grad():
            for index, parameter in enumerate(policy.parameters(name)):
                parameter.copy_(saved[f"{name}/{index}/value"])
    with policy.using("student", "teacher"):
        expected = logprobs(policy.model)
    exported = AutoModelForCausalLM.from_pretrained(two.directory / "models" / "step-000002")
    torch.testing.assert_close(logprobs(exported), expected, atol=1e-4, rtol=0)
    assert (untrained - expected).abs().max() > 0.01


# --------------------------------------------------------------------------- as itself


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("undisturbed"), steps=6).finish(2)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_a_run_of_two_processes_goes_on_to_the_same_bits(undisturbed, tmp_path, stop):
    run = Run(tmp_path, steps=6)
    process = run.start(2, hold=4)
    run.wait_for_step(process, 3)
    ranks = ranks_of(process)
    assert set(ranks) == {0, 1}
    process.send_signal(stop)
    process.wait(timeout=120)
    assert all(map(gone, ranks.values()))  # without their launcher too
    kinds = [e.type for e in run.events()]
    assert kinds[-1] == "stopped" if stop == signal.SIGTERM else "stopped" not in kinds
    run.finish(2)
    assert any(e.type == "resume" for e in run.events())
    assert run.metrics() == undisturbed.metrics()
    assert run.samples() == undisturbed.samples()
    assert run.adapters()["step-000006"] == undisturbed.adapters()["step-000006"]
    assert [e.seq for e in run.events()] == list(range(1, len(run.events()) + 1))


def test_ranks_agree_that_a_share_of_one_is_not_finite():
    """Or one would fail and the others wait for it."""
    script = ENGINE.with_name("rank_shards.py")
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    for rank in (0, 1):  # whose lines may stand in one
        assert f"rank {rank}: non_finite_parameters" in done.stdout, done.stderr[-3000:]


@pytest.mark.timeout(900)  # a minute or two where nothing else runs
def test_every_method_resumes_bitwise_with_two_processes(tmp_path):
    script = ENGINE.with_name("rank_resume.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node=2", str(script), str(tmp_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == list(METHODS)


def test_two_runs_of_two_processes_are_the_same_to_the_bit(undisturbed, tmp_path):
    again = Run(tmp_path, steps=6).finish(2)
    assert again.metrics() == undisturbed.metrics()
    assert again.samples() == undisturbed.samples()
    assert again.adapters() == undisturbed.adapters()


def test_a_student_in_shards_goes_on_to_the_same_bits(tmp_path):
    spec = {"student": "full", "steps": 3, "eval": {"every": 0}, "checkpoint": {"every": 1}}
    undisturbed, stopped = Run(tmp_path / "one", **spec), Run(tmp_path / "two", **spec)
    undisturbed.finish(2)
    process = stopped.start(2, hold=1)
    stopped.wait_for_step(process, 1)
    process.terminate()
    process.wait(timeout=120)
    assert stopped.events()[-1].type == "stopped"
    stopped.finish(2)
    assert stopped.metrics() == undisturbed.metrics()
    expected, got = undisturbed.tensors(3), stopped.tensors(3)
    assert expected.keys() == got.keys()
    assert {key.partition("/")[0] for key in got} == {"student", "teacher", "shadow"}
    assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())


def test_a_run_of_two_processes_can_go_on_as_one(tmp_path):
    run = Run(tmp_path)
    process = run.start(2, hold=2)
    run.wait_for_step(process, 2)
    process.terminate()
    process.wait(timeout=120)
    run.finish(1)
    warnings = [e.message for e in run.events() if e.type == "log" and e.level == "warning"]
    assert any("processes: 2 → 1" in warning for warning in warnings)


# --------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("trouble", "category", "code"),
    [
        ("1:refused", "infra", "verifier_failed"),
        ("0:bug", "internal", "engine_error"),
        ("1:bug", "internal", "engine_error"),
        ("1:memory", "oom", "out_of_memory"),
        ("1:killed", "infra", "rank_lost"),
    ],
)
def test_the_failure_of_one_rank_is_the_runs_one_error_and_ends_all(
    tmp_path, trouble, category, code
):
    run = Run(tmp_path, steps=10_000)
    process = run.start(2, trouble=trouble)
    run.wait_for_step(process, 0)
    ranks = ranks_of(process)
    assert process.wait(timeout=120) == EXIT_FAILED
    assert "forcefully exiting" not in run.log.read_text(), "torchrun had to kill what was left"
    assert all(map(gone, ranks.values()))
    *before, last = run.events()
    assert (last.type, last.category, last.code) == ("error", category, code)
    assert not any(e.type == "error" for e in before)


def test_a_bad_spec_is_one_error_of_two_processes(tmp_path):
    run = Run(tmp_path, method="brigde")
    assert run.start(2).wait(timeout=120) == EXIT_FAILED
    (error,) = run.events()
    assert (error.type, error.code) == ("error", "invalid_spec")


def test_what_cannot_be_sharded_is_refused_with_what_to_do(tmp_path):
    run = Run(tmp_path, student={"form": "full", "shadow_offload": True})
    assert run.start(2).wait(timeout=120) == EXIT_FAILED
    error = run.events()[-1]
    assert (error.code, error.param) == ("unsupported_with_ranks", "student.shadow_offload")
    assert "leave it out" in error.message


def test_a_run_directory_in_use_is_refused_to_all_ranks(tmp_path):
    run = Run(tmp_path, steps=10_000)
    first = run.start(1)
    run.wait_for_step(first, 0)
    try:
        assert run.start(2).wait(timeout=120) == EXIT_FAILED
        assert run.log.read_text().count("another engine is running") == 1
    finally:
        first.kill()
        first.wait()


def test_ranks_whose_jobs_parent_died_stop(tmp_path):
    run = Run(tmp_path, steps=10_000)
    read_end, write_end = os.pipe()
    process = run.start(2, "--parent-pipe", str(read_end), pass_fds=[read_end])
    os.close(read_end)
    run.wait_for_step(process, 1)
    ranks = ranks_of(process)
    os.close(write_end)
    assert all(map(gone, ranks.values()))
    assert process.wait(timeout=120) == EXIT_FAILED


def test_an_evaluation_by_two_processes_has_the_answers_and_scores_of_one(tmp_path):
    document = {
        "kind": "eval",
        "benchmarks": [{"name": "arithmetic", "limit": 9}],
        "sampling": {"samples": 3, "temperature": 1.0, "max_new_tokens": 24, "batch_size": 12},
    }
    two = Run(tmp_path / "two")
    two.spec.write_text(yaml.safe_dump(document))
    two.finish(2)
    alone = tmp_path / "alone"
    alone.mkdir()
    with Evaluation(fill(parse_spec(document)), alone, EventWriter(alone)) as one:
        assert one.run()
    answers = [(folder / COMPLETIONS).read_text() for folder in (alone, two.directory)]
    assert answers[0] == answers[1]
    done = [EventReader(f / "events.jsonl").read()[-1].result for f in (alone, two.directory)]
    assert done[0]["benchmarks"] == done[1]["benchmarks"]
    assert done[1]["environment"]["processes"] == 2
