"""The client without its sockets: what each request is, what its answer means, when to try again.

`Client` and `AsyncClient` differ in nothing but how they wait; all they know is here. Nothing here
does any I/O but opening the file that is uploaded and looking for the service that runs here.
"""

from __future__ import annotations

import os
import random
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

import httpx

from bridge_client import _given, models
from bridge_client._given import segment
from bridge_client.errors import APIStatusError, BridgeError, ConnectionError

T = TypeVar("T")
Record = TypeVar("Record", bound=models.Record)

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT = httpx.Timeout(30.0, connect=5.0)
"""Seconds. Nothing but generating and streaming takes longer than a database query."""
GENERATE_TIMEOUT = httpx.Timeout(300.0, connect=5.0)
GRADE_TIMEOUT = httpx.Timeout(120.0, connect=5.0)
UPLOAD_TIMEOUT = httpx.Timeout(60.0, connect=5.0, read=None)
"""However long the service checks what it has received: row by row, before it answers."""
STREAM_TIMEOUT = httpx.Timeout(60.0, connect=5.0)
"""A healthy event stream says something, if only a comment, several times a minute."""
PROJECT_ID = r"[a-z0-9][a-z0-9_-]{0,62}"
RETRIES = 2
SETTLE = 0.2
"""Seconds between looks at a job whose run has ended and whose status has yet to say so."""
RETRY_STATUSES = frozenset({429, 503})
"""Both mean that the request was not carried out, so repeating even a POST is safe."""


def default_url() -> str:
    """BRIDGE_URL; else the service that runs in BRIDGE_HOME or ./.bridge; else port 8000 here."""
    named = os.environ.get("BRIDGE_URL")
    if named:
        return named
    from bridge_client.home import Home

    there = Home().answering()
    return there.url if there else DEFAULT_URL


def project_header(project: str | None) -> dict[str, str]:
    """The header that chooses the project: the one given, else BRIDGE_PROJECT, else none."""
    project = project or os.environ.get("BRIDGE_PROJECT")
    return {"Bridge-Project": _given.header("project", project)} if project else {}


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request and how to read its answer."""

    method: str
    path: str
    parse: Callable[[httpx.Response], T]
    params: Mapping[str, Any] = field(default_factory=dict)
    json: Any = None
    file: Path | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout: httpx.Timeout | None = None
    """None: the client's own."""
    repeatable: bool = True
    """May it be sent again when nobody knows whether the first one arrived?"""

    @contextmanager
    def arguments(self) -> Iterator[dict[str, Any]]:
        """Keyword arguments for httpx; a file to upload is opened anew for every try."""
        known = {k: v for k, v in self.params.items() if v is not None}
        for value in known.values():
            _given.text(str(value))
        arguments: dict[str, Any] = {"params": known, "headers": dict(self.headers)}
        if self.json is not None:
            arguments["content"] = _given.body(self.json)
            arguments["headers"]["Content-Type"] = "application/json"
        if self.timeout is not None:
            arguments["timeout"] = self.timeout
        with ExitStack() as stack:
            if self.file is not None:
                file = stack.enter_context(self.file.open("rb"))
                arguments["files"] = {"file": (self.file.name, file)}
            yield arguments

    def read(self, response: httpx.Response) -> T:
        """What the service answered. Raises BridgeError: APIStatusError for a refusal, and for an
        answer that no Bridge of this version would give."""
        check(response)
        try:
            return self.parse(response)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = str(error).splitlines()[0]
            raise BridgeError(
                f"the answer to {self.method} {response.url} cannot be read ({why}): no Bridge "
                "listens there, or one of another version; restart it with `bridge down` and "
                "`bridge up`"
            ) from error


class Retry:
    """Sends a call again after connection errors, 429 and 503, at most `retries` times."""

    def __init__(self, call: Call[Any], base_url: str, retries: int = RETRIES) -> None:
        self._call = call
        self._base_url = base_url
        self._left = retries
        self._delay = 0.5

    def after_response(self, response: httpx.Response) -> float | None:
        """Seconds to wait before the next try; None if this answer is the answer."""
        if response.status_code not in RETRY_STATUSES or self._left == 0:
            return None
        return self._next(retry_after(response))

    def after_error(self, error: httpx.TransportError) -> float:
        """Seconds to wait before the next try; raises ConnectionError if there is none."""
        never_arrived = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
        if self._left == 0 or not (self._call.repeatable or never_arrived):
            raise lost(self._base_url, error) from error
        return self._next(None)

    def _next(self, asked: float | None) -> float:
        self._left -= 1
        delay, self._delay = self._delay, self._delay * 2
        return asked if asked is not None else jittered(delay)


def jittered(delay: float) -> float:
    """Between half of it and all of it, so that many clients do not come back together."""
    return delay * random.uniform(0.5, 1.0)


