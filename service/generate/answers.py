"""A backend's answer: as one, as a stream of chunks, and whether it is whole."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import aiohttp

from service.errors import ApiError
from service.store.database import load_json

log = logging.getLogger(__name__)

Chunk = dict[str, Any]
_END_SECONDS = 0.1
"""So long the connection's own end may come after the answer's."""
_LONGEST_LINE = 16 * 2**20
"""Bytes of one line of a stream; one without an end must not fill the memory."""


class AnswerStream:
    """An answer as it is written; to be closed with `aclose`."""

    def __init__(self, response: aiohttp.ClientResponse, copies: int = 1) -> None:
        self._response = response
        self.copies = copies
        """Of every choice, see `copied`."""
        self._ended = False

    async def aclose(self) -> None:
        """Hangs up; or keeps the connection for others, where the answer has ended."""
        if self._ended:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with asyncio.timeout(_END_SECONDS):
                    await self._response.read()
        self._response.close()

    async def chunks(self) -> AsyncIterator[list[Chunk]]:
        """Its chunks up to the end, each time all that have come: they cost whoever hands them on
        one write. Raises `ApiError` where it breaks off: nobody may take what came for a whole
        answer."""
        try:
            async for lines in _lines(self._response):
                came: list[Chunk] = []
                trouble: Exception | None = None
                try:
                    self._ended = self._take(lines, came)
                except (ApiError, ValueError, RecursionError) as error:
                    trouble = error
                if came:
                    yield came
                if trouble is not None:
                    raise trouble
                if self._ended:
                    return
        except aiohttp.ClientError as error:
            raise cut_off(error) from error
        except (ValueError, RecursionError) as error:
            raise broken(str(error) or type(error).__name__) from error
        raise broken("the stream ended early")

    def _take(self, lines: Sequence[bytes], came: list[Chunk]) -> bool:
        """Puts the lines' chunks to those that came; True where the answer ends."""
        for line in lines:
            data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
            if data == b"[DONE]":
                return True
            if not data:
                continue
            chunk: Chunk = load_json(data)
            if not isinstance(chunk, dict):
                raise ValueError("a chunk that is no object")
            if "error" in chunk:
                error = chunk["error"]
                message = error.get("message") if isinstance(error, dict) else error
                raise ApiError(502, "inference_failed", f"inference failed: {message}")
            if not isinstance(chunk.get("choices"), list):
                raise ValueError("a chunk without choices")
            check_ends(chunk)
            came.append(copied(chunk, self.copies))
        return False


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[list[bytes]]:
    """Lines as server-sent events have them: JSON may hold U+2028 and its like as they are. Where
    the connection breaks, what had come before is given first."""
    rest = b""
    trouble: aiohttp.ClientError | None = None
    while trouble is None:
        try:
            content = await response.content.readany()
        except aiohttp.ClientError as error:
            # a reader is told of the end before it is given what came before it
            content, trouble = response.content._read_nowait(-1), error
        if not content:
            break
        *lines, rest = (rest + content).split(b"\n")
        yield lines
        if len(rest) > _LONGEST_LINE:
            raise ValueError(f"a line of more than {_LONGEST_LINE} bytes")
    if trouble is not None:
        raise trouble
    yield [rest]


def copied(answer: dict[str, Any], copies: int) -> dict[str, Any]:
    """The answer, or a chunk of one, with every choice so many times, each counted as written."""
    if copies == 1:
        return answer
    choices = [
        {**choice, "index": choice["index"] * copies + number}
        for choice in answer["choices"]
        for number in range(copies)
    ]
    more: dict[str, Any] = {"choices": choices}
    if usage := answer.get("usage"):
        written = usage["completion_tokens"] * copies
        total = usage["prompt_tokens"] + written
        more["usage"] = {**usage, "completion_tokens": written, "total_tokens": total}
    return answer | more


def check_ends(answer: Mapping[str, Any]) -> None:
    """A choice that was given up (vLLM says `abort` where it is being stopped) is no answer."""
    for choice in answer.get("choices") or ():
        if (reason := choice.get("finish_reason")) not in (None, "stop", "length"):
            raise broken(f"it ended with {reason!r}")


def cut_off(error: aiohttp.ClientError) -> ApiError:
    """The same, because the connection ended; how it did is for the log alone."""
    log.warning("an answer of inference's was cut off: %r", error)
    return broken("the connection ended")


def broken(why: str) -> ApiError:
    """The answer came in part."""
    return ApiError(
        502,
        "inference_interrupted",
        f"inference stopped in the middle of the answer ({why}); what came is not whole: ask again",
        headers={"Retry-After": "2"},
        outside="inference stopped in the middle of the answer; what came is not whole: ask again",
    )
