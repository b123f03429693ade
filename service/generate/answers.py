"""A backend's answer: as one, as a stream of chunks, and whether it is whole."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx

from service.errors import ApiError


class AnswerStream:
    """An answer as it is written; to be closed with `aclose`."""

    def __init__(self, response: httpx.Response, copies: int = 1) -> None:
        self._response = response
        self.copies = copies
        """Of every choice, see `copied`."""

    async def aclose(self) -> None:
        """Hangs up."""
        await self._response.aclose()

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Its chunks up to the end. Raises `ApiError` where it breaks off: nobody may take what
        came for a whole answer."""
        try:
            async for line in _lines(self._response):
                data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                if data == "[DONE]":
                    return
                if not data:
                    continue
                chunk: dict[str, Any] = json.loads(data)
                if "error" in chunk:
                    message = str((chunk["error"] or {}).get("message"))
                    raise ApiError(502, "inference_failed", f"inference failed: {message}")
                check_ends(chunk)
                yield copied(chunk, self.copies)
        except (httpx.HTTPError, ValueError) as error:
            raise broken(str(error) or type(error).__name__) from error
        raise broken("the stream ended early")


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """Lines as server-sent events have them. httpx's own end at U+2028 and its like too, which JSON
    may hold as they are."""
    rest = ""
    async for text in response.aiter_text():
        *whole, rest = (rest + text).split("\n")
        for line in whole:
            yield line.removesuffix("\r")
    yield rest


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
