"""A backend's answer: as one, as a stream of chunks, and whether it is whole."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import aiohttp

from service.errors import ApiError
from service.store.database import load_json

Chunk = dict[str, Any]
_END_SECONDS = 0.1
"""So long the connection's own end may come after the answer's."""


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
                except (ApiError, ValueError) as error:
                    trouble = error
                if came:
                    yield came
                if trouble is not None:
                    raise trouble
                if self._ended:
                    return
        except (aiohttp.ClientError, ValueError) as error:
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
            if "error" in chunk:
                message = str((chunk["error"] or {}).get("message"))
                raise ApiError(502, "inference_failed", f"inference failed: {message}")
            check_ends(chunk)
            came.append(copied(chunk, self.copies))
        return False


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[list[bytes]]:
    """Lines as server-sent events have them: JSON may hold U+2028 and its like as they are."""
    rest = b""
    async for content in response.content.iter_any():
        *lines, rest = (rest + content).split(b"\n")
        yield lines
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


def broken(why: str) -> ApiError:
    """The answer came in part."""
    return ApiError(
        502,
        "inference_interrupted",
        f"inference stopped in the middle of the answer ({why}); what came is not whole: ask again",
        headers={"Retry-After": "2"},
        outside="inference stopped in the middle of the answer; what came is not whole: ask again",
    )
