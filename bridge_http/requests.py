"""What each request is called, and its one line in the log: `ID METHOD PATH STATUS MS`.

In place of uvicorn's access log, whose lines have neither a time nor an id, and took longer. A line
of an answer that is an error ends with the error's code; of one that is the server's own fault,
with what was the matter too.
"""

from __future__ import annotations

import logging
import re
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

REQUEST_ID = "X-Request-Id"
UVICORN: dict[str, Any] = {"log_config": None, "access_log": False}
"""For `uvicorn.Config`: its lines come in our form, those of requests from here."""
_FIT = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
"""No spaces, no control characters: a foreign id must not be able to forge a line of the log."""
_LONGEST = 500
"""Characters of a path that are logged."""


class RequestLog:
    """Gives each request an id (the caller's own, where it is fit to be logged), writes it on the
    answer and into the log, and has `failed` answer where an unforeseen error came up.

    To be the outermost layer. Plain ASGI: it does not buffer streams.
    """

    def __init__(self, app: ASGIApp, failed: Callable[[Scope, Exception], ASGIApp]) -> None:
        self.app, self.failed = app, failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        method = scope["method"]
        given = Headers(scope=scope).get(REQUEST_ID, "")
        id = given if _FIT.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = id

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            if status:  # too late to say anything else; the server tells how it came
                tell_trouble(scope, 500, "internal", f"{type(error).__name__} within the answer")
                raise
            await self.failed(scope, error)(scope, receive, send_with_id)
        finally:
            code, detail = scope["state"].get("trouble", ("", ""))
            level = _level(status)
            if log.isEnabledFor(level):
                path, took = _path(scope), (time.perf_counter() - began) * 1000
                more = f" {code}" if code else ""
                more += f": {_one_line(detail)}" if detail and status >= 500 else ""
                line = f"{id} {method} {path} {status} {took:.1f} ms{more}"
                # `log.log` would look up who calls it, which takes as long as all the rest.
                log.handle(logging.LogRecord(log.name, level, __file__, 0, line, None, None))


def note_trouble(scope: Scope, code: str, detail: str) -> None:
    """What the request's line shall say about an answer that is an error."""
    scope.setdefault("state", {})["trouble"] = code, detail


def tell_trouble(scope: Scope, status: int, code: str, detail: str) -> None:
    """A line of its own: for an error in the middle of an answer that began as a good one."""
    id, path = request_id(scope), _path(scope)
    message = "%s %s %s %d %s within the answer: %s"
    log.log(
        max(_level(status), logging.WARNING),
        message,
        *(id, scope["method"], path, status, code, _one_line(detail)),
    )


def request_id(scope: Scope) -> str | None:
    """What the request is called; None outside of the log's reach."""
    found = scope.get("state", {}).get("request_id")
    return str(found) if found else None


def _level(status: int) -> int:
    if status < 500:
        return logging.INFO
    return logging.ERROR if status == 500 else logging.WARNING


def _path(scope: Scope) -> str:
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    return _one_line(raw[:_LONGEST].decode("ascii", "backslashreplace"))


def _one_line(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def set_up_logging() -> None:
    """Lets the process log to stderr, each line with its time."""
    # What no line shows need not be found out for each.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # or every look at the hub is a line


class _Formatter(logging.Formatter):
    """One that works the calendar out once a second, not once a line."""

    _second, _shown = -1, ""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        second = int(record.created)
        if second != self._second:
            self._shown = time.strftime("%Y-%m-%d %H:%M:%S", self.converter(second))
            self._second = second
        return f"{self._shown},{int(record.msecs):03d}"
