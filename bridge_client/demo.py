"""`bridge demo`: one BRIDGE job from its submission to an adapter that answers, in a few minutes.

Everything happens through the service, as it would for a user: this page starts an embedded one if
none runs in this home, posts `SPEC`, follows the events, and asks `/generate`. The last lines show
how to do the same by hand. `HOME/demo.json` keeps the figures.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
from rich import markup
from rich.console import Console

from bridge_client import hints, ports, supervisor
from bridge_client._core import describe
from bridge_client.client import Client
from bridge_client.errors import APIStatusError, CannotStartError
from bridge_client.home import Home, State
from bridge_client.models import Event, Job
from bridge_client.output import EXIT_DETACHED, EXIT_FAILED, EXIT_OF_JOB, before_after
from bridge_client.text import escape
from bridge_client.watch import Watch

SPEC: dict[str, Any] = {
    "name": "demo",
    "method": {"name": "bridge", "lambda": 0.5},
    "model": "bridge-tiny",
    "data": {
        "prompts": {"name": "arithmetic", "split": "train"},
        "demos": {"name": "arithmetic", "split": "demos", "limit": 128},
        "eval": {"name": "arithmetic", "split": "dev", "limit": 250},
    },
    "steps": 80,
    "lora": {"rank": 8, "alpha": 16},
    "optimizer": {"student_lr": 1e-4, "teacher_lr": 3e-4},
    "rollout": {"prompts_per_step": 8, "group_size": 8, "max_new_tokens": 64},
    "sft": {"batch_size": 16},
    "eval": {"every": 20},
    "checkpoint": {"every": 20},
}
"""The same as examples/arithmetic-bridge.yaml, where the choices are explained."""

QUESTIONS = {"2+31+42?": "75", "7*3-20+49?": "50", "4+(36+40)+17?": "97"}
"""The first problem of three kinds in the test split, which no run trains on, and their answers.
Not picked for being answered well: about one in eight such problems still goes wrong."""

READY_WITHIN = 90.0
"""Seconds for the trained adapter to be loaded and proven."""


def run(
    home: Home,
    *,
    port: int = 8000,
    seed: int = 0,
    steps: int | None = None,
    stop_after: bool = False,
) -> int:
    """The whole demonstration; returns the exit status."""
    console = Console(highlight=False, soft_wrap=True)
    state = _service(home, port, console)
    try:
        with Client(state.url) as client:
            return _demonstrate(client, home, _spec(seed, steps), console, stop_after)
    finally:
        if stop_after:
            supervisor.stop(home)
            console.print("The service has stopped.")


def _service(home: Home, port: int, console: Console) -> State:
    """The service of this home, started if it does not run."""
    running = home.running()
    if running and running.ready:
        console.print(f"[bold]1.[/] Bridge already runs at {running.url}")
        _check(home, running)
        return running
    if not running and (left := supervisor.stop(home)):  # it holds the port
        names = ", ".join(left.leftovers)
        console.print(f"Stopped what a killed supervisor had left running: {names}")
    if not running and not ports.is_free(port):
        other = ports.free_port(port + 1)
        console.print(f"Port {port} is taken by {escape(ports.holder(port))}; using {other}.")
        port = other
    console.print(f"[bold]1.[/] Starting Bridge (API, worker, inference) in {home.path} …")
    begun = time.monotonic()
    state = supervisor.detach(home, port)
    console.print(f"   ready at {state.url} after {time.monotonic() - begun:.0f} s")
    return state


def _check(home: Home, running: State) -> None:
    """Raises unless the service that runs, perhaps since long ago, can take a job."""
    try:
        answer = httpx.get(f"{running.url}/readyz", timeout=10, trust_env=False)
        why = "" if answer.is_success else f"HTTP {answer.status_code} {answer.text[:300]}"
    except httpx.TransportError as error:
        why = describe(error)
    if why:
        raise CannotStartError(
            f"That service is not ready ({why}): stop it with `{hints.down(home)}` and run the "
            f"demo again; its logs are in {home.logs}."
        )


def _spec(seed: int, steps: int | None) -> dict[str, Any]:
    return {**SPEC, "seed": seed, "steps": steps or SPEC["steps"]}


def _demonstrate(
    client: Client, home: Home, spec: dict[str, Any], console: Console, stop_after: bool
) -> int:
    begun = time.monotonic()
    bridge = hints.reaching(home, client.base_url)
    job = client.submit(spec)
    console.print(
        f"[bold]2.[/] POST /jobs: {job.id}, {job.status}. BRIDGE teaches {spec['model']} "
        f"arithmetic in {spec['steps']} steps."
    )
    try:
        job = _follow(client, job, console)
    except KeyboardInterrupt:
        going = "stops with the service" if stop_after else "goes on"
        console.print(
            f"\nNo longer watching; the job {going}. "
            f"`{bridge} jobs watch {job.id}` watches again, "
            f"`{bridge} jobs cancel {job.id}` ends it, "
            f"`{hints.down(home)}` stops the service."
        )
        return EXIT_DETACHED
    seconds = time.monotonic() - begun
    if job.status != "succeeded" or not job.result or not job.adapter:
        error = (job.error or {}).get("message", "it has no result")
        console.print(f"[red]The job {job.status}:[/] {escape(str(error))}")
        console.print(f"See `{bridge} jobs logs {job.id}` and {home.logs}.")
        return EXIT_OF_JOB.get(job.status, 0) or EXIT_FAILED
    console.print(
        f"[bold]3.[/] Held-out accuracy {before_after(job.result)} "
        f"({job.result.get('eval_n', '?')} problems it never trained on, {seconds:.0f} s)"
    )
    console.print("[bold]4.[/] POST /generate, before and after:")
    answers = []
    for question, expected in QUESTIONS.items():
        untrained = _ask(client, question, model=spec["model"])
        trained = _ask(client, question, adapter=job.adapter)
        answers.append({"question": question, "answer": trained, "expected": expected})
        for who, text in (("untrained", untrained), ("trained", trained)):
            verdict = "right" if text.rpartition("#")[2] == expected else f"wrong, it is {expected}"
            console.print(f"   {question:<14} {who:<10} {escape(text)}  ({verdict})")
    file = _write(home, job, seconds, answers)
    _by_hand(client, home, job, file, console, stop_after)
    return 0


def _follow(client: Client, job: Job, console: Console) -> Job:
    with Watch(job, console) as watch:

        def see(event: Event) -> None:
            watch.see(event)

        return client.wait(job.id, progress=see)


def _ask(
    client: Client, question: str, *, adapter: str | None = None, model: str | None = None
) -> str:
    """The answer to a question; waits while the adapter is being loaded."""
    deadline = time.monotonic() + READY_WITHIN
    while True:
        try:
            answer = client.generate(question, adapter=adapter, model=model, temperature=0.0)
            return answer.text.strip()
        except APIStatusError as error:
            passing = error.status in (404, 409, 425) or error.status >= 500
            if not passing or time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _write(home: Home, job: Job, seconds: float, answers: list[dict[str, str]]) -> Path:
    """HOME/demo.json: the figures of this run, for people and for tests."""
    result = job.result or {}
    keys = ("accuracy_before", "accuracy_before_ci", "accuracy_after", "accuracy_after_ci")
    record = {
        **{key: result.get(key) for key in keys},
        "seconds": round(seconds, 1),
        "job_id": job.id,
        "adapter": job.adapter,
        **answers[0],
        "answers": answers,
        "seed": job.spec.get("seed"),
        "steps": job.steps,
    }
    file = home.path / "demo.json"
    file.write_text(json.dumps(record, indent=2) + "\n")
    return file


def _by_hand(
    client: Client, home: Home, job: Job, file: Path, console: Console, stop_after: bool
) -> None:
    bridge = hints.reaching(home, client.base_url)
    question = next(iter(QUESTIONS))
    body = json.dumps({"adapter": job.adapter, "prompt": question})
    commands = f"""
Ask it yourself:

  curl -s {client.base_url}/generate -H 'Content-Type: application/json' \\
    -d '{body}'

  from bridge_client import Client
  print(Client("{client.base_url}").generate("{question}", adapter="{job.adapter}").text)

Train one yourself:

  {bridge} jobs submit examples/arithmetic-bridge.yaml --watch

The figures are in {hints.short(file)}."""
    console.print(markup.escape(commands))
    if not stop_after:
        console.print(f"The service stays at {client.base_url}; stop it with `{hints.down(home)}`.")