def retry_after(response: httpx.Response, longest: float = 60.0) -> float | None:
    """The answer's Retry-After in seconds (a number or a date), None without one."""
    value = response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            then = parsedate_to_datetime(value)
            now = parsedate_to_datetime(response.headers["date"])
        except (ValueError, KeyError, TypeError):
            return None
        seconds = (then - now).total_seconds()
    return min(max(seconds, 0.0), longest)


def lost(base_url: str, error: Exception) -> ConnectionError:
    """What is raised when trying again did not help."""
    if isinstance(error, ConnectionError):
        return error
    if isinstance(error, httpx.ReadTimeout):
        return ConnectionError.silent(base_url)
    return ConnectionError(base_url, describe(error))


def describe(error: Exception) -> str:
    """An httpx error in words; some of them have none of their own."""
    return str(error) or type(error).__name__


def check(response: httpx.Response) -> httpx.Response:
    """Raises APIStatusError unless the answer is a success. The body must have been read."""
    if response.is_success:
        return response
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        problem = {"detail": response.text[:500] or response.reason_phrase}
    if isinstance(problem.get("error"), dict):  # OpenAI's shape, under /v1
        problem = {"detail": problem["error"].get("message"), **problem["error"]}
    if response.status_code in (404, 405) and not isinstance(problem.get("code"), str):
        where = f"{response.url.scheme}://{response.url.netloc.decode()}"
        problem = {
            "detail": f"{response.reason_phrase}: another program answers at {where}, no Bridge; "
            "say with BRIDGE_URL where it is"
        }
    problem.setdefault("request_id", response.headers.get("x-request-id"))
    raise APIStatusError(response.status_code, problem)


# --------------------------------------------------------------------------- the calls


def _one(model: type[Record]) -> Callable[[httpx.Response], Record]:
    return lambda response: model.model_validate(response.json())


def _page(model: type[Record]) -> Callable[[httpx.Response], models.Page[Record]]:
    return lambda response: models.Page[model].model_validate(response.json())  # type: ignore[valid-type]


def _data(model: type[Record]) -> Callable[[httpx.Response], list[Record]]:
    return lambda response: [model.model_validate(row) for row in response.json()["data"]]


def submit(
    spec: dict[str, Any], idempotency_key: str | None, priority: int | None
) -> Call[models.Job]:
    """Always with an Idempotency-Key, so that sending it twice makes one job."""
    return Call(
        *("POST", "/jobs", _one(models.Job)),
        json=spec,
        params={"priority": priority},
        headers=_key(idempotency_key),
    )


def _key(idempotency_key: str | None) -> dict[str, str]:
    key = idempotency_key or str(uuid.uuid4())
    return {"Idempotency-Key": _given.header("idempotency key", key)}


def dry_run(spec: dict[str, Any]) -> Call[models.DryRun]:
    return Call("POST", "/jobs", _one(models.DryRun), json=spec, params={"dry_run": "true"})


def job(job_id: str) -> Call[models.Job]:
    return Call("GET", f"/jobs/{segment(job_id)}", _one(models.Job))


def jobs(**query: Any) -> Call[models.Page[models.Job]]:
    return Call("GET", "/jobs", _page(models.Job), params=query)


def request(job_id: str, verb: str) -> Call[models.Job]:
    """`cancel`, `pause`, `resume` or `retry`: asking twice is the same as once."""
    return Call("POST", f"/jobs/{segment(job_id)}/{verb}", _one(models.Job))


def fork(job_id: str, body: dict[str, Any], idempotency_key: str | None) -> Call[models.Job]:
    """Always with an Idempotency-Key, so that sending it twice makes one job."""
    return Call(
        *("POST", f"/jobs/{segment(job_id)}/fork", _one(models.Job)),
        json={key: value for key, value in body.items() if value is not None},
        headers=_key(idempotency_key),
    )


def prioritize(job_id: str, priority: int) -> Call[models.Job]:
    body = {"priority": priority}
    return Call("PATCH", f"/jobs/{segment(job_id)}", _one(models.Job), json=body)


def projects(**_: Any) -> Call[models.Page[models.Project]]:
    return Call("GET", "/projects", _page(models.Project))


def create_project(body: dict[str, Any], project_id: str | None) -> Call[models.Project]:
    if project_id is None and re.fullmatch(PROJECT_ID, body["name"]):
        project_id = body["name"]
    known = body | ({"id": project_id} if project_id else {})
    return Call("POST", "/projects", _one(models.Project), json=known, repeatable=False)


def update_project(project_id: str, body: dict[str, Any]) -> Call[models.Project]:
    path = f"/projects/{segment(project_id)}"
    return Call("PUT", path, _one(models.Project), json=body)


