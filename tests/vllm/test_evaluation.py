"""Evaluations that a real vLLM server samples, beside those that this process samples itself."""

import json
import os
import shutil
import signal

import httpx
import pytest
import yaml

from bridge_engine.errors import EngineError
from bridge_engine.evaluation.answers import COMPLETIONS
from bridge_engine.events import EXIT_DONE
from bridge_engine.rollout.serving_weights import write_untied
from tests.engine.test_run import Engine
from tests.support.evaluations import events, lines, result, run, train
from tests.support.vllm_server import vllm_server
from tests.vllm.conftest import TINY

GREEDY = {"max_new_tokens": 32, "batch_size": 8}
DRAWN = {"samples": 3, "temperature": 0.8, "max_new_tokens": 32, "batch_size": 12}
PROBLEMS = {"name": "arithmetic", "limit": 40}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A server of bridge-tiny that takes adapters, at the address the engine is told."""
    options = ("--enable-lora", "--max-lora-rank", "16")
    log = tmp_path_factory.mktemp("vllm") / "log"
    with (
        vllm_server(TINY, log, *options, VLLM_ALLOW_RUNTIME_LORA_UPDATING="True") as address,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("BRIDGE_VLLM_URL", address)
        yield address


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The adapter of a short training run."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder)
    return folder / "adapters" / "step-000002"


@pytest.fixture
def merged(tmp_path, monkeypatch):
    """A server that takes whole weights, and the engine told so."""
    write_untied("bridge-tiny", tmp_path / "untied")
    with vllm_server(tmp_path / "untied", tmp_path / "log", VLLM_SERVER_DEV_MODE="1") as address:
        monkeypatch.setenv("BRIDGE_VLLM_URL", address)
        monkeypatch.setenv("BRIDGE_VLLM_WEIGHTS", "merged")
        yield


def adapters_on(url):
    cards = httpx.get(f"{url}/v1/models").json()["data"]
    return [card["id"] for card in cards if card["parent"] is not None]


def evaluated(folder, engine, sampling=GREEDY, **options):
    """(the scores, every answer) of the same evaluation by this engine."""
    found = run(folder, benchmarks=[PROBLEMS], sampling={**sampling, "engine": engine}, **options)
    return found["benchmarks"], lines(folder / COMPLETIONS)


@pytest.mark.parametrize("subject", ["base", "adapter"])
def test_greedy_answers_and_scores_are_those_of_the_native_sampler(url, trained, tmp_path, subject):
    adapter = trained if subject == "adapter" else None
    ours, our_answers = evaluated(tmp_path / "native", "native", adapter=adapter)
    theirs, their_answers = evaluated(tmp_path / "vllm", "vllm", adapter=adapter)
    assert their_answers == our_answers
    assert theirs == ours
    assert len({answer for (answer,) in our_answers.values()}) > 20  # or this proves little
    assert 0 < ours[0]["scores"]["pass@1"]["value"] < 1
    said = result(tmp_path / "vllm")
    assert (said["engine"], said["environment"]["vllm"][:2]) == ("vllm", "0.")
    assert adapters_on(url) == []


def test_whole_weights_answer_as_the_native_sampler_whoever_is_asked(merged, trained, tmp_path):
    """One server for a full student, an adapter, and the base that it was started with."""
    train(tmp_path / "full", student="full", checkpoint={"every": 1})
    full = tmp_path / "full" / "models" / "step-000002"
    every = []
    for name, adapter in (("full", full), ("adapter", trained), ("base", None)):
        ours = evaluated(tmp_path / name / "native", "native", adapter=adapter)
        assert evaluated(tmp_path / name / "vllm", "vllm", adapter=adapter) == ours
        every.append(ours[1])
    assert every[0] != every[1] != every[2] != every[0]


def test_a_full_student_is_no_adapter_and_the_refusal_says_what_to_do(url, tmp_path):
    train(tmp_path / "full", student="full", checkpoint={"every": 1})
    full = tmp_path / "full" / "models" / "step-000002"
    with pytest.raises(EngineError, match="BRIDGE_VLLM_WEIGHTS=merged") as refused:
        evaluated(tmp_path / "eval", "vllm", adapter=full)
    assert refused.value.code == "wrong_base_model"


def test_the_adapter_answers_and_not_its_base(url, trained, tmp_path):
    _, base = evaluated(tmp_path / "base", "vllm")
    _, adapted = evaluated(tmp_path / "adapter", "vllm", adapter=trained)
    assert any(base[name] != adapted[name] for name in base)


def test_samples_are_drawn_by_seed_problem_and_number_alone(url, tmp_path):
    """One request at a time, so that nothing but the seeds can make them alike or different."""
    alone = {**DRAWN, "batch_size": 1}
    _, first = evaluated(tmp_path / "first", "vllm", alone)
    fewer = {**PROBLEMS, "kinds": ["add3", "paren"]}
    sampling = {**alone, "samples": 2, "engine": "vllm"}
    run(tmp_path / "fewer", benchmarks=[fewer], sampling=sampling)
    again = lines(tmp_path / "fewer" / COMPLETIONS)
    both = [name for name in again if name in first]
    assert len(both) >= 10
    assert all(again[name] == first[name][:2] for name in both)
    assert any(len(set(answers)) > 1 for answers in first.values())


def test_an_evaluation_that_is_killed_goes_on_and_leaves_no_adapter_behind(url, trained, tmp_path):
    engine = Engine(tmp_path / "killed")
    document = {
        "kind": "eval",
        "model": "bridge-tiny",
        "adapter": "job_1@2",
        "benchmarks": [PROBLEMS],
        "sampling": {**GREEDY, "batch_size": 2, "engine": "vllm"},
        "runtime": {"threads": 1},
    }
    engine.spec.write_text(yaml.safe_dump(document))
    shutil.copytree(trained, engine.run_dir / "init")
    process = engine.start()
    engine.wait_for_step(process, 10)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = (engine.run_dir / COMPLETIONS).read_text().splitlines()
    finished = len([line for line in before if '"answers"' in line])
    assert 10 <= finished < 40
    assert adapters_on(url) != []

    status, output = engine.finish()
    assert status == EXIT_DONE, output
    assert [e.step for e in events(engine.run_dir, "resume")] == [finished]
    after = (engine.run_dir / COMPLETIONS).read_text().splitlines()
    assert after[: finished + 1] == before[: finished + 1]
    asked = [json.loads(line)["id"] for line in after if '"answers"' in line]
    assert len(asked) == len(set(asked)) == 40
    whole, answers = evaluated(tmp_path / "whole", "vllm", adapter=trained)
    assert lines(engine.run_dir / COMPLETIONS) == answers
    assert result(engine.run_dir)["benchmarks"] == whole
    assert adapters_on(url) == []
