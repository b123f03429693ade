"""The client for asyncio: `await AsyncClient().submit("job.yaml")`. `Client`'s twin."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from httpx_sse import EventSource

from bridge_client import _core, specs
from bridge_client._connection import AsyncConnection
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


class AsyncClient(AsyncConnection):
    """Speaks to a Bridge service from asyncio. See `Client` for what everything means."""

    # ------------------------------------------------------------------ jobs

    async def submit(
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
        return await self._send(_core.submit(specs.as_dict(spec), idempotency_key, priority))

    async def dry_run(self, spec: dict[str, Any] | JobSpec | str | Path) -> DryRun:
        """What `submit` would post, every default filled in; nothing is queued."""
        return await self._send(_core.dry_run(specs.as_dict(spec)))

    async def job(self, job_id: str) -> Job:
        """The job as it is now."""
        return await self._send(_core.job(job_id))

    async def jobs(
        self,
        *,
        status: str | None = None,
        kind: str | None = None,
        method: str | None = None,
        name: str | None = None,
        page_size: int = 50,
    ) -> AsyncIterator[Job]:
        """All jobs, newest first; pages are fetched as they are needed. `kind` is `train` or
        `eval`."""
        query = {"limit": page_size, "status": status, "kind": kind, "method": method, "name": name}
        async for job in self._all(_core.jobs, query):
            yield job

    async def cancel(self, job_id: str) -> Job:
        """Asks for the job's end; a job that is over already stays as it is."""
        return await self._send(_core.request(job_id, "cancel"))

    async def pause(self, job_id: str) -> Job:
        """Takes the job from its worker, its state saved, until `resume`."""
        return await self._send(_core.request(job_id, "pause"))

    async def resume(self, job_id: str) -> Job:
        """Queues a paused job again; it goes on from its newest checkpoint."""
        return await self._send(_core.request(job_id, "resume"))

    async def retry(self, job_id: str) -> Job:
        """Queues a failed or cancelled job again; it goes on from its newest checkpoint."""
        return await self._send(_core.request(job_id, "retry"))

    async def fork(
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
        return await self._send(_core.fork(job_id, body, idempotency_key))

    async def prioritize(self, job_id: str, priority: int) -> Job:
        """Changes the priority of a job that waits, -100…100."""
        return await self._send(_core.prioritize(job_id, priority))

    async def delete(self, job_id: str) -> None:
        """Deletes a job that has ended, with all it left: figures, checkpoints, adapters."""
        await self._send(_core.delete_job(job_id))

    async def events(
        self, job_id: str, *, after: int = 0, patience: float = 120.0
    ) -> AsyncIterator[Event]:
        """The job's events, those that have happened and those that come, until it is over.

        Broken connections are mended without a gap or a repetition; after `patience` seconds
        without a service it raises `ConnectionError`.
        """
        cursor = Cursor(job_id, after=after, base_url=self.base_url, patience=patience)
        while True:
            try:
                async with self._http.stream("GET", cursor.path, **cursor.arguments()) as response:
                    if not response.is_success:
                        await response.aread()
                    check(response)
                    cursor.opened()
                    async for message in EventSource(response).aiter_sse():
                        event = cursor.take(message.event, message.id, message.data)
                        if event is not None:
                            yield event
                if cursor.ended:
                    return
                delay = cursor.closed()
            except BROKEN as error:
                delay = cursor.broke(error)
            await asyncio.sleep(delay)

    async def wait(self, job_id: str, *, progress: bool | Callable[[Event], object] = False) -> Job:
        """Follows the job until it is over and returns it as it ended, whatever the end.

        `progress=True` shows a progress bar on standard error; a callable gets every event.
        """
        with _core.progress_for(await self.job(job_id), progress) as report:
            async for event in self.events(job_id):
                report(event)
            return await self._settled(job_id)

    async def _settled(self, job_id: str) -> Job:
        """The job once it is over: the run said its last word, the worker is writing it down."""
        patience = Patience(self.base_url)
        while True:
            try:
                job = await self.job(job_id)
                if job.terminal:
                    return job
                patience.renew()
                delay = _core.SETTLE
            except BridgeError as error:
                delay = patience.pause(error)
            await asyncio.sleep(delay)

    async def metrics(
        self,
        job_id: str,
        *,
        keys: str | Sequence[str] | None = None,
        after_step: int | None = None,
        max_points: int | None = None,
    ) -> Metrics:
        """The job's metrics by name: `metrics(id)["reward"].last`."""
        return await self._send(_core.metrics(job_id, keys, after_step, max_points))

    async def samples(
        self, job_id: str, *, step: int | None = None, page_size: int = 100
    ) -> AsyncIterator[Sample]:
        """Completions the policy wrote while it learned, newest step first; those of one `step`,
        if it is named. Pages are fetched as they are needed."""
        query = {"limit": page_size, "step": step}
        async for sample in self._all(partial(_core.samples, job_id), query):
            yield sample

    async def checkpoints(self, job_id: str) -> list[Checkpoint]:
        """The job's saved states and their adapters."""
        return await self._send(_core.checkpoints(job_id))

    async def logs(self, job_id: str, *, tail: int | None = None) -> str:
        """What the training process printed; `tail` is a number of lines."""
        return await self._send(_core.logs(job_id, tail))

    # ------------------------------------------------------------------ evaluations

    async def scores(self, job_id: str, *, against: str | None = None) -> Scores:
        """What a finished evaluation found; `against` another one, paired problem by problem."""
        return await self._send(_core.scores(job_id, against))

    async def completions(self, job_id: str) -> AsyncIterator[dict[str, Any]]:
        """Every answer of a finished evaluation, a problem an item, with its verdicts. They come
        one by one, however many there are; a connection that breaks is mended."""
        lines = Lines()
        async for piece in self._pieces(_core.completions(job_id), lambda _: lines.begin()):
            for line in lines.take(piece):
                if "answers" in line:
                    yield line

    async def regrade(
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
        return await self._send(_core.regrade(job_id, body, idempotency_key))

    # ------------------------------------------------------------------ projects

    async def projects(self) -> list[Project]:
        """All projects, with their quotas and what they have used."""
        return (await self._send(_core.projects())).data

    async def create_project(
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
        return await self._send(_core.create_project(body, id))

    async def update_project(
        self,
        project_id: str,
        name: str,
        *,
        max_running: int | None = None,
        gpu_hours: float | None = None,
    ) -> Project:
        """Gives a project this name and these quotas; None is no limit. What runs goes on."""
        body = {"name": name, "max_running": max_running, "gpu_hours": gpu_hours}
        return await self._send(_core.update_project(project_id, body))

    # ------------------------------------------------------------------ data and adapters

    async def upload(self, path: str | Path) -> Dataset:
        """Uploads a dataset; its `id` is its name in a spec."""
        return await self._send(_core.upload(Path(path)))

    async def datasets(self, *, page_size: int = 100) -> AsyncIterator[Dataset]:
        """The uploaded datasets, newest first."""
        async for dataset in self._all(_core.datasets, {"limit": page_size}):
            yield dataset

    async def adapters(
        self, *, job_id: str | None = None, page_size: int = 100
    ) -> AsyncIterator[Adapter]:
        """The trained adapters, newest first; of one job, if it is named."""
        query = {"limit": page_size, "job_id": job_id}
        async for adapter in self._all(_core.adapters, query):
            yield adapter

    async def adapter(self, name: str) -> Adapter:
        """One adapter: JOB@STEP, JOB@best, JOB@latest or JOB."""
        return await self._send(_core.adapter(name))

    async def grade(
        self, items: Sequence[dict[str, Any]], *, grader: str | dict[str, Any] | None = None
    ) -> Grades:
        """Judges answers as a job would. Each item is {"gold", "answer"}, the answer being a
        model's whole text, and may have a "prompt" and a "gold_value"; at most 1000 and 1 MB.

        `grader` is a name (`math`, `numeric`, `exact`) or an object with options.
        """
        return await self._send(_core.grade(list(items), grader))

    async def download_adapter(
        self, name: str, to: str | Path = ".", *, unpack: bool = False
    ) -> Path:
        """Downloads an adapter into the folder `to`: the path of the zip archive or, with
        `unpack`, of the folder with its files, which PEFT loads.

        The archive's SHA-256 is verified; raises BridgeError where it is another.
        """
        with Download(Path(to)) as download:
            async for piece in self._pieces(_core.download(name), download.begin):
                download.write(piece)
            return download.finish(unpack)

    async def generate(
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
        return await self._send(_core.generate(**body))

    async def stream(
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
    ) -> AsyncIterator[GenerationChunk]:
        """The same as it is written: chunks whose `text` together is the answer.

        Where it breaks off it raises `ConnectionError`, or `APIStatusError` with the service's
        reason; what came before is then not whole. Leaving the loop early stops the writing.
        """
        answer = Answer({k: v for k, v in locals().items() if k != "self"}, self.base_url)
        retry = Retry(answer.call, self.base_url, self._retries)
        while True:
            delay: float | None
            try:
                with answer.call.arguments() as arguments:
                    async with self._http.stream("POST", answer.call.path, **arguments) as response:
                        if not response.is_success:
                            await response.aread()
                        if (delay := retry.after_response(response)) is None:
                            check(response)
                            async for message in EventSource(response).aiter_sse():
                                if chunk := answer.take(message.event, message.data):
                                    yield chunk
                            answer.closed()
                            return
            except (httpx.TransportError, httpx.StreamError) as error:
                if not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                    answer.closed(error)
                    return
                delay = retry.after_error(error)
            await asyncio.sleep(delay)

    # ------------------------------------------------------------------ aliases

    async def aliases(self) -> list[Alias]:
        """Your own names for adapters."""
        return await self._send(_core.aliases())

    async def set_alias(self, name: str, adapter: str) -> Alias:
        """Lets `name` mean the adapter that `adapter` means now, until it is set again."""
        return await self._send(_core.set_alias(name, adapter))

    async def delete_alias(self, name: str) -> None:
        """Forgets the name; the adapter stays."""
        await self._send(_core.delete_alias(name))