def metrics(
    job_id: str, keys: str | Sequence[str] | None, after_step: int | None, max_points: int | None
) -> Call[models.Metrics]:
    names = [keys] if isinstance(keys, str) else keys
    params = {
        "keys": ",".join(names) if names else None,
        "after_step": after_step,
        "max_points": max_points,
    }
    return Call(
        "GET",
        f"/jobs/{segment(job_id)}/metrics",
        lambda r: models.Metrics.parse(r.json()),
        params=params,
    )


def samples(job_id: str, **query: Any) -> Call[models.Page[models.Sample]]:
    return Call("GET", f"/jobs/{segment(job_id)}/samples", _page(models.Sample), params=query)


def checkpoints(job_id: str) -> Call[list[models.Checkpoint]]:
    return Call("GET", f"/jobs/{segment(job_id)}/checkpoints", _data(models.Checkpoint))


def logs(job_id: str, tail: int | None) -> Call[str]:
    return Call("GET", f"/jobs/{segment(job_id)}/logs", lambda r: r.text, params={"tail": tail})


def events_path(job_id: str) -> str:
    return f"/jobs/{segment(job_id)}/events"


def upload(path: Path) -> Call[models.Dataset]:
    return Call(
        *("POST", "/datasets", _one(models.Dataset)),
        file=path,
        timeout=UPLOAD_TIMEOUT,
        repeatable=False,
    )


def datasets(**query: Any) -> Call[models.Page[models.Dataset]]:
    return Call("GET", "/datasets", _page(models.Dataset), params=query)


def adapters(**query: Any) -> Call[models.Page[models.Adapter]]:
    return Call("GET", "/adapters", _page(models.Adapter), params=query)


def adapter(name: str) -> Call[models.Adapter]:
    return Call("GET", f"/adapters/{segment(name)}", _one(models.Adapter))


def download(name: str) -> Call[None]:
    """What is asked for; the answer is read piece by piece (`_download`)."""
    path = f"/adapters/{segment(name)}/download"
    return Call("GET", path, lambda r: None, timeout=GENERATE_TIMEOUT)


def delete_job(job_id: str) -> Call[None]:
    return Call("DELETE", f"/jobs/{segment(job_id)}", lambda r: None, timeout=GENERATE_TIMEOUT)


def generate(**body: Any) -> Call[models.Generation]:
    known = {key: value for key, value in body.items() if value is not None}
    return Call("POST", "/generate", _one(models.Generation), json=known, timeout=GENERATE_TIMEOUT)


def grade(items: list[dict[str, Any]], grader: str | dict[str, Any] | None) -> Call[models.Grades]:
    body = {"items": items} | ({} if grader is None else {"grader": grader})
    return Call("POST", "/graders/run", _one(models.Grades), json=body, timeout=GRADE_TIMEOUT)


def scores(job_id: str, against: str | None) -> Call[models.Scores]:
    path = f"/jobs/{segment(job_id)}/scores"
    # an artifact store may have to be asked for what is compared
    return Call(
        "GET", path, _one(models.Scores), params={"against": against}, timeout=GENERATE_TIMEOUT
    )


def completions(job_id: str) -> Call[Any]:
    path = f"/jobs/{segment(job_id)}/completions"
    return Call("GET", path, httpx.Response.json, timeout=GENERATE_TIMEOUT)


def regrade(job_id: str, body: dict[str, Any], idempotency_key: str | None) -> Call[models.Job]:
    return Call(
        *("POST", f"/jobs/{segment(job_id)}/regrade", _one(models.Job)),
        json={key: value for key, value in body.items() if value is not None},
        headers=_key(idempotency_key),
        timeout=GENERATE_TIMEOUT,
    )


def aliases() -> Call[list[models.Alias]]:
    return Call("GET", "/adapters/aliases", _data(models.Alias))


def set_alias(name: str, adapter: str) -> Call[models.Alias]:
    path = f"/adapters/aliases/{segment(name)}"
    return Call("PUT", path, _one(models.Alias), json={"adapter": adapter})


def delete_alias(name: str) -> Call[None]:
    return Call("DELETE", f"/adapters/aliases/{segment(name)}", lambda r: None)


@contextmanager
def progress_for(
    job: models.Job, progress: bool | Callable[[models.Event], object]
) -> Iterator[Callable[[models.Event], object]]:
    """Where `wait` reports events to: a callable, a bar on standard error, or nowhere."""
    if callable(progress):
        yield progress
    elif progress:
        from bridge_client.watch import Watch

        with Watch(job) as watch:
            yield watch.see
    else:
        yield lambda event: None


def health() -> Call[dict[str, Any]]:
    return Call("GET", "/readyz", lambda r: dict(r.json()))
