"""The client that waits: `Client().submit("job.yaml")`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from httpx_sse import EventSource

from bridge_client import _core, specs
from bridge_client._connection import Connection
from bridge_client._core import Retry, check
from bridge_client._download import Download
from bridge_client._stream import BROKEN, Answer, Cursor, Lines, Patience
from bridge_client.errors import BridgeError
from bridge_client.models import (
    Adapter,
    Alias,
    Checkpoint,
    Dataset,
    DryRun,
    Event,
    Generation,
    GenerationChunk,
    Grades,
    Job,
    Metrics,
    Project,
    Sample,
    Scores,
)

if TYPE_CHECKING:
    from bridge_engine.spec.job import JobSpec


class Client(Connection):
    """Speaks to a Bridge service. Safe to use from several threads.

    `base_url` defaults to BRIDGE_URL, else to the service that runs in BRIDGE_HOME (./.bridge),
    else to http://127.0.0.1:8000. Connection errors and the statuses 429 and 503 are tried again
    `retries` times. `project` (default: BRIDGE_PROJECT, else the service's default one) is where
    jobs are submitted to and listed from. Raises `BridgeError`: `APIStatusError` when the service
    refuses, `ConnectionError` when none answers.
    """

    # ------------------------------------------------------------------ jobs

    def submit(
        self,
        spec: dict[str, Any] | JobSpec | str | Path,
        *,
        idempotency_key: str | None = None,
        priority: int | None = None,
    ) -> Job:
        """Posts a job: a spec as a mapping, a `TrainSpec`, an `EvaluationSpec`, or the path of a
        YAML or JSON file.

        Two calls with the same `idempotency_key` and spec make one job. Of the jobs that wait,
        those of a higher `priority` (-100…100, default 0) are started first.
        """
        return self._send(_core.submit(specs.as_dict(spec), idempotency_key, priority))

    def dry_run(self, spec: dict[str, Any] | JobSpec | str | Path) -> DryRun:
        """What `submit` would post, every default filled in; nothing is queued."""
        return self._send(_core.dry_run(specs.as_dict(spec)))

    def job(self, job_id: str) -> Job:
        """The job as it is now."""
        return self._send(_core.job(job_id))

    def jobs(
        self,
        *,
        status: str | None = None,
        kind: str | None = None,
        method: str | None = None,
        name: str | None = None,
        page_size: int = 50,
    ) -> Iterator[Job]:
        """All jobs, newest first; pages are fetched as they are needed. `kind` is `train` or
        `eval`."""
        query = {"limit": page_size, "status": status, "kind": kind, "method": method, "name": name}
        return self._all(_core.jobs, query)

    def cancel(self, job_id: str) -> Job:
        """Asks for the job's end; a job that is over already stays as it is."""
        return self._send(_core.request(job_id, "cancel"))

    def pause(self, job_id: str) -> Job:
        """Takes the job from its worker, its state saved, until `resume`."""
        return self._send(_core.request(job_id, "pause"))

    def resume(self, job_id: str) -> Job:
        """Queues a paused job again; it goes on from its newest checkpoint."""
        return self._send(_core.request(job_id, "resume"))

    def retry(self, job_id: str) -> Job:
        """Queues a failed or cancelled job again; it goes on from its newest checkpoint."""
        return self._send(_core.request(job_id, "retry"))

    def fork(
        self,
        job_id: str,
        overrides: dict[str, Any] | None = None,
        *,
        from_checkpoint: int | str | None = None,
        priority: int | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """A new job from this one's spec with `overrides` (a JSON merge patch of it).

        `from_checkpoint`, a step, "best" or "latest", starts it from the parameters saved there,
        with fresh optimisers and at a step 0 of its own.
        """
        body = {"overrides": overrides, "from_checkpoint": from_checkpoint, "priority": priority}
        return self._send(_core.fork(job_id, body, idempotency_key))

    def prioritize(self, job_id: str, priority: int) -> Job:
        """Changes the priority of a job that waits, -100…100."""
        return self._send(_core.prioritize(job_id, priority))

    def delete(self, job_id: str) -> None:
        """Deletes a job that has ended, with all it left: figures, checkpoints, adapters."""
        self._send(_core.delete_job(job_id))

    def events(self, job_id: str, *, after: int = 0, patience: float = 120.0) -> Iterator[Event]:
        """The job's events, those that have happened and those that come, until it is over.

        Broken connections are mended without a gap or a repetition; after `patience` seconds
        without a service it raises `ConnectionError`.
        """
        cursor = Cursor(job_id, after=after, base_url=self.base_url, patience=patience)
        while True:
            try:
                with self._http.stream("GET", cursor.path, **cursor.arguments()) as response:
                    if not response.is_success:
                        response.read()
                    check(response)
                    cursor.opened()
                    for message in EventSource(response).iter_sse():
                        event = cursor.take(message.event, message.id, message.data)
                        if event is not None:
                            yield event
                if cursor.ended:
                    return
                delay = cursor.closed()
            except BROKEN as error:
                delay = cursor.broke(error)
            time.sleep(delay)

    def wait(self, job_id: str, *, progress: bool | Callable[[Event], object] = False) -> Job:
        """Follows the job until it is over and returns it as it ended, whatever the end.

        `progress=True` shows a progress bar on standard error; a callable gets every event.
        """
        with _core.progress_for(self.job(job_id), progress) as report:
            for event in self.events(job_id):
                report(event)
            return self._settled(job_id)

    def _settled(self, job_id: str) -> Job:
        """The job once it is over: the run said its last word, the worker is writing it down."""
        patience = Patience(self.base_url)
        while True:
            try:
                job = self.job(job_id)
                if job.terminal:
                    return job
                patience.renew()
                delay = _core.SETTLE
            except BridgeError as error:
                delay = patience.pause(error)
            time.sleep(delay)

    def metrics(
        self,
        job_id: str,
        *,
        keys: str | Sequence[str] | None = None,
        after_step: int | None = None,
        max_points: int | None = None,
    ) -> Metrics:
        """The job's metrics by name: `metrics(id)["reward"].last`."""
        return self._send(_core.metrics(job_id, keys, after_step, max_points))

    def samples(
        self, job_id: str, *, step: int | None = None, page_size: int = 100
    ) -> Iterator[Sample]:
        """Completions the policy wrote while it learned, newest step first; those of one `step`,
        if it is named. Pages are fetched as they are needed."""
        return self._all(partial(_core.samples, job_id), {"limit": page_size, "step": step})

    def checkpoints(self, job_id: str) -> list[Checkpoint]:
        """The job's saved states and their adapters."""
        return self._send(_core.checkpoints(job_id))

    def logs(self, job_id: str, *, tail: int | None = None) -> str:
        """What the training process printed; `tail` is a number of lines."""
        return self._send(_core.logs(job_id, tail))

    # ------------------------------------------------------------------ evaluations

    def scores(self, job_id: str, *, against: str | None = None) -> Scores:
        """What a finished evaluation found; `against` another one, paired problem by problem."""
        return self._send(_core.scores(job_id, against))

    def completions(self, job_id: str) -> Iterator[dict[str, Any]]:
        """Every answer of a finished evaluation, a problem an item, with its verdicts. They come
        one by one, however many there are; a connection that breaks is mended."""
        lines = Lines()
        for piece in self._pieces(_core.completions(job_id), lambda _: lines.begin()):
            yield from (line for line in lines.take(piece) if "answers" in line)

    def regrade(
        self,
        job_id: str,
        *,
        grader: str | dict[str, Any] | None = None,
        verifier_timeout: float | None = None,
        name: str | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """A new evaluation of the answers of a finished one, judged anew; nothing is sampled."""
        body = {"grader": grader, "verifier_timeout": verifier_timeout, "name": name}
        return self._send(_core.regrade(job_id, body, idempotency_key))

    # ------------------------------------------------------------------ projects

    def projects(self) -> list[Project]:
        """All projects, with their quotas and what they have used."""
        return (self._send(_core.projects())).data

    def create_project(
        self,
        name: str,
        *,
        id: str | None = None,
        max_running: int | None = None,
        gpu_hours: float | None = None,
    ) -> Project:
        """Makes a project; a quota that is None is no limit. Its id is its name where that can be
        one (small letters, digits, - and _), unless another is given; else the service makes one.
        """
        body = {"name": name, "max_running": max_running, "gpu_hours": gpu_hours}
        return self._send(_core.create_project(body, id))

    def update_project(
        self,
        project_id: str,
        name: str,
        *,
        max_running: int | None = None,
        gpu_hours: float | None = None,
    ) -> Project:
        """Gives a project this name and these quotas; None is no limit. What runs goes on."""
        body = {"name": name, "max_running": max_running, "gpu_hours": gpu_hours}
        return self._send(_core.update_project(project_id, body))

    # ------------------------------------------------------------------ data and adapters

    def upload(self, path: str | Path) -> Dataset:
        """Uploads a dataset; its `id` is its name in a spec."""
        return self._send(_core.upload(Path(path)))

    def datasets(self, *, page_size: int = 100) -> Iterator[Dataset]:
        """The uploaded datasets, newest first."""
        return self._all(_core.datasets, {"limit": page_size})

    def adapters(self, *, job_id: str | None = None, page_size: int = 100) -> Iterator[Adapter]:
        """The trained adapters, newest first; of one job, if it is named."""
        return self._all(_core.adapters, {"limit": page_size, "job_id": job_id})

    def adapter(self, name: str) -> Adapter:
        """One adapter: JOB@STEP, JOB@best, JOB@latest or JOB."""
        return self._send(_core.adapter(name))

    def grade(
        self, items: Sequence[dict[str, Any]], *, grader: str | dict[str, Any] | None = None
    ) -> Grades:
        """Judges answers as a job would. Each item is {"gold", "answer"}, the answer being a
        model's whole text, and may have a "prompt" and a "gold_value"; at most 1000 and 1 MB.

        `grader` is a name (`math`, `numeric`, `exact`) or an object with options.
        """
        return self._send(_core.grade(list(items), grader))

    def download_adapter(self, name: str, to: str | Path = ".", *, unpack: bool = False) -> Path:
        """Downloads an adapter into the folder `to`: the path of the zip archive or, with
        `unpack`, of the folder with its files, which PEFT loads.

        The archive's SHA-256 is verified; raises BridgeError where it is another.
        """
        with Download(Path(to)) as download:
            for piece in self._pieces(_core.download(name), download.begin):
                download.write(piece)
            return download.finish(unpack)

    def generate(
        self,
        prompt: str | None = None,
        *,
        adapter: str | None = None,
        model: str | None = None,
        messages: list[dict[str, str]] | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        n: int | None = None,
        stop: str | list[str] | None = None,
        seed: int | None = None,
        logprobs: int | None = None,
        raw: bool | None = None,
    ) -> Generation:
        """Lets a trained adapter (or a bare `model`) answer a prompt or a conversation.

        The prompt is put as in the adapter's training unless `raw` is true.
        """
        body = {key: value for key, value in locals().items() if key != "self"}
        return self._send(_core.generate(**body))

    def stream(
        self,
        prompt: str | None = None,
        *,
        adapter: str | None = None,
        model: str | None = None,
        messages: list[dict[str, str]] | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        n: int | None = None,
        stop: str | list[str] | None = None,
        seed: int | None = None,
        logprobs: int | None = None,
        raw: bool | None = None,
    ) -> Iterator[GenerationChunk]:
        """The same as it is written: chunks whose `text` together is the answer.

        Where it breaks off it raises `ConnectionError`, or `APIStatusError` with the service's
        reason; what came before is then not whole. Leaving the loop early stops the writing.
        """
        answer = Answer({k: v for k, v in locals().items() if k != "self"}, self.base_url)
        retry = Retry(answer.call, self.base_url, self._retries)
        while True:
            delay: float | None
            try:
                with (
                    answer.call.arguments() as arguments,
                    self._http.stream("POST", answer.call.path, **arguments) as response,
                ):
                    if not response.is_success:
                        response.read()
                    if (delay := retry.after_response(response)) is None:
                        check(response)
                        for message in EventSource(response).iter_sse():
                            if chunk := answer.take(message.event, message.data):
                                yield chunk
                        answer.closed()
                        return
            except (httpx.TransportError, httpx.StreamError) as error:
                if not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                    answer.closed(error)
                    return
                delay = retry.after_error(error)
            time.sleep(delay)

    # ------------------------------------------------------------------ aliases

    def aliases(self) -> list[Alias]:
        """Your own names for adapters."""
        return self._send(_core.aliases())

    def set_alias(self, name: str, adapter: str) -> Alias:
        """Lets `name` mean the adapter that `adapter` means now, until it is set again."""
        return self._send(_core.set_alias(name, adapter))

    def delete_alias(self, name: str) -> None:
        """Forgets the name; the adapter stays."""
        self._send(_core.delete_alias(name))
