"""Answers in OpenAI's shapes, whole and in pieces."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from inference.errors import InferenceError
from inference.requests import Completion, Generation, Update
from inference.sampling import TokenInfo

DONE = "data: [DONE]\n\n"


class Shape:
    """What distinguishes /v1/completions from /v1/chat/completions."""

    def __init__(self, model: str, tokenizer: Any, *, chat: bool) -> None:
        self.chat = chat
        self._tokenizer = tokenizer
        prefix, kind = ("chatcmpl", "chat.completion") if chat else ("cmpl", "text_completion")
        self._piece_kind = "chat.completion.chunk" if chat else kind
        self._kind = kind
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        """The answer to a request without `stream`."""
        return {**self._head, "object": self._kind, "choices": choices, "usage": usage}

    def choice(self, index: int, done: Completion, told: Sequence[TokenInfo] | None) -> Any:
        """One finished choice; `told`: its log-probabilities, where asked for."""
        text = (
            {"message": {"role": "assistant", "content": done.text}}
            if self.chat
            else {"text": done.text}
        )
        logprobs = None if told is None else self.logprobs(told)
        finish = {"logprobs": logprobs, "finish_reason": done.finish_reason}
        return {"index": index, **text, **finish}

    def opening(self, index: int) -> str | None:
        """The first piece of a chat's choice says who speaks."""
        if not self.chat:
            return None
        delta = {"role": "assistant", "content": ""}
        return self._piece([{"index": index, "delta": delta, "finish_reason": None}])

    def piece(self, index: int, update: Update, logprobs: bool) -> str:
        """News of one choice."""
        text: dict[str, Any] = {"text": update.text}
        if self.chat:
            text = {"delta": {"content": update.text} if update.text else {}}
        told = self.logprobs(update.tokens) if logprobs and update.tokens else None
        reason = {"logprobs": told, "finish_reason": update.finish_reason}
        return self._piece([{"index": index, **text, **reason}])

    def closing(self, usage: dict[str, int]) -> str:
        """The count of tokens, which comes after all choices."""
        return self._piece([], usage=usage)

    def _piece(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return event({**self._head, "object": self._piece_kind, "choices": choices, **more})

    def logprobs(self, told: Sequence[TokenInfo]) -> dict[str, Any]:
        """Log-probabilities as the route's shape has them."""
        texts = [self.token(info.id) for info in told]
        if self.chat:
            return {
                "content": [
                    {
                        **_entry(text, info.logprob),
                        "top_logprobs": [_entry(self.token(i), value) for i, value in info.top],
                    }
                    for text, info in zip(texts, told, strict=True)
                ]
            }
        offsets, place = [], 0
        for text in texts:
            offsets.append(place)
            place += len(text)
        top: list[dict[str, float] | None] = [
            {self.token(i): value for i, value in info.top} if info.logprob is not None else None
            for info in told
        ]
        return {
            "tokens": texts,
            "token_logprobs": [info.logprob for info in told],
            "top_logprobs": top if any(info.top for info in told) else None,
            "text_offset": offsets,
        }

    def token(self, id: int) -> str:
        """A token as text."""
        return str(self._tokenizer.decode([id]))


def _entry(text: str, logprob: float | None) -> dict[str, Any]:
    # Part of a character cannot be told as text, and its bytes are the tokenizer's secret.
    told = None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": told}


def usage_of(generations: Sequence[Generation], completion_tokens: int) -> dict[str, int]:
    """Tokens of the prompts, each counted once, and of all choices."""
    prompt = sum(len(generation.prompt) for generation in generations)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt + completion_tokens,
    }


async def pieces(
    shape: Shape,
    generations: Sequence[Generation],
    merged: AsyncIterator[tuple[int, Update]],
    *,
    logprobs: bool,
    usage: bool,
    broken: Callable[[InferenceError], None],
) -> AsyncIterator[str]:
    """The stream's events. `merged` gives (the number of the prompt, news); `broken` is told of
    what ends it early."""
    n, counted = generations[0].params.n, 0
    for index in range(n * len(generations)):
        if (first := shape.opening(index)) is not None:
            yield first
    try:
        async for number, update in merged:
            counted += update.count
            yield shape.piece(number * n + update.index, update, logprobs)
    except InferenceError as error:
        broken(error)
        yield event(error.body())  # no [DONE] behind it: nobody may take it for an end
        return
    if usage:
        yield shape.closing(usage_of(generations, counted))
    yield DONE


def event(body: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
