"""Following a job's events over connections that may break: what was seen, whether to go on.

The stream ends for good when the service sends `end`, which it does once the job is over and every
event has been delivered. Any other end (the connection broke, the service restarts) is a reason to
reconnect with `Last-Event-ID`, so that nothing is skipped and nothing comes twice.
"""

from __future__ import annotations

import json
import time
from typing import Any

import httpx

from bridge_client import _core, models
from bridge_client._core import RETRY_STATUSES, STREAM_TIMEOUT, jittered, lost
from bridge_client.errors import APIStatusError, BridgeError, ConnectionError


class Patience:
    """How long a service that is away is waited for. An answer renews it."""

    def __init__(self, base_url: str, seconds: float = 120.0) -> None:
        self._base_url = base_url
        self._seconds = seconds
        self._failing_since: float | None = None
        self._failures = 0

    def renew(self) -> None:
        """The service answered: whatever broke before is mended."""
        self._failing_since, self._failures = None, 0

    def pause(self, error: Exception) -> float:
        """Seconds until the next try. Raises what no trying again can mend, and ConnectionError
        when patience is out."""
        if isinstance(error, APIStatusError) and not _passing(error.status):
            raise error
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        if now - self._failing_since > self._seconds:
            raise lost(self._base_url, error) from error
        self._failures += 1
        return jittered(min(0.5 * 2**self._failures, 5.0))


class Lines:
    """JSON lines on their way, asked for again where they broke off: each is given once."""

    def __init__(self) -> None:
        self._given = 0
        self.begin()

    def begin(self) -> None:
        """Another try: what comes now begins with the first line again."""
        self._place, self._rest = 0, bytearray()

    def take(self, piece: bytes) -> list[Any]:
        """The lines that are whole with this piece, and were not given yet."""
        self._rest += piece
        if b"\n" not in piece:
            return []
        *whole, rest = self._rest.split(b"\n")
        new = whole[max(0, self._given - self._place) :]
        self._place += len(whole)
        self._rest, self._given = rest, max(self._given, self._place)
        return [json.loads(line) for line in new]


class Answer:
    """Where a streamed generation is. Knows no sockets: both clients drive it."""

    def __init__(self, body: dict[str, Any], base_url: str) -> None:
        known = {key: value for key, value in body.items() if value is not None}
        self.call = _core.generate(**known, stream=True)
        self._base_url = base_url
        self._done = False

    def take(self, kind: str, data: str) -> models.GenerationChunk | None:
        """The chunk of one server-sent message; None for one that is none. Raises APIStatusError
        where the service says that it cannot go on."""
        if data == "[DONE]":
            self._done = True
            return None
        content = json.loads(data)
        if kind == "error":
            raise APIStatusError(int(content.get("status") or 502), content)
        return models.GenerationChunk.model_validate(content)

    def closed(self, error: Exception | None = None) -> None:
        """The connection has ended. Raises ConnectionError unless all had come."""
        if not self._done:
            cause = _core.describe(error) if error else "closed early"
            raise ConnectionError(
                self._base_url,
                cause,
                f"the connection to {self._base_url} ended in the middle of the answer ({cause}); "
                "what came is not whole: ask again",
            )


class Cursor:
    """Where one follower of one job's stream is. Knows no sockets: both clients drive it."""

    def __init__(
        self, job_id: str, *, after: int = 0, base_url: str = "", patience: float = 120.0
    ) -> None:
        self.job_id = job_id
        self.path = _core.events_path(job_id)
        self.last_seq = after
        self._patience = Patience(base_url, patience)
        self.ended = False
        """Has the service said that there is nothing more to come?"""

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for httpx: go on after the last event seen."""
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        if self.last_seq:
            headers["Last-Event-ID"] = str(self.last_seq)
        return {"headers": headers, "timeout": STREAM_TIMEOUT}

    def opened(self) -> None:
        """The service answered: whatever broke before is mended."""
        self._patience.renew()

    def take(self, kind: str, event_id: str, data: str) -> models.Event | None:
        """The event of one server-sent message; None for one that is no event or comes again."""
        if kind == "end":  # an `id` holds until the next one, so this message carries an old one
            self.ended = True
            return None
        if not data or not event_id.isdecimal():  # `retry:` alone comes as an empty message
            return None
        event = models.Event.model_validate({"seq": int(event_id), **json.loads(data)})
        if event.seq <= self.last_seq:
            return None
        self.last_seq = event.seq
        return event

    def closed(self) -> float:
        """The server closed the stream before its end: seconds until the next try."""
        return jittered(1.0)

    def broke(self, error: Exception) -> float:
        """The connection broke: seconds until the next try. Raises what no trying again can mend,
        and ConnectionError when patience is out."""
        return self._patience.pause(error)


def _passing(status: int) -> bool:
    """Is this a trouble of the server's, not of the request?"""
    return status >= 500 or status in RETRY_STATUSES


BROKEN = (httpx.TransportError, httpx.StreamError, BridgeError)
"""What ends a stream in any way but the server's closing it in order."""
