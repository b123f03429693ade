"""A request on its way through the inference process, and what it is told as it goes."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from inference.errors import InferenceError
from inference.lora import LoraWeights
from inference.sampling import SamplingParams, TokenInfo

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Update:
    """News of one choice: text and tokens that are certain now."""

    index: int
    text: str = ""
    tokens: tuple[TokenInfo, ...] = ()
    """Where log-probabilities were asked for; those of the text so far, none of a stop string."""
    finish_reason: FinishReason | None = None
    count: int = 0
    """With `finish_reason`: tokens that were generated, the end-of-text token included."""


@dataclass(slots=True, eq=False)
class Generation:
    """One prompt and what becomes of it. Made on the event loop; the scheduler's thread reports to
    it by `report`."""

    batch: Any
    """The `inference.batch.Batch` of its base model."""
    lora: LoraWeights | None
    prompt: list[int]
    params: SamplingParams
    stream: bool = False
    """Is text wanted as it comes, or all of it at the end?"""
    seed: int = 0
    request: object = field(default_factory=object)
    """The same of all prompts that were sent together."""
    cancelled: bool = False
    """Nobody waits for it any more."""
    prompt_logprobs: list[TokenInfo] = field(default_factory=list)
    loop: asyncio.AbstractEventLoop | None = None
    _news: asyncio.Queue[Update | InferenceError] = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.seed = secrets.randbits(63) if self.params.seed is None else self.params.seed

    def report(self, news: Iterable[Update | InferenceError]) -> None:
        """Adds news; to be called on the event loop."""
        for item in news:
            self._news.put_nowait(item)

    async def updates(self) -> AsyncIterator[Update]:
        """All news until every choice has ended. Raises InferenceError where it cannot go on."""
        open_choices = self.params.n
        while open_choices:
            item = await self._news.get()
            if isinstance(item, InferenceError):
                raise item
            open_choices -= item.finish_reason is not None
            yield item


@dataclass(slots=True)
class Completion:
    """One finished choice."""

    text: str = ""
    tokens: list[TokenInfo] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    count: int = 0


async def collected(generation: Generation) -> list[Completion]:
    """The finished choices in order."""
    found = [Completion() for _ in range(generation.params.n)]
    async for update in generation.updates():
        choice = found[update.index]
        choice.text += update.text
        choice.tokens += update.tokens
        if update.finish_reason is not None:
            choice.finish_reason, choice.count = update.finish_reason, update.count
    return found
